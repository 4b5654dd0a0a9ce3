"""Blocks that the LivePortrait networks share: convolution + BatchNorm, 3-D residual block, pooling, sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """Convolution (same size), BatchNorm, leaky ReLU (slope 0 is ReLU), over [B, C, H, W] or [B, C, D, H, W]."""

    def __init__(self, inputs: int, outputs: int, *, dims: int = 2, kernel: int = 3, slope: float = 0.0):
        super().__init__()
        convolution, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
        self.conv = convolution(inputs, outputs, kernel, padding=kernel // 2)
        self.norm = norm(outputs)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), self.slope)


class ResBlock3d(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), [B, C, D, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(hidden)))


def halve_plane(x: Tensor) -> Tensor:
    """Average pool of (1, 2, 2): [B, C, D, H, W] to [B, C, D, H / 2, W / 2].

    Pooled as [B, C * D, H, W]: CPUs have no avg_pool3d for bfloat16.
    """
    return F.avg_pool2d(x.flatten(1, 2), 2).unflatten(1, x.shape[1:3])


def double_plane(x: Tensor) -> Tensor:
    """Nearest upsampling by (1, 2, 2): [B, C, D, H, W] to [B, C, D, 2 H, 2 W]."""
    return F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")


def identity_grid(depth: int, height: int, width: int, device: torch.device) -> Tensor:
    """Coordinates (x, y, z) of a volume's voxels from -1 to 1, ends included: [D, H, W, 3] float32."""
    axes = (torch.linspace(-1.0, 1.0, size, device=device) for size in (depth, height, width))
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y, z], dim=-1)


def sample_volume(volume: Tensor, grid: Tensor) -> Tensor:
    """Trilinear samples of a volume, zeros outside, pixel corners at +-1 (align_corners=False).

    Args: volume [B, C, D, H, W]; grid [B, d, h, w, 3] float32, last axis (x, y, z).
    Returns: [B, C, d, h, w] in the volume's precision; positions are always resolved in float32.
    """
    sampled = _gather_volume if volume.device.type == "mps" else _grid_sample
    return sampled(volume.float(), grid).to(volume.dtype)


def _grid_sample(volume: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(volume, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _gather_volume(volume: Tensor, grid: Tensor) -> Tensor:
    """`_grid_sample` by eight gathers, for devices without grid_sampler_3d (MPS)."""
    batch, channels, *size = volume.shape
    flat = volume.flatten(2)
    low, weight = [], []
    for axis, length in zip(grid.unbind(-1), reversed(size), strict=True):
        position = ((axis + 1.0) * length - 1.0) / 2.0
        low.append(position.floor())
        weight.append(position - position.floor())
    result = volume.new_zeros(batch, channels, grid[0, ..., 0].numel())
    for corner in range(8):
        index = torch.zeros_like(low[0], dtype=torch.long)
        factor = torch.ones_like(weight[0])
        for axis, stride in ((2, size[1] * size[2]), (1, size[2]), (0, 1)):
            step = corner >> axis & 1
            place = low[axis] + step
            length = size[2 - axis]
            factor = factor * (weight[axis] if step else 1.0 - weight[axis]) * ((place >= 0) & (place < length))
            index = index + place.clamp(0, length - 1).long() * stride
        values = flat.gather(2, index.flatten(1)[:, None].expand(-1, channels, -1))
        result += values * factor.flatten(1)[:, None]
    return result.unflatten(2, grid.shape[1:4])
