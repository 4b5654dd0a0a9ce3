"""Load a motion model or a renderer. Both are kept on a link as a handle that ComfyUI's model management can move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..pctalk.checkpoints import LIVEPORTRAIT_FOLDERS, load_motion_model, missing_liveportrait, missing_sentence
from ..pctalk.render.liveportrait import PRECISIONS, LivePortraitRenderer, chosen_dtype
from ..pctalk.render.mesh import MeshRenderer
from ..pctalk.weights import SUFFIXES
from .host import Handle, run_device
from .sockets import CATEGORY, PACK_NAMES, MotionModelSocket, RendererSocket

STARTER = "starter"
MESH = "mesh"


def _folders(kind: str) -> Iterator[Path]:
    """The registered folders of a kind of model, each followed by those in it."""
    for root in map(Path, folder_paths.get_folder_paths(kind)):
        if root.is_dir():
            yield from (root, *sorted(path for path in root.iterdir() if path.is_dir()))


def motion_model_folders() -> dict[str, Path]:
    """Every folder with weights in models/pctalk, by the name that the list shows: that of the folder."""
    found: dict[str, Path] = {}
    for folder in _folders("pctalk"):
        if _weights(folder):
            found.setdefault(folder.name, folder)
    return found


def liveportrait_folders() -> dict[str, Path]:
    """Every folder in models/liveportrait that has all of LivePortrait's files, itself included, by its name."""
    found: dict[str, Path] = {}
    for folder in _folders("liveportrait"):
        if folder.name != MESH and not missing_liveportrait(folder):
            found.setdefault(folder.name, folder)
    return found


def expected_folder(name: str) -> Path:
    """Where the files of a renderer that isn't complete belong: in models/liveportrait or the folder of that name in it."""
    roots = map(Path, folder_paths.get_folder_paths("liveportrait"))
    places = [root if name == root.name else root / Path(name).name for root in roots]
    return next((place for place in places if place.is_dir()), places[0])


def _weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file is replaced."""
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]


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
                    "hold audio_encoder, lac and emc (and, if you have it, style_encoder) as .safetensors or .pth.",
                )
            ],
            outputs=[MotionModelSocket.Output(display_name="motion_model", tooltip="For Encode Speech, LAC and EMC.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str) -> list[tuple[str, int, int]]:
        """Load again when a file of the folder was replaced."""
        folder = motion_model_folders().get(model)
        return _stamps(_weights(folder)) if folder else []

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
                    options=[MESH, *liveportrait_folders()],
                    default=MESH,
                    tooltip="mesh ships with PC-Talk, needs no download and runs in real time on a laptop's CPU. Other entries "
                    "are folders with all of LivePortrait's files: models/liveportrait, or folders in it. They draw best and "
                    "want a GPU.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *PRECISIONS],
                    default="auto",
                    advanced=True,
                    tooltip="Of LivePortrait's drawing. auto: fp16 on CUDA, fp32 on CPU and MPS. fp16 needs a GPU; bf16 is "
                    "quicker than fp32 where the processor has it, and less exact than fp16. mesh always computes in fp32.",
                ),
            ],
            outputs=[RendererSocket.Output(display_name="renderer", tooltip="For Extract Keypoints and Warp and Decode.")],
        )

    @classmethod
    def validate_inputs(cls, renderer: str | None = None, precision: str | None = None) -> bool | str:
        """Takes the place of ComfyUI's own check of both lists; None is what a link will bring."""
        if precision not in (None, "auto", *PRECISIONS):
            return f"There is no precision {precision}: choose auto, {', '.join(PRECISIONS)}."
        if renderer is None:
            return True
        if renderer == MESH:
            if precision not in (None, "auto", "fp32"):
                return f"The mesh renderer computes in fp32, not {precision}: choose auto or fp32."
            return True
        if renderer not in liveportrait_folders():
            return missing_sentence(expected_folder(renderer))
        try:
            chosen_dtype(precision or "auto", run_device())
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, renderer: str, precision: str) -> list[tuple[str, int, int]]:
        """Load again when a file of the folder was replaced."""
        folder = liveportrait_folders().get(renderer)
        if folder is None:
            return []
        return _stamps(file for part in LIVEPORTRAIT_FOLDERS for file in _weights(folder / part))

    @classmethod
    def execute(cls, renderer: str, precision: str) -> io.NodeOutput:
        if renderer == MESH:
            loaded = MeshRenderer.from_assets()
        else:
            device = run_device()
            folder = liveportrait_folders().get(renderer) or expected_folder(renderer)
            loaded = LivePortraitRenderer.from_folder(folder, chosen_dtype(precision, device), device)
        return io.NodeOutput(Handle.of(loaded, loaded.networks))
