"""The openings of a face, mouth and eyes: two skin layers cut along their edges, and what shows between them.

A face mesh has no holes: warped as one sheet, lips smear teeth and lids smear irises. So the picture is cut along each edge
of an opening. The upper layer holds everything above the upper edge and moves with it, the lower layer everything below the
lower edge. Alpha channels travel with the layers, which makes the edges antialiased wherever they move. Between them lies
what the head carries: the eyeball, or the inside of a mouth (see `mouth`).

Positions are crop pixels; `unit` is the face's inter-ocular distance in crop pixels, by which all lengths scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .warp import smoothstep

# Landmarks from one corner to the other, as seen in the image from left to right.
# fmt: off
LEFT_UPPER_LID = (33, 246, 161, 160, 159, 158, 157, 173, 133)
LEFT_LOWER_LID = (33, 7, 163, 144, 145, 153, 154, 155, 133)
RIGHT_UPPER_LID = (362, 398, 384, 385, 386, 387, 388, 466, 263)
RIGHT_LOWER_LID = (362, 382, 381, 380, 374, 373, 390, 249, 263)
# fmt: on

SHADOW_DEPTH = 0.10  # units that the upper lip's shadow reaches down into the mouth


class Outline:
    """An opening in its own axes: p from corner to corner, q downward, and its two edges as functions of p."""

    def __init__(self, upper: Tensor, lower: Tensor) -> None:
        """Args: upper, lower [n, 2] float64 from corner to corner, sharing their ends."""
        left, right = upper[0], upper[-1]
        along = (right - left) / (right - left).norm()
        self.origin = (left + right) / 2
        self.axes = torch.stack([along, torch.stack([-along[1], along[0]])])  # rows: p, q
        self.upper = _smooth(self.to_axes(upper))
        self.lower = _smooth(self.to_axes(lower))
        self.reach = float((right - left).norm()) / 2  # half the width

    def to_axes(self, points: Tensor) -> Tensor:
        return (points - self.origin.to(points)) @ self.axes.T.to(points)

    def from_axes(self, points: Tensor) -> Tensor:
        return points @ self.axes.to(points) + self.origin.to(points)

    def edges(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """q of the upper and of the lower edge; beyond the corners held."""
        return _interpolate(self.upper, p), _interpolate(self.lower, p)

    def beyond(self, p: Tensor) -> Tensor:
        """How far a position lies outside the corners."""
        return (p.abs() - self.reach).clamp(min=0.0)


def _smooth(knots: Tensor, samples: int = 12) -> Tensor:
    """A Catmull-Rom curve through knots [n, 2], as a polyline with increasing p."""
    ends = torch.cat([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    t = torch.arange(samples, dtype=knots.dtype)[:, None, None] / samples
    a, b, c, d = ends[:-3], ends[1:-2], ends[2:-1], ends[3:]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    curve = torch.cat([curve.transpose(0, 1).reshape(-1, 2), knots[-1:]])
    return torch.stack([curve[:, 0].cummax(dim=0).values, curve[:, 1]], dim=1)


def _interpolate(curve: Tensor, p: Tensor) -> Tensor:
    x, y = curve[:, 0].to(p).contiguous(), curve[:, 1].to(p)
    after = torch.searchsorted(x, p.contiguous()).clamp(1, len(x) - 1)
    span = (x[after] - x[after - 1]).clamp(min=1e-9)
    weight = ((p - x[after - 1]) / span).clamp(0.0, 1.0)
    return torch.lerp(y[after - 1], y[after], weight)


def along(p: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Values [n] known at p [n], linearly interpolated, held beyond."""
    return _interpolate(torch.stack([p, values], dim=1), at)


def layer_masks(outline: Outline, points: Tensor, unit: float, feather: float, overlap: float) -> tuple[Tensor, Tensor, Tensor]:
    """What belongs to the upper layer, to the lower one, and where the upper edge throws its shadow, each [...] in 0..1.

    Args: points [..., 2]; feather: half the width of an antialiased edge; overlap: how far the lower layer reaches under the
    upper edge when the opening is closed. Outside the corners the layers blend, more softly the farther out.
    """
    p, q = outline.to_axes(points).unbind(dim=-1)
    upper_edge, lower_edge = outline.edges(p)
    beyond = outline.beyond(p)
    half = feather + 0.4 * beyond
    upper = (0.5 + (upper_edge - q) / (2 * half)).clamp(0.0, 1.0)
    lower = (0.5 + (q - lower_edge + overlap) / (2 * feather)).clamp(0.0, 1.0)
    lower = torch.maximum(lower, smoothstep(beyond / (0.05 * unit)))
    return upper, lower, shadow_under(q - upper_edge, unit)


def shadow_under(below: Tensor, unit: float) -> Tensor:
    """How dark the upper lip's shadow is, some distance below its edge: 0..1."""
    return (1.0 - (below / (SHADOW_DEPTH * unit)).clamp(0.0, 1.0)) ** 2
