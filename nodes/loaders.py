"""Load a motion model or a renderer. Both are kept on a link as a handle that ComfyUI's model management can move."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..pctalk.checkpoints import load_motion_model
from ..pctalk.render.mesh import MeshRenderer
from .host import Handle
from .sockets import CATEGORY, PACK_NAMES, MotionModelSocket, RendererSocket

STARTER = "starter"
MESH = "mesh"


def motion_model_folders() -> dict[str, Path]:
    """Every folder with weights in models/pctalk, by the name that the list shows: that of the folder."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths("pctalk")):
        if root.is_dir():
            for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
                if any(folder.glob("*.safetensors")):
                    found.setdefault(folder.name, folder)
    return found


class LoadMotionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_LoadMotionModel",
            display_name="Load PC-Talk Motion Model",
            category=CATEGORY,
            description="Loads the networks that turn speech into lip motion (LAC) and into emotions (EMC).",
            search_aliases=[*PACK_NAMES, "talking head", "lip sync model", "LAC", "EMC"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[STARTER, *motion_model_folders()],
                    default=STARTER,
                    tooltip="starter ships with PC-Talk and needs no download. Other entries are folders in models/pctalk that "
                    "hold audio_encoder, lac and emc (and, if you have it, style_encoder) as .safetensors.",
                )
            ],
            outputs=[MotionModelSocket.Output(display_name="motion_model", tooltip="For Encode Speech, LAC and EMC.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str) -> list[tuple[str, int, int]]:
        """Load again when a file of the folder was replaced."""
        folder = motion_model_folders().get(model)
        files = sorted(folder.glob("*.safetensors")) if folder else []
        return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        loaded = load_motion_model() if model == STARTER else load_motion_model(motion_model_folders()[model], name=model)
        return io.NodeOutput(Handle.of(loaded, loaded.networks))


class LoadRenderer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_LoadRenderer",
            display_name="Load Portrait Renderer",
            category=CATEGORY,
            description="Loads what reads keypoints from a portrait and draws the portrait with other keypoints.",
            search_aliases=[*PACK_NAMES, "liveportrait", "face mesh", "portrait animation"],
            inputs=[
                io.Combo.Input(
                    "renderer",
                    options=[MESH],
                    default=MESH,
                    tooltip="mesh ships with PC-Talk, needs no download and runs in real time on a laptop's CPU.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", "fp32", "fp16", "bf16"],
                    default="auto",
                    advanced=True,
                    tooltip="auto takes what is best for the renderer on this device. mesh always computes in fp32.",
                ),
            ],
            outputs=[RendererSocket.Output(display_name="renderer", tooltip="For Extract Keypoints and Warp and Decode.")],
        )

    @classmethod
    def validate_inputs(cls, renderer: str, precision: str) -> bool | str:
        if renderer == MESH and precision not in ("auto", "fp32"):
            return f"The mesh renderer computes in fp32, not {precision}: choose auto or fp32."
        return True

    @classmethod
    def execute(cls, renderer: str, precision: str) -> io.NodeOutput:
        loaded = MeshRenderer.from_assets()
        return io.NodeOutput(Handle.of(loaded, loaded.networks))
