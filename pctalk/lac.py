"""LAC, lip-audio alignment control: what the lips do with the speech, in whose style, how far and how articulated.

    speech -> windows of the predictor, each refined and warm-started by the one before -> smoothing
           -> amplitude (and loudness) -> articulation edits -> D_l on the six lip keypoints

Follows PC-Talk (CVPR 2026, arXiv 2503.14295) and what its published inference code computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoints import MotionModel
from .keypoints import FPS, LIPS, NUM_KEYPOINTS, Deformation, Keypoints, hold
from .networks.decoder import flatten_keypoints, unflatten_keypoints, windows
from .networks.predictor import LipPredictor, Refiner
from .speech import Speech

# Directions of articulation in expression space: {keypoint: (x, y, z)}. The edits apply in this order; pursing and
# widening are not orthogonal (cosine -0.516), so the order is part of the definition.
ARTICULATION = {
    "pursing": {14: (0.0, 0.001, 0.0), 17: (0.0, 0.0, -0.0005)},
    "widening": {20: (0.0, -0.001, -0.001), 14: (0.0, -0.001, 0.0)},
    "opening": {19: (0.0, 0.001, 0.0001), 17: (0.0, -0.0001, 0.0)},
}

# The smoother's random walk, from the published inference code.
PROCESS_VARIANCE = 1e-5
OBSERVATION_VARIANCE = 1e-6
INITIAL_VARIANCE = 1.0

CROSS_CHUNK = 1024  # frames whose cross-attention is computed at a time

Gain = float | Tensor
Progress = Callable[[int, int], None]


def predict_lips(
    model: MotionModel,
    speech: Speech,
    keypoints: Keypoints,
    *,
    style: int | Tensor = 0,
    amplitude: Gain = 1.0,
    follow_loudness: float = 0.0,
    pursing: Gain = 1.0,
    widening: Gain = 1.0,
    opening: Gain = 1.0,
    lips: str = "replace",
    smoothing: bool = True,
    progress: Progress | None = None,
) -> Deformation:
    """The lip deformation D_l of a recording, ready to be added to these keypoints.

    Args: style: a preset's id, or an embedding [dim]; amplitude and the articulation gains: a number, or one per frame
    [T]; follow_loudness 0..1: how much the amplitude follows the loudness (see `loudness_gain`); lips: `replace` gives
    the offset that replaces the lip expression of the keypoints (the published behaviour), `add` gives D_l itself;
    progress(done, total) in frames.
    Returns: offsets [T, 21, 3] in K space, zero but on the lips, on the keypoints' device; T = speech.frames.
    Raises ValueError for a style that the model does not have or an unknown `lips`.
    """
    if lips not in ("replace", "add"):
        raise ValueError(f"lips is {lips!r}, expected 'replace' or 'add'.")
    device = keypoints.expression.device
    embedding = style_embedding(model, style)
    track = (keypoints.at_fps(FPS) if keypoints.frames > 1 else keypoints).extended(speech.frames)
    undeformed = track.undeformed()[:, LIPS]
    offsets = lip_offsets(model.lac, model.refiner, speech.features, undeformed, embedding, progress).to(device)
    if smoothing:
        offsets = kalman_smooth(offsets.flatten(1)).unflatten(1, (len(LIPS), 3))
    loudness = loudness_gain(speech.loudness.to(device), follow_loudness)
    offsets = offsets * (_per_frame(amplitude, offsets) * loudness)[:, None, None]

    motion = offsets.new_zeros(speech.frames, NUM_KEYPOINTS, 3)
    motion[:, LIPS] = offsets
    motion = edit_articulation(motion, pursing=pursing, widening=widening, opening=opening)
    if lips == "replace":
        motion[:, LIPS] += undeformed - track.posed()[:, LIPS]
    return Deformation(motion, FPS, ("lips",))


def style_embedding(model: MotionModel, style: int | Tensor) -> Tensor:
    """A preset's id or an embedding [dim] as [1, dim] on the model's device. Raises ValueError when it doesn't fit."""
    if isinstance(style, Tensor) and style.is_floating_point():
        dim = model.lac.obj_vector.out_features
        if style.numel() != dim:
            raise ValueError(
                f"The style has {style.numel()} values, the motion model {model.name} expects {dim}: "
                "make the style with the same motion model."
            )
        return style.reshape(1, dim).to(model.device, torch.float32)
    if not 0 <= int(style) < model.styles:
        raise ValueError(
            f"Style {int(style)} is out of range: the motion model {model.name} has the styles 0 to {model.styles - 1}."
        )
    with torch.no_grad():
        return model.lac.style(torch.tensor([int(style)], device=model.device))


@torch.no_grad()
def lip_offsets(
    predictor: LipPredictor,
    refiner: Refiner | None,
    features: Tensor,
    undeformed: Tensor,
    style: Tensor,
    progress: Progress | None = None,
) -> Tensor:
    """The predictor over a whole recording: windows, each starting from the refined end of the one before.

    Args: refiner: None leaves the predictions as they are; features [T, 512]; undeformed [T, 6, 3], K_und on the lips;
    style [1, dim].
    Returns: D [T, 6, 3] in K space on the predictor's device.
    """
    device = style.device
    reference = flatten_keypoints(undeformed.to(device))
    decoder = predictor.prepared(style)
    cross = torch.cat([decoder.cross(predictor.audio_feature_map(part.to(device))) for part in features.split(CROSS_CHUNK)])
    pieces = []
    for start, end, warm in windows(features.shape[0], predictor.window):
        offsets = decoder(cross[None, start:end], pieces[-1][:, -warm:] if warm else None)
        if refiner is not None:
            heard, still = features[start + warm : end].to(device), reference[start + warm : end]
            offsets = refiner(still + offsets[0], heard)[None] - still
        pieces.append(offsets)
        if progress is not None:
            progress(end, features.shape[0])
    return unflatten_keypoints(torch.cat(pieces, dim=1)[0])


