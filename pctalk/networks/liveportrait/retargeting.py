"""Stitching S and the lip and eye retargeting: small networks that correct driving keypoints."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...keypoints import NUM_KEYPOINTS

COORDINATES = 3 * NUM_KEYPOINTS


class OffsetNetwork(nn.Module):
    """Linear layers with ReLU between them: [B, inputs] to [B, outputs]."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int):
        super().__init__()
        sizes = (inputs, *hidden, outputs)
        layers = []
        for size, next_size in pairwise(sizes):
            layers += [nn.Linear(size, next_size), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class StitchingRetargeting(nn.Module):
    """The three networks of one published file, under its keys."""

    def __init__(self):
        super().__init__()
        self.retarget_shoulder_module = OffsetNetwork(2 * COORDINATES, (128, 128, 64), COORDINATES + 2)
        self.retarget_mouth_module = OffsetNetwork(COORDINATES + 2, (128, 128, 64), COORDINATES)
        self.retarget_eye_module = OffsetNetwork(COORDINATES + 3, (256, 256, 128, 128, 64), COORDINATES)

    def stitch(self, source: Tensor, driving: Tensor) -> Tensor:
        """Driving keypoints whose shoulders and neck stay where the source has them.

        Args: source K_s, driving K_d, each [B, 21, 3]. Returns: [B, 21, 3].
        """
        raw = self.retarget_shoulder_module(torch.cat([source.flatten(1), driving.flatten(1)], dim=1))
        offsets, shift = raw.split([COORDINATES, 2], dim=1)
        return driving + offsets.unflatten(1, (NUM_KEYPOINTS, 3)) + F.pad(shift, (0, 1))[:, None]

    def lip_offsets(self, source: Tensor, openness: Tensor) -> Tensor:
        """Offsets that open the source's lips.

        Args: source K_s [B, 21, 3]; openness [B, 2], the lips' height over width now and wanted. Returns: [B, 21, 3].
        """
        raw = self.retarget_mouth_module(torch.cat([source.flatten(1), openness], dim=1))
        return raw.unflatten(1, (NUM_KEYPOINTS, 3))

    def eye_offsets(self, source: Tensor, openness: Tensor) -> Tensor:
        """Offsets that open the source's eyes.

        Args: source K_s [B, 21, 3]; openness [B, 3], height over width of the left and right eye now, and wanted.
        Returns: [B, 21, 3].
        """
        raw = self.retarget_eye_module(torch.cat([source.flatten(1), openness], dim=1))
        return raw.unflatten(1, (NUM_KEYPOINTS, 3))
