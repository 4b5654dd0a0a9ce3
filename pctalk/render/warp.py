"""Warping a picture by scattered displacements: splines, their inverse, sampling.

Positions are crop pixels, (0, 0) at the outer corner of the first pixel. A displacement field is known forward, where a
source point goes; drawing needs it backward, where a drawn pixel comes from, so `pull_back` inverts it on a coarse lattice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INVERSION_STEPS = 8
RELAXATION = 0.7  # converges for fields that compress by up to 1 - 0.6 and stretch by up to 1 + 1.5


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, with a continuous slope between."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def spline_weights(controls: Tensor, points: Tensor, smoothing: float = 1e-4) -> Tensor:
    """Thin-plate interpolation as one matrix: values at `points` = weights @ values at `controls`.

    Args: controls [n, 2], points [g, 2], both float64; smoothing: how far values may be missed, relative.
    Returns: [g, n] float64.
    """
    origin, unit = controls.mean(dim=0), controls.std()
    controls, points = (controls - origin) / unit, (points - origin) / unit
    count = len(controls)
    system = controls.new_zeros(count + 3, count + 3)
    system[:count, :count] = _thin_plate(controls, controls) + smoothing * torch.eye(count, dtype=controls.dtype)
    system[:count, count:] = _affine(controls)
    system[count:, :count] = _affine(controls).T
    evaluate = torch.cat([_thin_plate(points, controls), _affine(points)], dim=1)
    return evaluate @ torch.linalg.inv(system)[:, :count]


def _thin_plate(a: Tensor, b: Tensor) -> Tensor:
    square = (a[:, None, 0] - b[:, 0]).square_() + (a[:, None, 1] - b[:, 1]).square_()
    return square.clamp(min=1e-12).log_().mul_(square)


def _affine(points: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(points[:, :1]), points], dim=1)


@dataclass(frozen=True)
class Lattice:
    """Nodes of a regular grid: origin (x, y), step, columns and rows; node (i, j) lies at origin + step * (j, i)."""

    origin: tuple[float, float]
    step: float
    columns: int
    rows: int

    @classmethod
    def covering(cls, low: Tensor, high: Tensor, step: float) -> Lattice:
        """The nodes on multiples of `step` that enclose a box, low [2] to high [2]."""
        first = (low / step).floor()
        count = ((high / step).ceil() - first).long() + 1
        return cls((float(first[0]) * step, float(first[1]) * step), step, int(count[0]), int(count[1]))

    def nodes(self) -> Tensor:
        """[rows, columns, 2] float64."""
        x = self.origin[0] + self.step * torch.arange(self.columns, dtype=torch.float64)
        y = self.origin[1] + self.step * torch.arange(self.rows, dtype=torch.float64)
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([x, y], dim=-1)

    def normalise(self, points: Tensor) -> Tensor:
        """Positions as `grid_sample` wants them for a tensor whose pixels are the nodes (align_corners=True)."""
        scale = points.new_tensor([2.0 / (self.columns - 1), 2.0 / (self.rows - 1)]) / self.step
        offset = points.new_tensor(self.origin) * scale + 1.0
        return points * scale - offset


def pull_back(field: Tensor, lattice: Lattice, targets: Tensor) -> Tensor:
    """Where drawn positions come from: x with x + field(x) = target.

    Args: field [b, 2, rows, columns] forward displacement on the lattice's nodes (held beyond them);
    targets [h, w, 2].
    Returns: x - target, [b, h, w, 2].
    """
    targets = targets.to(field)
    offset = torch.zeros(len(field), *targets.shape, dtype=field.dtype, device=field.device)
    for _ in range(INVERSION_STEPS):
        moved = F.grid_sample(field, lattice.normalise(targets + offset), padding_mode="border", align_corners=True)
        offset = torch.lerp(offset, -moved.permute(0, 2, 3, 1), RELAXATION)
    return offset


def refine(image: Tensor) -> Tensor:
    """A picture at twice the density, [c, h, w] to [c, 2h - 1, 2w - 1]: even samples are the pixels, odd ones bicubic.

    Bilinear sampling of the result is as sharp as bicubic sampling of the picture, and exact at its pixels.
    """
    return _refine_rows(_refine_rows(image).transpose(1, 2)).transpose(1, 2).contiguous()


def _refine_rows(image: Tensor) -> Tensor:
    padded = F.pad(image[None], (0, 0, 1, 1), mode="replicate")[0]
    between = (9.0 * (padded[:, 1:-2] + padded[:, 2:-1]) - (padded[:, :-3] + padded[:, 3:])) / 16.0
    fine = image.new_empty(image.shape[0], 2 * image.shape[1] - 1, image.shape[2])
    fine[:, 0::2] = image
    fine[:, 1::2] = between
    return fine
