"""Articulation styles: how a speaker uses the mouth, as gains on the mouth curves. Person ids of the starter model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from .visemes import close_lips


@dataclass(frozen=True)
class ArticulationStyle:
    """Gains on the curves; `smoothing` in seconds (negative: movements are sharpened by as much); `rest_gap`: how far the
    lips stand apart at rest, in units of full opening."""

    name: str
    opening: float = 1.0
    pursing: float = 1.0
    widening: float = 1.0
    smoothing: float = 0.0
    rest_gap: float = 0.0


STYLES = (
    ArticulationStyle("balanced"),
    ArticulationStyle("expressive", opening=1.25, pursing=1.2, widening=1.25, smoothing=-0.02),
    ArticulationStyle("restrained", opening=0.62, pursing=0.75, widening=0.7),
    ArticulationStyle("rounded", opening=0.95, pursing=1.35, widening=0.45),
    ArticulationStyle("spread", opening=0.9, pursing=0.6, widening=1.45),
    ArticulationStyle("open-jawed", opening=1.35, pursing=0.8, widening=0.75),
    ArticulationStyle("crisp", opening=1.05, pursing=1.1, widening=1.1, smoothing=-0.035),
    ArticulationStyle("soft", opening=0.78, pursing=0.85, widening=0.8, smoothing=0.05, rest_gap=0.03),
)


def apply_style(curves: np.ndarray, style: ArticulationStyle, rate: float) -> np.ndarray:
    """The curves as a speaker of this style would draw them; closures stay closed.

    Args: curves [T, 4] (visemes.CURVES) at `rate` values a second. Returns: [T, 4].
    """
    styled = curves
    if style.smoothing:
        width = abs(style.smoothing) * rate
        blurred = gaussian_filter1d(curves, width, axis=0, mode="nearest")
        styled = blurred if style.smoothing > 0 else curves + 0.7 * (curves - blurred)
    styled = styled * np.array([style.opening, style.pursing, style.widening, 1.0])
    styled[:, 0] += style.rest_gap
    styled = np.clip(styled, 0.0, [1.3, 1.2, 1.2, 1.0])
    closed = np.clip((curves[:, 3] - 0.5) / 0.4, 0.0, 1.0)
    return close_lips(styled, closed)
