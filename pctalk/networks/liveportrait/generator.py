"""G, the SPADE generator: the warped feature to the picture, normalised by itself (SPADE, arXiv 1903.07291)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2


class SpectralConv2d(nn.Module):
    """Convolution with a spectrally normalised weight, under the keys that torch.nn.utils.spectral_norm wrote.

    W = weight_orig / (u^T weight_orig v), with the stored u and v.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.weight_orig = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        nn.init.kaiming_uniform_(self.weight_orig, a=5**0.5)
        self.register_buffer("weight_u", torch.ones(outputs))
        self.register_buffer("weight_v", torch.ones(inputs * kernel * kernel))
        self.power_iteration(5)

    @torch.no_grad()
    def power_iteration(self, rounds: int) -> None:
        """Set u and v to the leading singular vectors of the weight, starting from u = ones."""
        matrix = self.weight_orig.flatten(1).double()
        u = F.normalize(torch.ones_like(matrix[:, 0]), dim=0)
        for _ in range(rounds):
            v = F.normalize(matrix.T @ u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)

    def weight(self) -> Tensor:
        """The normalised weight [outputs, inputs, kernel, kernel]."""
        sigma = self.weight_u @ (self.weight_orig.flatten(1) @ self.weight_v)
        return self.weight_orig / sigma

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, padding=self.weight_orig.shape[-1] // 2)


class Spade(nn.Module):
    """Instance normalisation whose gain and shift are drawn from a segmentation map, here the warped feature."""

    def __init__(self, channels: int, map_channels: int, hidden: int):
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(map_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        """Args: x [B, C, h, w]; feature [B, C', H, W], resized to x by nearest."""
        hidden = self.mlp_shared(F.interpolate(feature, size=x.shape[2:], mode="nearest"))
        return F.instance_norm(x) * (1.0 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class SpadeBlock(nn.Module):
    """Residual block of two SPADE-normalised convolutions; the shortcut is learned where the width changes."""

    def __init__(self, inputs: int, outputs: int, map_channels: int, hidden: int):
        super().__init__()
        middle = min(inputs, outputs)
        self.conv_0 = SpectralConv2d(inputs, middle, 3)
        self.conv_1 = SpectralConv2d(middle, outputs, 3)
        self.norm_0 = Spade(inputs, map_channels, hidden)
        self.norm_1 = Spade(middle, map_channels, hidden)
        self.learned_shortcut = inputs != outputs
        if self.learned_shortcut:
            self.conv_s = SpectralConv2d(inputs, outputs, 1, bias=False)
            self.norm_s = Spade(inputs, map_channels, hidden)

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, feature)) if self.learned_shortcut else x
        hidden = self.conv_0(F.leaky_relu(self.norm_0(x, feature), SLOPE))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(hidden, feature), SLOPE))


class SpadeGenerator(nn.Module):
    """Warped feature [B, 256, 64, 64] to the picture [B, 3, 512, 512], RGB 0..1.

    Args: inputs: channels of the feature; width: of the six middle blocks; narrow: widths after each doubling; hidden: of
    the SPADE maps. The defaults are the published network.
    """

    def __init__(self, inputs: int = 256, width: int = 512, narrow: tuple[int, int] = (256, 64), hidden: int = 128):
        super().__init__()
        self.fc = nn.Conv2d(inputs, width, 3, padding=1)
        for i in range(MIDDLE_BLOCKS):
            self.add_module(f"G_middle_{i}", SpadeBlock(width, width, inputs, hidden))
        self.up_0 = SpadeBlock(width, narrow[0], inputs, hidden)
        self.up_1 = SpadeBlock(narrow[0], narrow[1], inputs, hidden)
        self.conv_img = nn.Sequential(nn.Conv2d(narrow[1], 3 * 4, 3, padding=1), nn.PixelShuffle(2))

    @property
    def middle(self) -> list[SpadeBlock]:
        return [self.get_submodule(f"G_middle_{i}") for i in range(MIDDLE_BLOCKS)]

    def forward(self, feature: Tensor) -> Tensor:
        x = self.fc(feature)
        for block in self.middle:
            x = block(x, feature)
        x = self.up_0(F.interpolate(x, scale_factor=2, mode="nearest"), feature)
        x = self.up_1(F.interpolate(x, scale_factor=2, mode="nearest"), feature)
        return self.conv_img(F.leaky_relu(x, SLOPE)).sigmoid()


MIDDLE_BLOCKS = 6
