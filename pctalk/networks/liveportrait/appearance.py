"""F, the appearance feature extractor: one source picture to a feature volume."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ConvNorm, ResBlock3d


class AppearanceFeatureExtractor(nn.Module):
    """Picture [B, 3, 256, 256], RGB 0..1, to the volume [B, channels, depth, 64, 64].

    Args: width: channels after the first convolution, doubled twice; channels, depth: of the volume;
    blocks: 3-D residual blocks. The defaults are the published network.
    """

    def __init__(self, width: int = 64, channels: int = 32, depth: int = 16, blocks: int = 6):
        super().__init__()
        self.channels = channels
        self.first = ConvNorm(3, width)
        self.down_blocks = nn.ModuleList([ConvNorm(width, 2 * width), ConvNorm(2 * width, 4 * width)])
        self.second = nn.Conv2d(4 * width, channels * depth, 1)
        self.resblocks_3d = nn.Sequential()
        for i in range(blocks):
            self.resblocks_3d.add_module(f"3dr{i}", ResBlock3d(channels))

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        for block in self.down_blocks:
            x = F.avg_pool2d(block(x), 2)
        volume = self.second(x).unflatten(1, (self.channels, -1))
        return self.resblocks_3d(volume)
