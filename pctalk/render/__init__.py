"""Renderers turn a portrait and keypoints into frames; all of them speak the one keypoint space.

A renderer is two calls: `extract` looks at a picture once, `render` draws any motion from what it saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..faces import Crop
from ..keypoints import Keypoints


@dataclass(frozen=True)
class Portrait:
    """What a renderer keeps of the source pictures.

    renderer: the name of the renderer that made it; frames: source pictures uint8 [N, H, W, 3], N = 1 for a still;
    crops: one per source frame; features: the renderer's own tensors (identity features, textures, geometry).
    """

    renderer: str
    frames: Tensor
    crops: tuple[Crop, ...]
    features: dict[str, Tensor]

    def check_made_by(self, renderer: str) -> None:
        """Raises ValueError when another renderer extracted this portrait."""
        if self.renderer != renderer:
            raise ValueError(
                f"This portrait was extracted by the {self.renderer!r} renderer, the {renderer!r} renderer can't draw it: "
                "connect the same renderer to Extract Keypoints and to Warp and Decode."
            )


class Chunk(NamedTuple):
    """Some consecutive rendered frames.

    frames uint8 [b, H, W, 3], the crop at 512 x 512 or the whole picture when pasted back; mask float [b, H, W] in
    0..1, where the picture was redrawn.
    """

    frames: Tensor
    mask: Tensor


class Renderer(Protocol):
    """name: as in the loader's list; networks: what ComfyUI's model management may move between devices."""

    name: str
    networks: dict[str, nn.Module]

    def working_memory(self, device: torch.device, batch: int = 0) -> int:
        """About how many bytes of a device drawing takes beside the networks, `batch` frames (0: its choice) at once."""
        ...

    def extract(
        self, images: Tensor, *, face_index: int = 0, crop_scale: float = 2.3, landmarks: list | None = None
    ) -> tuple[Portrait, Keypoints]:
        """Find the face and read its keypoints.

        Args: images float 0..1 [N, H, W, 3 or 4 or 1] (ComfyUI's IMAGE); face_index: 0 is the largest face;
        landmarks: per frame [478 or 468, 2] pixels to use instead of looking for the face.
        Returns: portrait and keypoints, N = 1 a still. Raises ValueError with a remedy when no face is found.
        """
        ...

    def render(
        self, portrait: Portrait, keypoints: Keypoints, *, paste_back: bool = True, stitching: bool = True, batch: int = 0
    ) -> Iterator[Chunk]:
        """Draw every frame of a track, in chunks of `batch` frames (0: the renderer's choice), memory bounded."""
        ...