def edit_articulation(offsets: Tensor, *, pursing: Gain = 1.0, widening: Gain = 1.0, opening: Gain = 1.0) -> Tensor:
    """Strengthen or weaken articulations: per frame D += (k - 1) <D, v> / |v|^2 v, for each vector in turn.

    Args: offsets [T, 21, 3]; gains k: 1 leaves D as it is, 0.8 to 1.2 is what the authors call stable, one number or one
    per frame [T].
    Returns: [T, 21, 3].
    """
    for name, gain in (("pursing", pursing), ("widening", widening), ("opening", opening)):
        vector = articulation_vector(name, offsets)
        share = (offsets * vector).sum(dim=(1, 2)) / vector.square().sum()
        offsets = offsets + ((_per_frame(gain, offsets) - 1.0) * share)[:, None, None] * vector
    return offsets


def articulation_vector(name: str, like: Tensor | None = None) -> Tensor:
    """One direction of ARTICULATION as [21, 3], with the dtype and device of `like`."""
    vector = torch.zeros(NUM_KEYPOINTS, 3) if like is None else like.new_zeros(NUM_KEYPOINTS, 3)
    for keypoint, direction in ARTICULATION[name].items():
        vector[keypoint] = vector.new_tensor(direction)
    return vector


def loudness_gain(loudness: Tensor, follow: float) -> Tensor:
    """A factor on the lip amplitude that follows the volume: loudness [T] in dB to [T], 25 frames a second.

    gain = 1 + follow * (h - 1),  h = clamp(1 + (L - M) / 24 dB, 0, 1.5), averaged over 0.2 s with a Hann window.
    M is the median loudness of the speech, that is of the frames within 30 dB of the loudest. With follow = 1 the lips
    close 24 dB below the usual volume and open 1.5 times as far 12 dB above it; with 0 nothing changes.
    Raises ValueError when follow is outside 0..1.
    """
    if not 0.0 <= follow <= 1.0:
        raise ValueError(f"follow_loudness is {follow}, expected 0 (off) to 1 (full).")
    if follow == 0.0:
        return torch.ones_like(loudness)
    median = loudness[loudness > loudness.max() - 30.0].median()
    factor = (1.0 + (loudness - median) / 24.0).clamp(0.0, 1.5)
    weights = torch.hann_window(7, periodic=False, dtype=loudness.dtype, device=loudness.device)[1:-1]  # five frames
    padded = F.pad(factor[None, None], (2, 2), mode="replicate")
    return 1.0 + follow * (F.conv1d(padded, (weights / weights.sum())[None, None])[0, 0] - 1.0)


def kalman_smooth(track: Tensor) -> Tensor:
    """Rauch-Tung-Striebel smoother of a random walk that is observed with noise: [T, D] to [T, D].

    Process variance 1e-5, observation variance 1e-6, initial variance 1 around the first frame. All covariances are
    multiples of the identity, so the gains are numbers that don't depend on the track, and both passes are linear
    recurrences, solved for all frames together in float64.
    """
    frames = track.shape[0]
    gains, ratios = [], []  # of the forward pass, and between filtered and predicted variance in the backward pass
    predicted = INITIAL_VARIANCE
    for _ in range(frames):
        gains.append(predicted / (predicted + OBSERVATION_VARIANCE))
        filtered = (1.0 - gains[-1]) * predicted
        predicted = filtered + PROCESS_VARIANCE
        ratios.append(filtered / predicted)
    observed = track.cpu().double()
    gain = torch.tensor(gains, dtype=torch.float64)
    gain[0] = 1.0  # the initial mean is the first frame: nothing to correct
    forward = _linear_recurrence(1.0 - gain, gain[:, None] * observed)
    ratio = torch.tensor(ratios, dtype=torch.float64).flip(0)
    ratio[0] = 0.0  # the last frame has no successor
    smoothed = _linear_recurrence(ratio, (1.0 - ratio)[:, None] * forward.flip(0)).flip(0)
    return smoothed.to(track)


def _linear_recurrence(factor: Tensor, term: Tensor) -> Tensor:
    """x_t = factor_t x_{t-1} + term_t with x_{-1} = 0, in log2(T) doublings: factor [T], term [T, D] to [T, D]."""
    shift = 1
    while shift < len(factor) and factor[shift:].any():
        term = torch.cat([term[:shift], term[shift:] + factor[shift:, None] * term[:-shift]])
        factor = torch.cat([torch.zeros_like(factor[:shift]), factor[shift:] * factor[:-shift]])
        shift *= 2
    return term


def _per_frame(gain: Gain, track: Tensor) -> Tensor:
    """A gain as one value per frame of a track [T, ...]: a number repeated, a shorter curve held."""
    values = torch.as_tensor(gain, dtype=track.dtype, device=track.device).reshape(-1)
    return hold(values, track.shape[0])
