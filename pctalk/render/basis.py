"""The mean face and the linear basis: landmarks to expression and back.

Landmarks are MediaPipe's 468, [468, 3] in crop pixels, x right, y down, z away from the camera. Lengths of the basis are
inter-ocular distances (between the middles of the eyes); one of them in crop pixels is a face's `unit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..keypoints import LIPS, NUM_KEYPOINTS, Keypoints

ASSET = Path(__file__).parents[1] / "assets" / "mesh_basis.safetensors"
NUM_LANDMARKS = 468
COORDINATES = 3 * NUM_KEYPOINTS  # of an expression, flattened

# Landmarks of the inner lips from one corner to the other, as seen in the image from left to right.
UPPER_LIP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
LOWER_LIP = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
EYE_CORNERS = (33, 133, 263, 362)

CLOSED_GAP = 0.05  # units; landmarks of closed lips still lie about 0.04 apart
# How much of what sets a face apart from the mean face is read as expression; the rest is how the person looks.
EXPRESSIVE = 0.75
MOST_UNUSUAL = 3.0  # standard deviations of real expression at which a reading is cut


@dataclass(frozen=True)
class Basis:
    """The asset: expression to landmark displacement in inter-ocular distances, its inverse and the mean face.

    basis [63, 468, 3]; inverse_xy [468, 2, 63]; neutral [468, 3], origin at the nose bridge; neutral_exp [21, 3];
    exp_std [63]; exp_cov [63, 63]; lid_pairs [14, 2], lip_pairs [9, 2] landmarks (upper, lower); stable_points [32];
    region_lips [80]; canonical [21, 3] mean canonical keypoints; lp_units_per_iod: keypoint units of one inter-ocular distance.
    """

    basis: Tensor
    inverse_xy: Tensor
    neutral: Tensor
    neutral_exp: Tensor
    exp_std: Tensor
    exp_cov: Tensor
    lid_pairs: Tensor
    lip_pairs: Tensor
    stable_points: Tensor
    region_lips: Tensor
    canonical: Tensor
    lp_units_per_iod: Tensor

    @classmethod
    def from_assets(cls, path: Path = ASSET) -> Basis:
        """Raises FileNotFoundError or ValueError when the file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: install PC-Talk again.")
        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} does not hold the mesh basis ({error}): install PC-Talk again.") from None

    @property
    def lip_gap(self) -> Tensor:
        """How the mean gap between the lips follows expression: [63]."""
        upper, lower = self.lip_pairs.unbind(dim=1)
        return (self.basis[:, lower, 1] - self.basis[:, upper, 1]).mean(dim=1)

    @property
    def anchor(self) -> Tensor:
        """The middle between eyes and lips of the mean face: [3] float64."""
        eyes = self.neutral[list(EYE_CORNERS)].double().mean(dim=0)
        lips = self.neutral[[13, 14]].double().mean(dim=0)
        return (eyes + lips) / 2

    @property
    def canonical_anchor(self) -> Tensor:
        """The same place among the canonical keypoints, by those that lie on eyes and lips: [3] float64."""
        eyes = self.canonical[[11, 13, 15, 16]].double().mean(dim=0)
        lips = self.canonical[[17, 19, 20]].double().mean(dim=0)
        return (eyes + lips) / 2


@dataclass(frozen=True)
class HeadFit:
    """The mean face laid onto a portrait: landmarks = unit * neutral @ rotation + origin, in crop pixels (row vectors)."""

    unit: float
    rotation: Tensor
    origin: Tensor

    @classmethod
    def of(cls, landmarks: Tensor, basis: Basis) -> HeadFit:
        """By the landmarks that expression hardly moves: the least-squares similarity (Umeyama 1991).

        Raises ValueError for landmarks that are no face.
        """
        source, target = (points[basis.stable_points].double() for points in (basis.neutral, landmarks))
        centre, middle = source.mean(dim=0), target.mean(dim=0)
        u, singular, vh = torch.linalg.svd((source - centre).T @ (target - middle))
        signs = torch.ones(3, dtype=torch.float64)
        signs[2] = torch.linalg.det(u @ vh).sign()
        rotation = u @ torch.diag(signs) @ vh
        unit = float((singular * signs).sum() / ((source - centre) ** 2).sum())
        if not unit > 1.0:
            raise ValueError(
                "The landmarks don't lie like those of a face: give the 468 points of MediaPipe's face mesh, in their order, "
                "in pixels of this picture."
            )
        return cls(unit, rotation, middle - unit * centre @ rotation)

    def place(self, point: Tensor) -> Tensor:
        """A position of the mean face [3] in the portrait [3]."""
        return self.unit * point @ self.rotation + self.origin

    def pivot(self, basis: Basis) -> Tensor:
        """Where the origin of the canonical keypoints lies, about which a head turns: [3] crop pixels."""
        return self.place(basis.anchor - basis.canonical_anchor / float(basis.lp_units_per_iod))


