"""Phones to mouth curves: what each phone asks of the lips, blended over time as neighbouring sounds share the mouth.

Four curves, each 0..1: open (lip and jaw opening, 1 the widest speech vowel), pursing (rounding and protrusion),
widening (corners outward), press (lips together or rolled in). The targets are judgement from articulatory phonetics (jaw
height, rounding, place). Blending by dominance functions follows Cohen and Massaro (1993).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter1d

CURVES = ("open", "pursing", "widening", "press")
CURVE_RATE = 80.0  # values per second: the rate of the mel frames

# Viseme: targets and dominances (how strongly it imposes each target), in the order of CURVES.
VISEMES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "sil": ((0.00, 0.05, 0.00, 0.15), (0.6, 0.5, 0.5, 0.5)),
    "PP": ((0.00, 0.10, 0.00, 1.00), (2.0, 0.2, 0.2, 2.0)),
    "FF": ((0.08, 0.05, 0.15, 0.45), (1.6, 0.4, 0.4, 1.5)),
    "TH": ((0.18, 0.00, 0.15, 0.00), (0.8, 0.3, 0.3, 0.8)),
    "DD": ((0.20, 0.00, 0.15, 0.00), (0.6, 0.15, 0.15, 0.8)),
    "SS": ((0.10, 0.00, 0.30, 0.00), (1.2, 0.4, 0.5, 0.8)),
    "SH": ((0.15, 0.60, 0.00, 0.00), (1.2, 1.0, 0.6, 0.8)),
    "KK": ((0.25, 0.00, 0.05, 0.00), (0.4, 0.1, 0.1, 0.8)),
    "RR": ((0.25, 0.45, 0.00, 0.00), (0.8, 0.8, 0.5, 0.8)),
    "IY": ((0.25, 0.00, 0.70, 0.00), (1.0, 1.0, 1.2, 1.0)),
    "EH": ((0.50, 0.00, 0.50, 0.00), (1.2, 1.0, 1.0, 1.0)),
    "AA": ((0.90, 0.00, 0.15, 0.00), (1.4, 0.8, 0.6, 1.0)),
    "AH": ((0.45, 0.00, 0.10, 0.00), (0.7, 0.4, 0.3, 1.0)),
    "OH": ((0.60, 0.60, 0.00, 0.00), (1.3, 1.2, 0.8, 1.0)),
    "UW": ((0.20, 0.95, 0.00, 0.00), (1.2, 1.6, 1.0, 1.0)),
}
VISEME_NAMES = tuple(VISEMES)

# Phone: its viseme, or the two of a diphthong with the share of the first; own targets where it differs from its class.
_SIMPLE = {
    "sil": "pau", "PP": "p b m", "FF": "f v", "TH": "th dh", "DD": "t d n l", "SS": "s z", "SH": "sh zh ch jh", "KK": "k g ng",
    "RR": "r er", "IY": "iy ih y", "EH": "eh", "AA": "aa ae", "AH": "ah ax hh", "OH": "ao", "UW": "uw uh w",
}  # fmt: skip
_DIPHTHONGS = {
    "ay": ("AA", 0.6, "IY"), "aw": ("AA", 0.6, "UW"), "ow": ("OH", 0.6, "UW"), "oy": ("OH", 0.55, "IY"),
    "ey": ("EH", 0.55, "IY"),
}  # fmt: skip
_OWN_TARGETS = {
    "l": (0.28, 0.0, 0.15, 0.0), "er": (0.32, 0.45, 0.0, 0.0), "ih": (0.32, 0.0, 0.45, 0.0), "y": (0.2, 0.0, 0.7, 0.0),
    "ae": (0.8, 0.0, 0.4, 0.0), "ah": (0.55, 0.0, 0.1, 0.0), "hh": (0.35, 0.0, 0.1, 0.0), "uh": (0.28, 0.55, 0.0, 0.0),
    "w": (0.15, 1.0, 0.0, 0.0),
}  # fmt: skip
PHONES: dict[str, tuple[tuple[str, float], ...]] = {
    **{phone: ((viseme, 1.0),) for viseme, phones in _SIMPLE.items() for phone in phones.split()},
    **{phone: ((first, share), (second, 1.0 - share)) for phone, (first, share, second) in _DIPHTHONGS.items()},
}
BILABIALS = ("p", "b", "m")

_TAU_BEFORE = np.array([0.06, 0.11, 0.08, 0.045])  # seconds; pursing is anticipated longest
_TAU_AFTER = np.array([0.06, 0.08, 0.07, 0.045])
_CLOSURE_HALF = 0.030  # a bilabial closure lasts at least twice this, so that a frame of 40 ms always falls into it
_CLOSURE_RAMP = 0.050  # seconds in which the lips reach it


def units(phones: Sequence[tuple[str, float, float]]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Timed phones (name, start, end) to units, a diphthong being two; unknown names count as a pause.

    Returns: visemes [U], spans [U, 2] in seconds, targets [U, 4], dominances [U, 4].
    """
    names, spans, targets, dominances = [], [], [], []
    for phone, start, end in phones:
        phone = phone.lower().rstrip("012")
        at = start
        for viseme, share in PHONES.get(phone, (("sil", 1.0),)):
            until = at + share * (end - start)
            target, dominance = VISEMES[viseme]
            names.append(viseme)
            spans.append((at, until))
            targets.append(_OWN_TARGETS.get(phone, target))
            dominances.append(dominance)
            at = until
    return names, np.array(spans), np.array(targets), np.array(dominances)


