"""What moves: a driven track relative to a portrait's own keypoints, and its expression as displacements of landmarks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..keypoints import Keypoints, euler_angles, hold, rotation_matrix
from . import Portrait
from .basis import COORDINATES, NUM_LANDMARKS, Basis, lip_opening

# How far the head follows from the portrait's own pose; softly limited from 60 % of it on.
MAX_TURN = 25.0  # degrees
MAX_SHIFT = 0.30  # half-widths of the crop
MAX_ZOOM = 0.25

# How far landmarks move at most, in units: (freely up to, never beyond).
MAX_MOVE = (0.45, 0.65)
MAX_SIDEWAYS = (0.13, 0.26)
MAX_RISE = (0.01, 0.04)  # of an upper lip that already bares the teeth

PRESSED = 0.025  # units that closed edges overlap, so that nothing shines through
UPPER_LID_SHARE, UPPER_LIP_SHARE = 0.75, 0.5  # what of a correction of a gap the upper edge takes
LID_REACH, LIP_REACH = 0.05, 0.16  # units outside an edge over which the skin follows its corrections


def soft_limit(values: Tensor, free: float, limit: float) -> Tensor:
    """Vectors [..., n] left alone up to the length `free`, of a length that never passes `limit`."""
    length = values.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    span = limit - free
    limited = free + span * torch.tanh((length - free).clamp(min=0.0) / span)
    return values * torch.where(length > free, limited / length, torch.ones_like(length))


@dataclass(frozen=True)
class Motion:
    """What to draw, frame by frame, relative to a portrait's own keypoints.

    change [T, 63] of expression; turn [T, 3, 2] and shift [T, 2]: a position x [3] about the head's pivot, in crop pixels,
    moves by x @ turn + shift (turn is rotation and zoom less the identity, seen from the front).
    """

    change: Tensor
    turn: Tensor
    shift: Tensor

    @classmethod
    def between(cls, portrait: Portrait, driven: Keypoints) -> Motion:
        """Frames past the portrait's last one are relative to that. Tensors are on the CPU."""
        driven = driven.to("cpu")
        own = {name: hold(track.cpu(), driven.frames) for name, track in portrait.features.items()}
        change = (driven.expression - own["expression"]).reshape(-1, COORDINATES)
        angles = torch.stack(euler_angles(own["rotation"].transpose(1, 2) @ driven.rotation), dim=-1)
        angles = soft_limit(angles, 0.6 * MAX_TURN, MAX_TURN)
        zoom = soft_limit((driven.scale / own["scale"] - 1.0)[:, None], 0.6 * MAX_ZOOM, MAX_ZOOM)
        shift = soft_limit((driven.translation - own["translation"])[:, :2], 0.6 * MAX_SHIFT, MAX_SHIFT)
        turn = rotation_matrix(*angles.unbind(dim=-1)) * (1.0 + zoom[:, :, None]) - torch.eye(3)
        # An unchanged pose comes back from the angles with rounding errors; the head is to hold exactly still then.
        turn = torch.where(turn.abs().amax(dim=(1, 2), keepdim=True) > 1e-5, turn, torch.zeros_like(turn))
        return cls(change, turn[..., :2], shift * (portrait.crops[0].size / 2))

    @property
    def frames(self) -> int:
        return len(self.change)

    @property
    def turns(self) -> bool:
        """Whether the head itself moves anywhere in the track."""
        return bool(self.turn.any() or self.shift.any())

    def part(self, start: int, stop: int | None = None) -> Motion:
        return replace(self, **{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})

    def filled(self, frames: int) -> Motion:
        """Held at its last frame."""
        return replace(self, **{field.name: hold(getattr(self, field.name), frames) for field in fields(self)})

    def to(self, device: torch.device) -> Motion:
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class LandmarkMotion:
    """Expression of one face as displacements of its landmarks, with lids and lips that close and don't cross."""

    def __init__(self, points: Tensor, unit: float, basis: Basis, device: torch.device) -> None:
        """Args: points [468, 3] crop pixels; unit: the inter-ocular distance in crop pixels."""
        self.unit = unit
        self.opening = lip_opening(points, unit)
        self.basis_xy = (basis.basis[..., :2] * unit).reshape(COORDINATES, -1).to(device)
        self.lip_gap = basis.lip_gap.to(device)
        self.lids = Edges(points, unit, basis.lid_pairs, UPPER_LID_SHARE, LID_REACH, device)
        self.lips = Edges(points, unit, basis.lip_pairs, UPPER_LIP_SHARE, LIP_REACH, device)

    def __call__(self, change: Tensor) -> Tensor:
        """Changes of expression [b, 63] to displacements [b, 468, 2] in crop pixels; bounded whatever the input."""
        unit = self.unit
        moved = (change @ self.basis_xy).reshape(-1, NUM_LANDMARKS, 2)
        moved = soft_limit(moved, *(unit * limit for limit in MAX_MOVE))
        moved = torch.cat([soft_limit(moved[..., :1], *(unit * limit for limit in MAX_SIDEWAYS)), moved[..., 1:]], dim=-1)
        everything = torch.ones(len(moved), 1, device=moved.device)
        moved = self.lids.closed(moved, everything, PRESSED * unit)
        if self.opening == 0:
            return self.lips.closed(moved, everything, 0.0)
        moved = self.lips.held_down(moved, *(unit * limit for limit in MAX_RISE))
        # What is left of the portrait's own opening: 1 as it is, 0 where the driven expression has closed lips.
        kept = ((self.opening + change @ self.lip_gap) / self.opening).clamp(0.0, 1.0)[:, None]
        return self.lips.closed(moved, kept, PRESSED * unit)