def read_keypoints(landmarks: Tensor, crop_size: int, basis: Basis) -> Keypoints:
    """K_ori of landmarks [N, 468, 3]: pose from the mean face laid onto them, expression by the inverse basis.

    The scale follows from the face's size, so a crop at LivePortrait's 2.3 gives LivePortrait's range of scales.
    """
    half = crop_size / 2
    fits = [HeadFit.of(points, basis) for points in landmarks]
    scale = torch.tensor([fit.unit for fit in fits], dtype=torch.float64) / (half * float(basis.lp_units_per_iod))
    translation = torch.stack([fit.pivot(basis) for fit in fits]) / half - 1.0
    translation[:, 2] = 0.0
    return Keypoints(
        canonical=basis.canonical,
        rotation=torch.stack([fit.rotation for fit in fits]).float(),
        scale=scale.float(),
        translation=translation.float(),
        expression=torch.stack([read_expression(points, fit, basis) for points, fit in zip(landmarks, fits, strict=True)]),
    )


def with_depth(landmarks: Tensor, basis: Basis) -> Tensor:
    """Landmarks known in x and y only, given the depth of the mean face in the same pose (scaled orthography): [468, 3]."""
    points = basis.stable_points
    source, target = basis.neutral[points].double(), landmarks[points, :2].double()
    linear = torch.linalg.lstsq(source - source.mean(dim=0), target - target.mean(dim=0)).solution  # [3, 2]
    u, singular, vh = torch.linalg.svd(linear, full_matrices=False)
    unit, columns = float(singular.mean()), u @ vh
    depth = basis.neutral.double() @ torch.linalg.cross(columns[:, 0], columns[:, 1]) * unit
    return torch.cat([landmarks[:, :2], depth[:, None].to(landmarks)], dim=1)


def read_expression(landmarks: Tensor, fit: HeadFit, basis: Basis) -> Tensor:
    """Expression of landmarks [468, 3] in crop pixels: [21, 3].

    The posterior mean of the basis, limited to three standard deviations of real expression; the lips' part is then moved
    the least that makes the gap between the lips the one measured, zero for closed lips.
    """
    aligned = (landmarks.double() - fit.origin) @ fit.rotation.T / fit.unit
    displacement = (aligned - basis.neutral)[:, :2].reshape(-1)
    change = displacement @ basis.inverse_xy.double().reshape(-1, COORDINATES)
    change = EXPRESSIVE * torch.minimum(torch.maximum(change, -MOST_UNUSUAL * basis.exp_std), MOST_UNUSUAL * basis.exp_std)
    lips = torch.zeros(NUM_KEYPOINTS, 3, dtype=torch.float64)
    lips[list(LIPS)] = 1.0
    lips = lips.flatten()
    gap = basis.lip_gap.double() * lips
    spread = (basis.exp_cov.double() @ gap) * lips
    change = change + spread * ((lip_opening(landmarks, fit.unit) - gap @ change) / (gap @ spread))
    return (basis.neutral_exp + change.reshape(NUM_KEYPOINTS, 3)).float()


def lip_opening(landmarks: Tensor, unit: float) -> float:
    """The mean gap between the lips in inter-ocular distances, 0 for lips that touch."""
    upper = landmarks[list(UPPER_LIP[1:-1]), 1]
    lower = landmarks[list(LOWER_LIP[1:-1]), 1]
    gap = float((lower - upper).mean()) / unit
    return gap if gap > CLOSED_GAP else 0.0
