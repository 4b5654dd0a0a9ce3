"""Face mesh: 468 three-dimensional landmarks from an upright face crop (MediaPipe's face landmark model).

Kartynnik et al., Real-time Facial Surface Geometry from Monocular Video on Mobile GPUs, 2019 (arXiv 1907.06724).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .face_detector import BlazeBlock

INPUT_SIZE = 192
NUM_LANDMARKS = 468
STAGES = (16, 32, 64, 128, 128)  # channels at 96, 48, 24, 12 and 6 pixels; every stage has two blocks at its own size


class MeshBlock(BlazeBlock):
    """The same block with PReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, stride, nn.PReLU(out_channels))


def _head(blocks: int, outputs: int) -> nn.Sequential:
    """From [n, 128, 6, 6] to [n, outputs, 1, 1]."""
    channels = STAGES[-1]
    return nn.Sequential(
        MeshBlock(channels, channels, stride=2),
        *(MeshBlock(channels, channels) for _ in range(blocks)),
        nn.Conv2d(channels, 32, 1),
        nn.PReLU(32),
        MeshBlock(32, 32),
        nn.Conv2d(32, outputs, 3),
    )


class FaceMesh(nn.Module):
    """Landmarks of one face, and how sure the network is that the crop shows a face at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STAGES[0], 3, stride=2)
        self.stem_activation = nn.PReLU(STAGES[0])
        blocks: list[nn.Module] = []
        channels = STAGES[0]
        for stage, width in enumerate(STAGES):
            if stage > 0:
                blocks.append(MeshBlock(channels, width, stride=2))
            blocks.extend(MeshBlock(width, width) for _ in range(2))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.landmarks = _head(blocks=2, outputs=NUM_LANDMARKS * 3)
        self.score = _head(blocks=0, outputs=1)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Args: crops [n, 3, 192, 192], RGB in 0..1, the face upright and filling two thirds.

        Returns: landmarks [n, 468, 3] in pixels of the crop (x right, y down, z away from the camera, same unit);
        score [n] in 0..1.
        """
        x = self.stem_activation(self.stem(F.pad(crops, (0, 1, 0, 1))))
        x = self.blocks(x)  # [n, 128, 6, 6]
        landmarks = self.landmarks(x).reshape(-1, NUM_LANDMARKS, 3)
        return landmarks, self.score(x).reshape(-1).sigmoid()
