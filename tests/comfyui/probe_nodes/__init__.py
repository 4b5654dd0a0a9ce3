"""Nodes for tests only: inputs that no core node makes, and a look at results before a codec touches them."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io

FaceLandmarks = io.Custom("FACE_LANDMARKS")
Anything = io.Custom("*")


class ProbeImage(io.ComfyNode):
    """A flat grey picture of any size and number of channels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Int.Input(name, min=1, max=10000) for name in ("width", "height", "channels")]
        return io.Schema(node_id="ProbeImage", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, width: int, height: int, channels: int) -> io.NodeOutput:
        return io.NodeOutput(torch.full((1, height, width, channels), 0.5))


class ProbeReshape(io.ComfyNode):
    """A picture as grey, with alpha, with odd sides, twice side by side, ten times as large, or three times in a row."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shapes = ["grey", "rgba", "odd", "pair", "enlarged", "video"]
        return io.Schema(
            node_id="ProbeReshape",
            inputs=[io.Image.Input("image"), io.Combo.Input("shape", options=shapes)],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, shape: str) -> io.NodeOutput:
        reshaped = {
            "grey": lambda: image.mean(-1, keepdim=True),
            "rgba": lambda: torch.cat([image, torch.ones_like(image[..., :1])], -1),
            "odd": lambda: image[:, :-1, :-1],
            "pair": lambda: torch.cat([image, image.flip(2)], 2),
            "video": lambda: image.repeat(3, 1, 1, 1),
            "enlarged": lambda: image.repeat_interleave(10, 1).repeat_interleave(10, 2),
        }
        return io.NodeOutput(reshaped[shape]())


class ProbeAudio(io.ComfyNode):
    """Sound of any rate and length: a syllable-like tone, silence, NaN, or none at all."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeAudio",
            inputs=[
                io.Combo.Input("kind", options=["tone", "silence", "nan", "none"]),
                io.Float.Input("seconds", default=1.0, min=0.0, max=1000.0),
                io.Int.Input("sample_rate", default=16000, min=1, max=400000),
                io.Int.Input("channels", default=1, min=1, max=8),
            ],
            outputs=[io.Audio.Output()],
        )

    @classmethod
    def execute(cls, kind: str, seconds: float, sample_rate: int, channels: int) -> io.NodeOutput:
        if kind == "none":
            return io.NodeOutput(None)
        time_axis = torch.arange(round(seconds * sample_rate)) / sample_rate
        tone = 0.3 * torch.sin(2 * math.pi * 220 * time_axis) * (0.55 + 0.45 * torch.sin(2 * math.pi * 4 * time_axis))
        samples = {"tone": tone, "silence": torch.zeros_like(tone), "nan": torch.full_like(tone, math.nan)}[kind]
        return io.NodeOutput({"waveform": samples.expand(1, channels, -1).clone(), "sample_rate": sample_rate})


class ProbeLandmarks(io.ComfyNode):
    """Core's FACE_LANDMARKS from JSON: {"frames": [[[[x, y], ...], ...], ...], "image_size": [H, W]}."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ProbeLandmarks", inputs=[io.String.Input("json")], outputs=[FaceLandmarks.Output()])

    @classmethod
    def execute(cls, json: str) -> io.NodeOutput:
        return io.NodeOutput(_face_landmarks(json))


def _face_landmarks(text: str) -> dict:
    given = json.loads(text)

    def face(points: list) -> dict:
        xy = np.array(points, dtype=np.float32)
        return {"landmarks_xy": xy, "bbox_xyxy": np.concatenate([xy.min(0), xy.max(0)])}

    return {
        "frames": [[face(points) for points in faces] for faces in given["frames"]],
        "image_size": tuple(given["image_size"]),
    }


class ProbeKeep(io.ComfyNode):
    """Writes what arrives to the output folder as NAME.npz: an image, a mask, or the tensors of one of PC-Talk's values."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProbeKeep", inputs=[Anything.Input("value"), io.String.Input("name")], outputs=[], is_output_node=True
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return time.time()  # always write: never from the cache

    @classmethod
    def execute(cls, value: object, name: str) -> io.NodeOutput:
        fields = {"value": value} if isinstance(value, torch.Tensor | float) else vars(value)
        arrays = {key: np.asarray(field) for key, field in fields.items() if isinstance(field, torch.Tensor | float)}
        np.savez(Path(folder_paths.get_output_directory()) / f"{name}.npz", **arrays)
        return io.NodeOutput()


class ProbeParameters(io.ComfyNode):
    """Counts the bytes of parameters in this process and in the networks of two loaders, as `held` and `alive` in NAME.npz."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        links = [Anything.Input(name) for name in ("motion_model", "renderer", "after")]
        return io.Schema(node_id="ProbeParameters", inputs=[*links, io.String.Input("name")], outputs=[], is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return time.time()  # always count: never from the cache

    @classmethod
    def execute(cls, motion_model: object, renderer: object, after: object, name: str) -> io.NodeOutput:
        gc.collect()
        alive = (one for one in gc.get_objects() if type(one) is torch.nn.Parameter)
        patchers = [*motion_model.get_models(), *renderer.get_models()]
        held = (parameter for patcher in patchers for parameter in patcher.model.parameters())
        counts = {"alive": _bytes(alive), "held": _bytes(held)}
        np.savez(Path(folder_paths.get_output_directory()) / f"{name}.npz", **counts)
        return io.NodeOutput()


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Of memory that they take, counted once where they share it."""
    storages = (parameter.untyped_storage() for parameter in parameters)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class ProbeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ProbeImage, ProbeReshape, ProbeAudio, ProbeLandmarks, ProbeKeep, ProbeParameters]


async def comfy_entrypoint() -> ProbeExtension:
    return ProbeExtension()
