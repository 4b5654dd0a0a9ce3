"""One ComfyUI server for all tests of the session, and the media that they feed it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import comfyui_server
import numpy as np
import pytest
import workflow
from workflow import PACK

PROBES = Path(__file__).with_name("probe_nodes")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[comfyui_server.Server]:
    """A running ComfyUI with PC-Talk and the probe nodes."""
    base = tmp_path_factory.mktemp("comfyui")
    try:
        running = comfyui_server.Server(comfyui_server.install(), base, {"comfyui-pctalk": PACK, "probe_nodes": PROBES})
    except comfyui_server.Unavailable as reason:
        if os.environ.get("PCTALK_REQUIRE_COMFYUI") == "1":
            raise
        pytest.skip(str(reason))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    return server.get("/object_info")


@pytest.fixture(scope="session")
def media(server) -> Path:
    """The server's input folder, with the example portrait and speech under the names that the examples use."""
    folder = server.base / "input"
    put_media(folder)
    return folder


def put_media(folder: Path) -> None:
    for name in ("portrait.jpg", "speech.flac"):
        shutil.copy(PACK / "web" / "examples" / name, folder / f"pctalk_{name}")


@pytest.fixture
def input_without_media(media) -> Iterator[Path]:
    for file in media.glob("pctalk_*"):
        file.unlink()
    yield media
    put_media(media)


@pytest.fixture(scope="session")
def example(object_info, media) -> Callable[[str], dict]:
    """An example workflow as the server takes it."""
    return lambda name: workflow.to_prompt(workflow.saved(name), object_info)


@pytest.fixture
def chain(media) -> Callable[..., dict]:
    """A short graph from portrait and sound to frames, whose parts a test replaces by name."""

    def build(**parts: dict) -> dict:
        def node(class_type: str, **inputs: object) -> dict:
            return {"class_type": class_type, "inputs": inputs}

        speaking = {"motion_model": ["model", 0], "speech": ["speech", 0], "keypoints": ["portrait", 1]}
        articulation = {"pursing": 1.0, "widening": 1.0, "opening": 1.0, "lips": "replace", "smoothing": True}
        prompt = {
            "model": node("PCTalk_LoadMotionModel", model="starter"),
            "renderer": node("PCTalk_LoadRenderer", renderer="mesh", precision="auto"),
            "image": node("LoadImage", image="pctalk_portrait.jpg"),
            "audio": node("ProbeAudio", kind="tone", seconds=0.4, sample_rate=16000, channels=1),
            "portrait": node(
                "PCTalk_KeypointExtract", renderer=["renderer", 0], image=["image", 0], face_index=0, crop_scale=2.3
            ),
            "speech": node("PCTalk_EncodeSpeech", motion_model=["model", 0], audio=["audio", 0]),
            "lips": node("PCTalk_LACDeform", **speaking, **articulation, style_id=0, amplitude=1.0, follow_loudness=0.0),
            "emotion": node("PCTalk_EMCDeform", **speaking, emotion="happy", intensity=0.5, region="all"),
            "sum": node(
                "PCTalk_AddDeformations",
                **{"keypoints": ["portrait", 1], "rows": "2", "rows.gain_1": 1.0, "rows.gain_2": 1.0},
                **{"rows.deformation_1": ["lips", 0], "rows.deformation_2": ["emotion", 0]},
            ),
            "frames": node(
                "PCTalk_WarpDecode",
                **{"renderer": ["renderer", 0], "portrait": ["portrait", 0], "keypoints": ["sum", 0]},
                **{"fps": 25.0, "paste_back": True, "stitching": True, "batch": 0},
            ),
            "keep": node("ProbeKeep", value=["frames", 0], name="frames"),
        }
        for name, change in parts.items():
            if "class_type" in change:
                prompt[name] = change
            else:
                prompt[name]["inputs"].update(change)
        return prompt

    return build


@pytest.fixture
def kept(server) -> Callable[[dict, str], dict]:
    """Run a graph and read what its ProbeKeep wrote."""

    def run(prompt: dict, name: str = "frames") -> dict:
        file = server.base / "output" / f"{name}.npz"
        file.unlink(missing_ok=True)
        server.run(prompt)
        with np.load(file) as arrays:
            return dict(arrays)

    return run
