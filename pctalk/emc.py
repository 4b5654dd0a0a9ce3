"""EMC, emotion control: what an emotion adds to the whole face, at any intensity, region by region.

    D_e = CPred(emotion, audio) - CPred(neutral, audio)

All emotions of a recording and the neutral one run as one batch. Zero is exactly zero: neutral, intensity 0 and the
keypoints outside a region carry no motion at all. Follows PC-Talk (CVPR 2026, arXiv 2503.14295).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .checkpoints import MotionModel
from .keypoints import EMOTIONS, FPS, REGIONS, Deformation, Keypoints, region_mask, sum_deformations
from .networks.decoder import unflatten_keypoints, windows
from .networks.emotion import EmotionPredictor
from .speech import Speech

CONDITION_WINDOWS = 32  # windows conditioned at a time: 26 s; bounds the memory for long recordings
SOFTEST_REACH = 0.5  # how far, in canonical keypoint units, a region with softness 1 reaches

# Mean canonical x and y of the keypoints in the driving templates that LivePortrait publishes (MIT licence).
CANONICAL_XY = (
    *((0.135, -0.514), (-0.408, -0.470), (0.227, -0.425), (-0.361, 0.245), (0.448, 0.082), (0.023, 0.249), (-0.531, 0.095)),
    *(
        (0.386, 0.383),
        (-0.487, -0.073),
        (0.438, -0.293),
        (-0.180, -0.118),
        (-0.161, -0.110),
        (-0.159, -0.094),
        (-0.160, -0.087),
    ),
    *((0.182, -0.047), (0.199, -0.097), (0.213, -0.078), (-0.030, 0.239), (0.115, 0.294), (0.013, 0.284), (0.007, 0.254)),
)


def predict_emotions(
    model: MotionModel,
    speech: Speech,
    keypoints: Keypoints,
    emotions: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Deformation]:
    """What each emotion adds to neutral speech, at intensity 1, on all 21 keypoints.

    Args: emotions: names of EMOTIONS, repeats allowed; progress(done, total) in frames.
    Returns: one deformation per emotion, [T, 21, 3] in K space on the keypoints' device, T = speech.frames; `neutral` is
    exactly zero. Raises ValueError for an unknown emotion.
    """
    for emotion in emotions:
        if emotion not in EMOTIONS:
            raise ValueError(f"Unknown emotion {emotion!r}: choose one of {', '.join(EMOTIONS)}.")
    device = keypoints.expression.device
    batch = ["neutral", *dict.fromkeys(emotion for emotion in emotions if emotion != "neutral")]
    offsets = {"neutral": torch.zeros(speech.frames, len(REGIONS["all"]), 3, device=device)}
    if len(batch) > 1:
        codes = torch.eye(len(EMOTIONS), device=model.device)[[EMOTIONS.index(emotion) for emotion in batch]]
        motion = emotion_motion(model.emc, speech.features, codes, progress=progress).to(device)
        offsets |= {emotion: motion[row] - motion[0] for row, emotion in enumerate(batch) if row}
    return {emotion: Deformation(offsets[emotion], FPS, ("all",)) for emotion in emotions}


def predict_emotion(
    model: MotionModel,
    speech: Speech,
    keypoints: Keypoints,
    *,
    emotion: str,
    intensity: float = 0.5,
    region: str = "all",
    progress: Callable[[int, int], None] | None = None,
) -> Deformation:
    """One emotion at an intensity in a region: intensity * D_e there, exactly zero elsewhere.

    Raises ValueError for an unknown emotion or region.
    """
    region_mask(region)
    return predict_emotions(model, speech, keypoints, [emotion], progress=progress)[emotion].masked(region).scaled(intensity)


def mix_regions(rows: Sequence[tuple[Deformation, str, float]], seam_softness: float = 0.0) -> Deformation:
    """Compose deformations by region: the sum of weight * region mask * D over the rows, whatever their order.

    Args: rows of (deformation, region, weight); seam_softness 0..1: 0 is the published hard mask, above it see `soft_mask`.
    Raises ValueError without rows, for an unknown region or a softness outside 0..1.
    """
    parts = [
        Deformation(
            deformation.offsets * (soft_mask(region, seam_softness, deformation.offsets.device) * weight)[:, None],
            deformation.fps,
            (region,),
        )
        for deformation, region, weight in rows
    ]
    return sum_deformations(parts)


def soft_mask(region: str, softness: float, device: torch.device | None = None) -> Tensor:
    """A region's mask with soft seams: [21], 1 inside, 0 on the keypoints of other regions.

    The keypoints that belong to no region (3 4 5 7 8 9 10: cheeks, jaw, temples) get (1 + cos(pi d / r)) / 2 within
    r = softness / 2 of the region, d being the canonical distance to its nearest keypoint in the image plane.
    """
    if not 0.0 <= softness <= 1.0:
        raise ValueError(f"The seam softness is {softness}, expected 0 (hard) to 1.")
    mask = region_mask(region, device)
    if softness == 0.0:
        return mask
    canonical = torch.tensor(CANONICAL_XY, device=device)
    distance = torch.cdist(canonical, canonical[mask > 0]).amin(dim=1)
    soft = 0.5 * (1.0 + torch.cos(math.pi * (distance / (softness * SOFTEST_REACH)).clamp(max=1.0)))
    owned = region_mask("upper_face", device) + region_mask("lower_face", device)
    return torch.where(owned > 0, mask, torch.maximum(mask, soft))


@torch.no_grad()
def emotion_motion(
    predictor: EmotionPredictor,
    features: Tensor,
    emotions: Tensor,
    style: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """CPred of a whole recording under several emotions, as one batch.

    The condition on the emotion starts afresh in every window, so windows and emotions are one batch; the decoder starts
    each window from the end of the one before, so its batch is the emotions.

    Args: features [T, 512]; emotions [E, 8] one-hot; style: the person id. Returns: [E, T, 21, 3] in K space.
    """
    device, frames, window = emotions.device, features.shape[0], predictor.window
    decoder = predictor.prepared(predictor.style(torch.full((len(emotions),), style, device=device)))
    cuts = list(windows(frames, window))
    pieces = []
    for first in range(0, len(cuts), CONDITION_WINDOWS):
        group = cuts[first : first + CONDITION_WINDOWS]
        # The last window may be short: the frames that fill it up are never read, and later frames don't act on earlier.
        index = torch.tensor([start for start, _, _ in group])[:, None] + torch.arange(min(window, frames))
        heard = features[index.clamp(max=frames - 1).to(features.device)].to(device)
        cross = decoder.cross(predictor.condition(heard, emotions.repeat_interleave(len(group), dim=0)))
        cross = cross.unflatten(0, (len(emotions), len(group)))
        for number, (start, end, warm) in enumerate(group):
            pieces.append(decoder(cross[:, number, : end - start], pieces[-1][:, -warm:] if warm else None))
            if progress is not None:
                progress(end, frames)
    return unflatten_keypoints(torch.cat(pieces, dim=1))
