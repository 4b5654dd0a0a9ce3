"""The shape of one face in its crop: where motion ends, and splines through its landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import Basis, HeadFit
from .warp import Lattice, smoothstep, spline_weights

# fmt: off
FACE_OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)
# fmt: on

# Distances from the face's outline, in units. Beside and above the face / below the chin:
EXPRESSION_ENDS = (0.40, 0.60)
HEAD_IS_WHOLE = (0.50, 0.05)  # hair and ears move with the head up to here
HEAD_ENDS = (1.45, 0.95)
BORDER = 0.35  # units from the crop's border over which everything comes to rest
STILL_RING = 1.6  # the face's outline times this, where splines are held at zero


@dataclass(frozen=True)
class Field:
    """Forward displacement over a box of the crop: weights [g, n] of n landmarks' displacements on a lattice's g nodes."""

    lattice: Lattice
    weights: Tensor
    landmarks: Tensor

    def __call__(self, displacement: Tensor) -> Tensor:
        """Landmark displacements [b, 468, 2] to [b, 2, rows, columns]."""
        chosen = displacement[:, self.landmarks].permute(1, 0, 2).flatten(1)
        values = self.weights @ chosen
        return values.reshape(self.lattice.rows, self.lattice.columns, -1, 2).permute(2, 3, 0, 1)


@dataclass(frozen=True)
class Turning:
    """The head's own motion over a lattice: its nodes about the pivot [g, 3], and how much each takes part [g, 1]."""

    positions: Tensor
    weight: Tensor

    def __call__(self, field: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        """A field [b, 2, rows, columns] of expression, turned by [b, 3, 2] and shifted by [b, 2] (see `Motion`)."""
        moved = field.flatten(2).transpose(1, 2)
        places = self.positions + F.pad(moved, (0, 1))
        moved = moved + self.weight * (places @ turn + shift[:, None])
        return moved.transpose(1, 2).reshape(field.shape)


class FaceShape:
    """One face: points [468, 3] crop pixels float64, unit, oval [36, 2], pivot [3] about which the head turns."""

    def __init__(self, landmarks: Tensor, crop_size: int, basis: Basis) -> None:
        self.points = landmarks.double()
        self.crop_size = crop_size
        fit = HeadFit.of(self.points, basis)
        self.unit = fit.unit
        self.pivot = fit.pivot(basis)
        self.oval = self.points[list(FACE_OVAL), :2]

    def at(self, landmarks: Sequence[int]) -> Tensor:
        """Positions of some landmarks: [n, 2]."""
        return self.points[list(landmarks), :2]

    def box(self, head_moves: bool) -> tuple[Tensor, Tensor]:
        """The part of the crop that may move: low [2], high [2]."""
        size = torch.full((2,), float(self.crop_size), dtype=torch.float64)
        if head_moves:
            return torch.zeros_like(size), size
        beside, below = (self.unit * distance for distance in EXPRESSION_ENDS)
        low, high = self.oval.amin(dim=0) - beside, self.oval.amax(dim=0) + torch.tensor([beside, below], dtype=torch.float64)
        return low.clamp(min=0.0), torch.minimum(high, size)

    def expression_window(self, places: Tensor) -> Tensor:
        """1 on the face, falling to 0 a little outside it, where expression ends: [n] for places [n, 2]."""
        distance, below = self._outside(places)
        beside, under = EXPRESSION_ENDS
        reach = self.unit * (beside + (under - beside) * below)
        return smoothstep(1.0 - distance / reach) * self._inside_crop(places)

    def head_window(self, places: Tensor) -> Tensor:
        """1 on the head with its hair, falling to 0 towards the crop's border and down the neck: [n] for places [n, 2]."""
        distance, below = self._outside(places)
        whole, end = (
            self.unit * (beside + (under - beside) * below) for beside, under in (HEAD_IS_WHOLE, HEAD_ENDS)
        )
        return smoothstep((end - distance) / (end - whole)) * self._inside_crop(places)

    def _inside_crop(self, places: Tensor) -> Tensor:
        return smoothstep(torch.minimum(places, self.crop_size - places).amin(dim=1) / (BORDER * self.unit))

    def _outside(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the face's outline, 0 inside [n]; and how much a place lies below rather than beside it, 0..1 [n]."""
        x, y = (column[:, None] for column in places.unbind(dim=1))  # [n, 1] against the outline's 36 segments
        x0, y0 = self.oval.unbind(dim=1)
        x1, y1 = self.oval.roll(-1, dims=0).unbind(dim=1)
        dx, dy = x1 - x0, y1 - y0
        t = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)).clamp_(0.0, 1.0)
        away = ((x0 + t * dx - x).square_() + (y0 + t * dy - y).square_()).amin(dim=1).sqrt()
        # Inside, a ray to the right crosses the outline an odd number of times.
        crosses = ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (dx / torch.where(dy == 0, 1e-9, dy)))
        distance = torch.where(crosses.sum(dim=1) % 2 == 1, 0.0, away)
        direction = F.normalize(places - self.oval.mean(dim=0), dim=1)
        return distance, smoothstep((direction[:, 1] - 0.35) / 0.5)

    def thinned(self, landmarks: Sequence[int], distance: float) -> list[int]:
        """Without those that lie closer than `distance` units to an earlier one.

        On a stretched lip rows of the mesh fall together; a spline through all of them would crease the skin.
        """
        points = self.at(landmarks)
        close = (torch.cdist(points, points) < distance * self.unit).tolist()
        kept: list[int] = []
        for row, near in enumerate(close):
            if not any(near[other] for other in kept):
                kept.append(row)
        return [landmarks[row] for row in kept]

    def field(self, lattice: Lattice, landmarks: Sequence[int], device: torch.device) -> Field:
        """Displacement of the whole face by some landmarks, zero outside it."""
        nodes = lattice.nodes().reshape(-1, 2)
        centre = self.oval.mean(dim=0)
        ring = centre + STILL_RING * (self.oval - centre)
        weights = spline_weights(torch.cat([self.at(landmarks), ring]), nodes)[:, : len(landmarks)]
        weights = weights * self.expression_window(nodes)[:, None]
        return Field(lattice, weights.float().to(device), torch.tensor(landmarks, device=device))

    def turning(self, lattice: Lattice, device: torch.device) -> Turning:
        """The head's motion over a lattice, with the depth of the face and, outside it, of the pivot."""
        nodes = lattice.nodes().reshape(-1, 2)
        distance, _ = self._outside(nodes)
        depth = spline_weights(self.points[:, :2], nodes, smoothing=0.1) @ self.points[:, 2]
        # The mesh falls off steeply at its rim; a warp can't turn that out of sight, so the rim is taken as nearly flat.
        rim = self.pivot[2] - 0.4 * self.unit
        depth = torch.minimum(depth, rim + 0.25 * (depth - rim).clamp(max=0.4 * self.unit)).clamp(min=self.points[:, 2].min())
        depth = torch.lerp(depth, self.pivot[2].expand_as(depth), smoothstep(distance / (0.8 * self.unit)))
        positions = torch.cat([nodes, depth[:, None]], dim=1) - self.pivot
        weight = self.head_window(nodes)[:, None]
        return Turning(positions.float().to(device), weight.float().to(device))
