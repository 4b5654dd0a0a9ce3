"""M, the motion extractor: one picture to canonical keypoints, head pose and expression.

The backbone is ConvNeXt V2-tiny (arXiv 2301.00808).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...keypoints import NUM_KEYPOINTS

ANGLE_BINS = 66


class Motion(NamedTuple):
    """What M reads from a picture, before scale: K = scale (canonical R(pitch, yaw, roll) + expression) + translation.

    canonical, expression [B, 21, 3]; pitch, yaw, roll [B] in degrees; translation [B, 3]; scale [B].
    """

    canonical: Tensor
    pitch: Tensor
    yaw: Tensor
    roll: Tensor
    translation: Tensor
    expression: Tensor
    scale: Tensor


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2 over [B, H, W, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, x, self.gamma * response + 1.0)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, 4x wide MLP with global response normalisation, residual: [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        hidden = self.pwconv2(self.grn(F.gelu(self.pwconv1(hidden))))
        return x + hidden.permute(0, 3, 1, 2)


class ConvNeXtV2(nn.Module):
    """Backbone and heads: [B, 3, H, W] to raw head outputs, angles as logits over 66 bins."""

    def __init__(self, depths: Sequence[int], dims: Sequence[int]):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), ChannelNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in pairwise(dims):
            layer = nn.Sequential(ChannelNorm(narrow, eps=1e-6), nn.Conv2d(narrow, wide, 2, stride=2))
            self.downsample_layers.append(layer)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(depth))) for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        heads = {
            "kp": 3 * NUM_KEYPOINTS,
            "scale": 1,
            "pitch": ANGLE_BINS,
            "yaw": ANGLE_BINS,
            "roll": ANGLE_BINS,
            "t": 3,
            "exp": 3 * NUM_KEYPOINTS,
        }
        self.heads = tuple(heads)
        for name, size in heads.items():
            self.add_module(f"fc_{name}", nn.Linear(dims[-1], size))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = image
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        x = self.norm(x.mean(dim=(2, 3)))
        return {name: self.get_submodule(f"fc_{name}")(x) for name in self.heads}


class MotionExtractor(nn.Module):
    """Picture [B, 3, 256, 256], RGB 0..1, to `Motion`. The defaults are the published network."""

    def __init__(self, depths: Sequence[int] = (3, 3, 9, 3), dims: Sequence[int] = (96, 192, 384, 768)):
        super().__init__()
        self.detector = ConvNeXtV2(depths, dims)

    def forward(self, image: Tensor) -> Motion:
        raw = {name: value.float() for name, value in self.detector(image).items()}
        return Motion(
            canonical=raw["kp"].unflatten(1, (NUM_KEYPOINTS, 3)),
            pitch=decode_angle(raw["pitch"]),
            yaw=decode_angle(raw["yaw"]),
            roll=decode_angle(raw["roll"]),
            translation=raw["t"],
            expression=raw["exp"].unflatten(1, (NUM_KEYPOINTS, 3)),
            scale=raw["scale"][:, 0],
        )


def decode_angle(logits: Tensor) -> Tensor:
    """Expected angle in degrees of logits over 66 bins, 3 degrees each from -97.5: [B, 66] to [B]."""
    bins = torch.arange(ANGLE_BINS, device=logits.device, dtype=logits.dtype)
    return (logits.softmax(dim=1) * bins).sum(dim=1) * 3.0 - 97.5
