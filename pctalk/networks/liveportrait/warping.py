"""W, the warping module: the source's feature volume, moved from source to driving keypoints and flattened."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...keypoints import NUM_KEYPOINTS
from .blocks import ConvNorm, double_plane, halve_plane, identity_grid, sample_volume

HEATMAP_VARIANCE = 0.01
MOTIONS = NUM_KEYPOINTS + 1  # one a keypoint, and the background's, which stands still


class Warp(NamedTuple):
    """feature [B, 256, 64, 64] to draw; occlusion [B, 1, 64, 64] in 0..1; deformation [B, 16, 64, 64, 3] grid positions."""

    feature: Tensor
    occlusion: Tensor
    deformation: Tensor


class Encoder(nn.Module):
    def __init__(self, widths: list[int]):
        super().__init__()
        self.down_blocks = nn.ModuleList(ConvNorm(narrow, wide, dims=3) for narrow, wide in pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [x]
        for block in self.down_blocks:
            levels.append(halve_plane(block(levels[-1])))
        return levels


class Decoder(nn.Module):
    def __init__(self, widths: list[int], expansion: int):
        super().__init__()
        self.up_blocks = nn.ModuleList()
        inputs = widths[-1]
        for skip, outputs in zip(widths[-2::-1], [*widths[-2:0:-1], expansion], strict=True):
            self.up_blocks.append(ConvNorm(inputs, outputs, dims=3))
            inputs = outputs + skip
        self.out_channels = inputs
        self.conv = nn.Conv3d(inputs, inputs, 3, padding=1)
        self.norm = nn.BatchNorm3d(inputs)

    def forward(self, levels: list[Tensor]) -> Tensor:
        x = levels[-1]
        for block, skip in zip(self.up_blocks, levels[-2::-1], strict=True):
            x = torch.cat([block(double_plane(x)), skip], dim=1)
        return F.relu(self.norm(self.conv(x)))


class Hourglass(nn.Module):
    """U-Net over [B, C, D, H, W] that halves and doubles the plane only; `blocks` levels, widths up to `widest`."""

    def __init__(self, inputs: int, expansion: int, blocks: int, widest: int):
        super().__init__()
        widths = [inputs] + [min(widest, expansion * 2 ** (i + 1)) for i in range(blocks)]
        self.encoder = Encoder(widths)
        self.decoder = Decoder(widths, expansion)
        self.out_channels = self.decoder.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class DenseMotionNetwork(nn.Module):
    """Dense motion from sparse: which keypoint's shift each voxel follows, and what was hidden in the source."""

    def __init__(self, channels: int, depth: int, compressed: int, expansion: int, blocks: int, widest: int):
        super().__init__()
        self.compress = nn.Conv3d(channels, compressed, 1)
        self.norm = nn.BatchNorm3d(compressed)
        self.hourglass = Hourglass(MOTIONS * (1 + compressed), expansion, blocks, widest)
        wide = self.hourglass.out_channels
        self.mask = nn.Conv3d(wide, MOTIONS, 7, padding=3)
        self.occlusion = nn.Conv2d(wide * depth, 1, 7, padding=3)

    def forward(self, volume: Tensor, source: Tensor, driving: Tensor) -> tuple[Tensor, Tensor]:
        """Args: volume [B, C, D, H, W]; source, driving [B, 21, 3]. Returns: deformation, occlusion (see `Warp`)."""
        grid = identity_grid(*volume.shape[2:], device=volume.device)
        motions = sparse_motions(grid, source, driving)  # [B, 22, D, H, W, 3]
        small = F.relu(self.norm(self.compress(volume)))
        repeated = small[:, None].expand(-1, MOTIONS, -1, -1, -1, -1).flatten(0, 1)
        moved = sample_volume(repeated, motions.flatten(0, 1)).unflatten(0, (-1, MOTIONS))
        heat = gaussian_heatmaps(grid, driving) - gaussian_heatmaps(grid, source)
        heat = F.pad(heat, (0, 0) * 3 + (1, 0))  # the background has none
        x = torch.cat([heat[:, :, None].to(moved.dtype), moved], dim=2).flatten(1, 2)  # [B, 22 * 5, D, H, W]
        x = self.hourglass(x)
        shares = self.mask(x).float().softmax(dim=1)  # [B, 22, D, H, W]
        deformation = (motions * shares[..., None]).sum(dim=1)
        occlusion = self.occlusion(x.flatten(1, 2)).sigmoid()
        return deformation, occlusion


class WarpingModule(nn.Module):
    """Volume [B, 32, 16, 64, 64] and keypoints to `Warp`.

    Args: channels, depth: of the volume; compressed: channels sampled once a motion; expansion, blocks, widest: of the
    hourglass; outputs: channels of the warped feature. The defaults are the published network.
    """

    def __init__(
        self,
        channels: int = 32,
        depth: int = 16,
        compressed: int = 4,
        expansion: int = 32,
        blocks: int = 5,
        widest: int = 1024,
        outputs: int = 256,
    ):
        super().__init__()
        self.dense_motion_network = DenseMotionNetwork(channels, depth, compressed, expansion, blocks, widest)
        self.third = ConvNorm(channels * depth, outputs, slope=0.01)
        self.fourth = nn.Conv2d(outputs, outputs, 1)

    def forward(self, volume: Tensor, source: Tensor, driving: Tensor) -> Warp:
        """Args: volume [B, 32, 16, 64, 64] of F; source, driving: K [B, 21, 3] float32."""
        deformation, occlusion = self.dense_motion_network(volume, source, driving)
        moved = sample_volume(volume, deformation).flatten(1, 2)
        return Warp(self.fourth(self.third(moved)) * occlusion, occlusion, deformation)


def sparse_motions(grid: Tensor, source: Tensor, driving: Tensor) -> Tensor:
    """Where each motion looks in the source volume: the grid itself, then the grid shifted by each keypoint.

    Args: grid [D, H, W, 3]; source, driving [B, 21, 3]. Returns: [B, 22, D, H, W, 3].
    """
    shift = F.pad(source - driving, (0, 0, 1, 0))
    return grid + shift[:, :, None, None, None]


def gaussian_heatmaps(grid: Tensor, keypoints: Tensor) -> Tensor:
    """exp(-|grid - keypoint|^2 / (2 variance)): grid [D, H, W, 3], keypoints [B, 21, 3] to [B, 21, D, H, W]."""
    distance = (grid - keypoints[:, :, None, None, None]).square().sum(dim=-1)
    return torch.exp(-0.5 / HEATMAP_VARIANCE * distance)
