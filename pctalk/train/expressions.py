"""Mouth shapes and emotions in LivePortrait's expression space, designed by what they do to a face.

Each shape is asked for in measurements of the face mesh (how far lips, corners, lids and brows move, in inter-ocular
distances) and solved as the most probable expression that gives them: the smallest in the metric of how real expressions
vary (`exp_cov`), so that keypoints move together as they do in real clips. The emotions follow the facial action units of
Ekman and Friesen's FACS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ..keypoints import EMOTIONS, LIPS, NUM_KEYPOINTS
from .visemes import CURVES

MESH_BASIS = Path(__file__).parents[1] / "assets" / "mesh_basis.safetensors"
VALUES = 3 * NUM_KEYPOINTS
LIP_VALUES = np.array([3 * keypoint + axis for keypoint in LIPS for axis in range(3)])
# Emotions use the keypoints whose meaning is known; 4, 5, 7 to 10 and 18 move with the rest of the head or hardly at all.
_EXPRESSIVE = (0, 1, 2, 3, 11, 13, 14, 15, 16, 17, 19, 20)
EMOTION_VALUES = np.array([3 * keypoint + axis for keypoint in _EXPRESSIVE for axis in range(3)])
_LATERAL_VALUES = np.array([0, 51, 57, 60])  # x of 0, 17, 19, 20: to one side
_BROW_VALUES = np.array([3, 4, 6, 7])  # 1 and 2, x and y
_BROW_FREEDOM = 3.0  # the clips that the covariance is from talk; their brows move less than an emotion's

# Landmarks of MediaPipe's face mesh; left and right as seen in the image, y down.
_POINTS = {
    "left_corner": (61,), "right_corner": (291,), "upper_lip_inside": (13,), "lower_lip_inside": (14,),
    "upper_lip": (0, 37, 267), "lower_lip": (17, 84, 314), "left_upper_lid": (159, 160, 158),
    "left_lower_lid": (145, 144, 153), "right_upper_lid": (386, 387, 385), "right_lower_lid": (374, 373, 380),
    "left_inner_brow": (55, 107), "left_outer_brow": (46, 70, 53), "right_inner_brow": (285, 336),
    "right_outer_brow": (276, 300, 283), "left_cheek": (50, 205), "right_cheek": (280, 425), "left_nostril": (129, 48),
    "right_nostril": (358, 278),
}  # fmt: skip

# What the mouth does at the end of each curve, in inter-ocular distances relative to the neutral mesh, whose lips stand
# 0.04 apart. `rest` is added throughout: lips that touch lightly.
MOUTH: dict[str, dict[str, float]] = {
    "rest": {"gap": -0.032, "width": 0.0, "corners": 0.0},
    "open": {"gap": 0.41, "width": 0.0, "corners": 0.07},
    "pursing": {"gap": 0.042, "width": -0.29, "corners": 0.042, "upper_lip_inside": -0.014},
    "widening": {"gap": 0.049, "width": 0.21, "corners": -0.042},
    "press": {"gap": -0.049, "width": -0.028, "corners": 0.0},
}

# Emotions at intensity 1. The measurements that are not named stay free to follow the named ones.
EMOTION_SHAPES: dict[str, dict[str, float]] = {
    "happy": {  # 6 cheek raiser, 12 lip corner puller
        "corners": -0.10, "width": 0.19, "gap": 0.03, "lower_lids": -0.035, "upper_lids": 0.015, "inner_brows": 0.0,
        "outer_brows": 0.0,
    },
    "sad": {  # 1 inner brow raiser, 4 brow lowerer, 15 lip corner depressor
        "corners": 0.12, "width": -0.08, "gap": -0.02, "inner_brows": -0.17, "outer_brows": 0.04, "brow_distance": -0.07,
        "upper_lids": 0.03, "lower_lids": -0.01,
    },
    "angry": {  # 4 brow lowerer, 5 upper lid raiser, 7 lid tightener, 23 lip tightener
        "inner_brows": 0.13, "outer_brows": -0.02, "brow_distance": -0.10, "upper_lids": -0.005, "lower_lids": -0.045,
        "gap": -0.03, "width": -0.14, "corners": 0.06,
    },
    "fear": {  # 1, 2 brow raisers, 4, 5 upper lid raiser, 7, 20 lip stretcher, 26 jaw drop
        "inner_brows": -0.13, "outer_brows": -0.04, "brow_distance": -0.04, "upper_lids": -0.06, "lower_lids": -0.01,
        "width": 0.12, "corners": 0.07, "gap": 0.08,
    },
    "disgusted": {  # 9 nose wrinkler, 15 lip corner depressor, 16 lower lip depressor
        "inner_brows": 0.10, "outer_brows": 0.04, "brow_distance": -0.05, "lower_lids": -0.055, "upper_lids": 0.045,
        "nostrils": -0.03, "upper_lip": -0.08, "corners": 0.06, "gap": 0.05, "width": -0.06,
    },
    "surprised": {  # 1, 2 brow raisers, 5 upper lid raiser, 26 jaw drop
        "inner_brows": -0.095, "outer_brows": -0.09, "upper_lids": -0.055, "lower_lids": 0.01, "gap": 0.2, "width": -0.09,
        "corners": 0.04,
    },
    "contempt": {  # 12 and 14, one side (the image's right): the corner tightens and rises
        "right_corner": -0.11, "left_corner": 0.05, "right_corner_x": 0.09, "left_corner_x": 0.04, "gap": -0.03,
        "inner_brows": 0.02, "outer_brows": 0.0, "right_lower_lid": -0.03, "left_lower_lid": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class FacePrior:
    """The linear face: basis [63, 468, 3] (displacement in inter-ocular distances = expression @ basis), neutral [468, 3],
    neutral_exp [63], covariance [63, 63] of real expressions, lip_pairs [9, 2]."""

    basis: np.ndarray
    neutral: np.ndarray
    neutral_exp: np.ndarray
    covariance: np.ndarray
    lip_pairs: np.ndarray

    @classmethod
    def load(cls, path: Path = MESH_BASIS) -> FacePrior:
        """Read the mesh basis (.safetensors, or .npz with the same names)."""
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if file[name].dtype.kind in "fiu"}
        else:
            arrays = load_file(path)
        freedom = np.ones(VALUES)
        freedom[_BROW_VALUES] = np.sqrt(_BROW_FREEDOM)
        covariance = arrays["exp_cov"].astype(np.float64).reshape(VALUES, VALUES) * np.outer(freedom, freedom)
        return cls(
            arrays["basis"].astype(np.float64).reshape(VALUES, 468, 3),
            arrays["neutral"].astype(np.float64),
            arrays["neutral_exp"].astype(np.float64).reshape(VALUES),
            covariance,
            arrays["lip_pairs"].astype(np.int64),
        )

    def point(self, name: str, axis: int) -> np.ndarray:
        """How an expression moves a named point along an axis: [63]."""
        return self.basis[:, _POINTS[name], axis].mean(axis=1)

    def measure(self, name: str) -> np.ndarray:
        """A linear measurement of the face as weights on the expression [63], in inter-ocular distances; down is positive."""
        if name == "gap":
            return self.point("lower_lip_inside", 1) - self.point("upper_lip_inside", 1)
        if name == "width":
            return self.point("right_corner", 0) - self.point("left_corner", 0)
        if name == "brow_distance":
            return self.point("right_inner_brow", 0) - self.point("left_inner_brow", 0)
        if name.endswith("_x"):
            return self.point(name[:-2], 0)
        if name in _POINTS:
            return self.point(name, 1)
        singular = {"corners": "corner", "upper_lids": "upper_lid", "lower_lids": "lower_lid", "inner_brows": "inner_brow",
                    "outer_brows": "outer_brow", "cheeks": "cheek", "nostrils": "nostril"}[name]  # fmt: skip
        return (self.point(f"left_{singular}", 1) + self.point(f"right_{singular}", 1)) / 2

    def design(self, wanted: dict[str, float], values: np.ndarray | None = None, tolerance: float = 0.003) -> np.ndarray:
        """The most probable expression with the wanted measurements: [63].

        Args: values: which of the 63 may move (default all); tolerance: how closely, in inter-ocular distances.
        """
        values = np.arange(VALUES) if values is None else values
        measures = np.stack([self.measure(name)[values] for name in wanted])
        covariance = self.covariance[np.ix_(values, values)]
        inner = measures @ covariance @ measures.T + tolerance**2 * np.eye(len(wanted))
        expression = np.zeros(VALUES)
        expression[values] = covariance @ measures.T @ np.linalg.solve(inner, np.array(list(wanted.values())))
        return expression

    def mesh(self, expression: np.ndarray) -> np.ndarray:
        """The neutral mesh under an expression relative to `neutral_exp`, lips not crossing: [..., 63] to [..., 468, 3]."""
        points = self.neutral + np.tensordot(expression, self.basis, 1)
        for upper, lower in self.lip_pairs:
            gap = min(0.012, self.neutral[lower, 1] - self.neutral[upper, 1]) - (points[..., lower, 1] - points[..., upper, 1])
            points[..., upper, 1] -= np.maximum(gap, 0) / 2
            points[..., lower, 1] += np.maximum(gap, 0) / 2
        return points

    def lip_gap(self, expression: np.ndarray) -> np.ndarray:
        """Distance of the inner lips in inter-ocular distances, negative when they press: [..., 63] to [...]."""
        neutral = self.neutral[14, 1] - self.neutral[13, 1]
        return neutral + expression @ self.measure("gap")

    def mouth_width(self, expression: np.ndarray) -> np.ndarray:
        """Distance of the mouth corners in inter-ocular distances: [..., 63] to [...]."""
        neutral = self.neutral[291, 0] - self.neutral[61, 0]
        return neutral + expression @ self.measure("width")


@dataclass(frozen=True)
class Expressions:
    """The designed shapes: rest [63], mouth [4, 63] (one per curve; lips only), emotions [8, 63] (neutral is zero)."""

    rest: np.ndarray
    mouth: np.ndarray
    emotions: np.ndarray

    @classmethod
    def design(cls, prior: FacePrior) -> Expressions:
        mouth = [prior.design(MOUTH[curve], LIP_VALUES) for curve in CURVES]
        both_sides = np.setdiff1d(EMOTION_VALUES, _LATERAL_VALUES)
        emotions = np.zeros((len(EMOTIONS), VALUES))
        for name, shape in EMOTION_SHAPES.items():
            values = EMOTION_VALUES if name == "contempt" else both_sides
            emotions[EMOTIONS.index(name)] = prior.design(shape, values)
        return cls(prior.design(MOUTH["rest"], LIP_VALUES), np.stack(mouth), emotions)

    def articulate(self, curves: np.ndarray) -> np.ndarray:
        """Mouth curves [..., 4] to expression relative to `neutral_exp` [..., 63], only the lips moving."""
        return self.rest + curves @ self.mouth
