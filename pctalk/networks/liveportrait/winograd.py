"""3x3 convolutions for CPUs with a quarter of the multiplications: Winograd's F(4x4, 3x3) (Lavin and Gray 2016).

A tile of 4x4 outputs is a polynomial product: inputs and kernel are evaluated at 6x6 points, multiplied there, one matrix
product over channels a point, and interpolated. The points 0, 1, -1, 1/2, -2 and infinity (Barabasz et al. 2020) keep the
error within twice that of the plain convolution in float32. The transformed kernels take four times the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
TILE, TAPS = 4, 3
REACH = TILE + TAPS - 1  # inputs a tile sees
CHUNK = 1 << 21  # numbers transformed at once: what about stays in a core's cache
WORTHWHILE = 80.0  # products per number transformed; below it the transforms take longer than what they save


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Toom-Cook matrices A [4, 6], G [6, 3], B [6, 6] in float64: outputs = A ((G kernel) * (B inputs)).

    Row j of B holds the coefficients of the polynomial with its zeros at every point but point j, G those of evaluation
    divided by that polynomial's value at point j; the last row stands for infinity.
    """
    points = torch.tensor(POINTS, dtype=torch.float64)
    outputs = torch.stack([points**i for i in range(TILE)])
    kernel = torch.stack([points**i for i in range(TAPS)], dim=1)
    inputs = torch.zeros(REACH, REACH, dtype=torch.float64)
    for j in range(REACH):
        zeros = [point for i, point in enumerate(POINTS) if i != j]
        coefficients = torch.ones(1, dtype=torch.float64)
        for zero in zeros:
            coefficients = F.pad(coefficients, (1, 0)) - zero * F.pad(coefficients, (0, 1))
        inputs[j, : len(coefficients)] = coefficients
        if j < len(POINTS):
            kernel[j] /= torch.stack([points[j] - zero for zero in zeros]).prod()
    infinity = torch.eye(max(TILE, TAPS), dtype=torch.float64)
    outputs = torch.cat([outputs, infinity[:TILE, TILE - 1 : TILE]], dim=1)
    kernel = torch.cat([kernel, infinity[TAPS - 1 : TAPS, :TAPS]])
    return outputs, kernel, inputs


def quicker(conv: nn.Module) -> nn.Module:
    """A `WinogradConv` for a convolution that gains by it, anything else as it is."""
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)) or set(conv.kernel_size) != {TAPS}:
        return conv
    slices = conv.kernel_size[0] if isinstance(conv, nn.Conv3d) else 1
    products = conv.in_channels * conv.out_channels * slices / (conv.in_channels + conv.out_channels)
    return WinogradConv(conv) if products > WORTHWHILE else conv


class WinogradConv(nn.Module):
    """The same as a 3x3 or 3x3x3 convolution with padding 1, channels-last, in float32.

    [B, C, (D,) H, W] to [B, C', (D,) H, W]. A third axis is left as it is: its taps are three products that are added.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d):
        super().__init__()
        weight = conv.weight if conv.weight.dim() == 5 else conv.weight[:, :, None]
        outputs, kernel, inputs = transforms()
        transformed = torch.einsum("ay,bx,oidyx->dabio", kernel, kernel, weight.double())
        self.kernels = nn.Parameter(transformed.flatten(1, 2).to(weight.dtype))  # [1 or 3, 36, C, C']
        self.bias = nn.Parameter(conv.bias.detach().clone())
        self.requires_grad_(False)
        self.register_buffer("to_points", torch.kron(inputs, inputs).to(weight.dtype))  # [36, 36]
        self.register_buffer("to_outputs", torch.kron(outputs, outputs).to(weight.dtype))  # [16, 36]

    def forward(self, x: Tensor) -> Tensor:
        slices = x[:, :, None] if x.dim() == 4 else x
        taps, _, channels, outputs = self.kernels.shape
        batch, _, depth, height, width = slices.shape
        rows, columns = -(-height // TILE), -(-width // TILE)
        below, right = rows * TILE - height + 1, columns * TILE - width + 1
        padded = F.pad(slices.permute(0, 2, 3, 4, 1), (0, 0, 1, right, 1, below, taps // 2, taps // 2))
        out = x.new_empty(batch, depth, rows, TILE, columns, TILE, outputs)
        together = max(1, CHUNK // (self.to_points.shape[0] * depth * columns * max(channels, outputs)))
        for image, drawn in zip(padded, out, strict=True):
            tiles = image.unfold(1, REACH, TILE).unfold(2, REACH, TILE).permute(4, 5, 0, 1, 2, 3)  # [6, 6, D, rows, columns, C]
            for start in range(0, rows, together):
                chunk = tiles[:, :, :, start : start + together]
                points = (self.to_points @ chunk.reshape(REACH * REACH, -1)).view(REACH * REACH, depth + taps - 1, -1, channels)
                product = torch.bmm(points[:, :depth].flatten(1, 2), self.kernels[0])
                for tap in range(1, taps):
                    product.baddbmm_(points[:, tap : tap + depth].flatten(1, 2), self.kernels[tap])
                values = (self.to_outputs @ product.flatten(1)).view(TILE, TILE, depth, -1, columns, outputs)
                torch.add(values.permute(2, 3, 0, 4, 1, 5), self.bias, out=drawn[:, start : start + together])
        result = out.flatten(4, 5).flatten(2, 3)[:, :, :height, :width].permute(0, 4, 1, 2, 3)
        return result[:, :, 0] if x.dim() == 4 else result
