"""Face detector: BlazeFace with 256 x 256 input (MediaPipe's "back camera" model), six keypoints a face.

Bazarevsky et al., BlazeFace: Sub-millisecond Neural Face Detection on Mobile GPUs, 2019 (arXiv 1907.05047).
Batch normalisation is folded into the convolutions, as in the published file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 256
STAGES = (24, 24, 48, 96)  # channels at 128, 64, 32 and 16 pixels; every stage has seven blocks at its own size
BLOCKS = 7
ANCHORS = ((16, 2), (8, 6))  # grid size, anchors per cell
VALUES = 16  # centre, size, six keypoints


class BlazeBlock(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 around a shortcut; stride 2 pools the shortcut, new channels start from zero.

    activation: of the sum (default ReLU).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, activation: nn.Module | None = None):
        super().__init__()
        # The published network pads "SAME": an even input at stride 2 is padded on the right and bottom only.
        padding = 1 if stride == 1 else 0
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding, groups=in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)
        self.activation = activation or nn.ReLU()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride == 2:
            shortcut = F.max_pool2d(x, 2)
            x = F.pad(x, (0, 1, 0, 1))
        x = self.pointwise(self.depthwise(x))
        new_channels = x.shape[1] - shortcut.shape[1]
        if new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, new_channels))
        return self.activation(x + shortcut)


class FaceDetector(nn.Module):
    """Scores and boxes of 896 anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STAGES[0], 5, stride=2)
        blocks: list[nn.Module] = []
        channels = STAGES[0]
        for stage, width in enumerate(STAGES):
            if stage > 0:
                blocks.append(BlazeBlock(channels, width, stride=2))
            blocks.extend(BlazeBlock(width, width) for _ in range(BLOCKS))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.final_depthwise = nn.Conv2d(channels, channels, 3, stride=2, groups=channels)
        self.final_pointwise = nn.Conv2d(channels, channels, 1)
        self.boxes = nn.ModuleList(nn.Conv2d(channels, anchors * VALUES, 1) for _, anchors in ANCHORS)
        self.scores = nn.ModuleList(nn.Conv2d(channels, anchors, 1) for _, anchors in ANCHORS)
        self.register_buffer("anchors", anchor_centres(), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Args: images [n, 3, 256, 256], RGB in -1..1.

        Returns: scores [n, 896] in 0..1; points [n, 896, 8, 2] as fractions of the image: centre, size (width, height),
        image-left eye, image-right eye, nose tip, mouth, image-left and image-right ear.
        """
        x = F.relu(self.stem(F.pad(images, (1, 2, 1, 2))))
        fine = self.blocks(x)  # [n, 96, 16, 16]
        coarse = F.relu(self.final_pointwise(self.final_depthwise(F.pad(fine, (0, 1, 0, 1)))))  # [n, 96, 8, 8]
        levels = (fine, coarse)
        scores = torch.cat([self._per_anchor(head(x), 1) for head, x in zip(self.scores, levels, strict=True)], dim=1)
        values = torch.cat([self._per_anchor(head(x), VALUES) for head, x in zip(self.boxes, levels, strict=True)], dim=1)
        points = values.unflatten(2, (VALUES // 2, 2)) / INPUT_SIZE
        offset = torch.ones_like(points[:1, :1, :, :1])
        offset[:, :, 1] = 0.0  # the size is no position
        return scores.squeeze(2).sigmoid(), points + offset * self.anchors[:, None]

    @staticmethod
    def _per_anchor(x: Tensor, values: int) -> Tensor:
        """[n, anchors * values, h, w] to [n, h * w * anchors, values]."""
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)


def anchor_centres() -> Tensor:
    """Centres of the anchors as fractions of the image, row by row: [896, 2]."""
    centres = []
    for size, anchors in ANCHORS:
        axis = (torch.arange(size) + 0.5) / size
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).reshape(-1, 2).repeat_interleave(anchors, dim=0))
    return torch.cat(centres)