class Edges:
    """The upper and lower edges of the eyes, or of the mouth, as pairs of landmarks, and the skin that follows them."""

    def __init__(
        self, points: Tensor, unit: float, pairs: Tensor, upper_share: float, reach: float, device: torch.device
    ) -> None:
        """Args: pairs [n, 2] landmarks (upper, lower); reach: units over which the skin outside follows."""
        self.upper, self.lower = pairs.to(device).unbind(dim=1)
        self.gap = (points[pairs[:, 1], 1] - points[pairs[:, 0], 1]).float().to(device)
        self.upper_share = upper_share
        sides = [_followers(points[:, :2], unit, pairs[:, side], pairs[:, 1 - side], side == 0, reach) for side in (0, 1)]
        self.upper_skin, self.lower_skin = (side.T.float().contiguous().to(device) for side in sides)

    def closed(self, moved: Tensor, kept: Tensor, press: float) -> Tensor:
        """Displacements [b, 468, 2] with edges that don't cross and gaps that end where the expression's do.

        Args: kept [b, 1]: what is left of the portrait's own gap; press: crop pixels that closed edges overlap.
        """
        now = self.gap + moved[:, self.lower, 1] - moved[:, self.upper, 1]
        least = self.gap.clamp(max=-press)  # edges that cross more than that in the portrait may stay so
        wanted = kept * torch.maximum(now, least) + (1.0 - kept) * (kept * self.gap - press)
        missing = wanted - now
        pull = (1.0 - self.upper_share) * missing @ self.lower_skin - self.upper_share * missing @ self.upper_skin
        return torch.stack([moved[..., 0], moved[..., 1] + pull], dim=-1)

    def held_down(self, moved: Tensor, free: float, limit: float) -> Tensor:
        """Displacements [b, 468, 2] with an upper edge that rises by `limit` at most."""
        rise = moved[:, self.upper, 1].clamp(max=0.0)
        excess = rise - soft_limit(rise[..., None], free, limit)[..., 0]
        return torch.stack([moved[..., 0], moved[..., 1] - excess @ self.upper_skin], dim=-1)


def _followers(points: Tensor, unit: float, edge: Tensor, other: Tensor, is_upper: bool, reach: float) -> Tensor:
    """How much each landmark follows a correction of each one on an edge: [468, n].

    The edge follows itself, the skin outside it less and less, nothing beyond the other edge.
    """
    sign = -1.0 if is_upper else 1.0
    across = (points[:, None, 0] - points[None, edge, 0]) / (0.06 * unit)
    outward = sign * (points[:, None, 1] - points[None, edge, 1]) / (reach * unit)
    beyond_other = sign * (points[:, None, 1] - points[None, other, 1]) < 0
    near = torch.exp(-(across**2)) + 1e-12
    weight = near / near.sum(dim=1, keepdim=True) * near.amax(dim=1, keepdim=True) * torch.exp(-(outward.clamp(min=0.0) ** 2))
    weight[(outward < -0.35) | beyond_other] = 0.0
    weight[other] = 0.0
    weight[edge] = torch.eye(len(edge), dtype=weight.dtype)
    return weight