def mouth_curves(phones: Sequence[tuple[str, float, float]], times: np.ndarray) -> np.ndarray:
    """The four curves at given times.

    y_k(t) = sum_u D_uk(t) T_uk / sum_u D_uk(t), D_uk = dominance_uk exp(-before / tau_before_k - after / tau_after_k), with
    distances in time measured from the middle half of unit u. Then the closures of p, b and m are made complete.

    Args: phones (name, start, end) in seconds; times [T] seconds.
    Returns: [T, 4] float32 in 0..1, in the order of CURVES.
    """
    _, spans, targets, dominances = units(phones)
    quarter = (spans[:, 1] - spans[:, 0])[:, None] / 4
    before = np.maximum(spans[:, :1] + quarter - times, 0.0)  # [U, T]: the unit is still to come
    after = np.maximum(times - (spans[:, 1:] - quarter), 0.0)
    curves = np.empty((len(times), len(CURVES)))
    for k in range(len(CURVES)):
        weight = dominances[:, k, None] * np.exp(-before / _TAU_BEFORE[k] - after / _TAU_AFTER[k]) + 1e-12
        curves[:, k] = (weight * targets[:, k, None]).sum(0) / weight.sum(0)
    curves = gaussian_filter1d(curves, sigma=0.015 * _rate(times), axis=0, mode="nearest")
    return close_lips(curves, closure_track(phones, times)).astype(np.float32)


def closure_track(phones: Sequence[tuple[str, float, float]], times: np.ndarray) -> np.ndarray:
    """How far a bilabial closes the lips, 0..1 [T]: 1 through the phone's middle, raised-cosine ramps around it."""
    closed = np.zeros(len(times))
    for phone, start, end in phones:
        if phone.lower() not in BILABIALS:
            continue
        middle, half = (start + end) / 2, max(_CLOSURE_HALF, (end - start) / 2 - 0.02)
        distance = np.clip((np.abs(times - middle) - half) / _CLOSURE_RAMP, 0.0, 1.0)
        closed = np.maximum(closed, 0.5 + 0.5 * np.cos(np.pi * distance))
    return closed


def close_lips(curves: np.ndarray, closed: np.ndarray) -> np.ndarray:
    """Let a closure win over whatever else the curves ask: no opening, full press. [T, 4], [T] to [T, 4]."""
    curves = curves.copy()
    curves[:, 0] *= 1.0 - closed
    curves[:, 3] = np.maximum(curves[:, 3] * (1.0 - closed), closed)
    return curves


def viseme_track(phones: Sequence[tuple[str, float, float]], times: np.ndarray) -> np.ndarray:
    """The viseme heard at each time: indices into VISEME_NAMES [T], int64."""
    names, spans, _, _ = units(phones)
    unit = np.clip(np.searchsorted(spans[:, 1], times, side="right"), 0, len(names) - 1)
    return np.array([VISEME_NAMES.index(name) for name in names])[unit]


def emphasise(curves: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Open wider where the speaker is loud: the opening times 0.7 to 1.2 by level.

    Args: curves [T, 4]; level [T] in dB relative to the clip's loud passages (its 95th percentile).
    """
    curves = curves.copy()
    curves[:, 0] = np.clip(curves[:, 0] * np.clip(1.15 + 0.02 * level, 0.7, 1.2), 0.0, 1.1)
    return curves


def _rate(times: np.ndarray) -> float:
    return 1.0 / float(times[1] - times[0]) if len(times) > 1 else CURVE_RATE
