"""The nodes a creator sees, one file a topic. They check inputs, call pctalk and report progress; the work is done there."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..pctalk.weights import SUFFIXES
from .deform import AddDeformations, EMCDeform, LACDeform, RegionEmotionMix
from .loaders import LoadMotionModel, LoadRenderer
from .portrait import KeypointExtract, WarpDecode
from .speech import EncodeSpeech
from .views import DrawKeypoints, PlotDeformation

MODEL_FOLDERS = ("pctalk", "liveportrait")


class PCTalkExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_model_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadMotionModel,
            LoadRenderer,
            KeypointExtract,
            EncodeSpeech,
            LACDeform,
            EMCDeform,
            RegionEmotionMix,
            AddDeformations,
            WarpDecode,
            DrawKeypoints,
            PlotDeformation,
        ]


def register_model_folders() -> None:
    """models/pctalk and models/liveportrait, beside what extra_model_paths.yaml or another pack put there before."""
    for name in MODEL_FOLDERS:
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        folders, extensions = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (folders, {*extensions, *SUFFIXES})
