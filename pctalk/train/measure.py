"""How well a motion model speaks: measured on the driven face mesh, always free-running through the real pipeline.

For synthesised speech the phones are known; for recordings with a transcript they come from pocketsphinx's forced
alignment. Neither is a picture of a real mouth: the reference is what phonetics expects of the lips.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checkpoints import MotionModel
from ..emc import CANONICAL_XY, predict_emotions
from ..keypoints import EMOTIONS, FPS, LIPS, NUM_KEYPOINTS, Keypoints
from ..lac import predict_lips
from ..speech import SAMPLE_RATE, encode_speech
from .corpus import relative_level
from .expressions import VALUES, FacePrior
from .motion import SCALE, Targets
from .visemes import BILABIALS, CURVE_RATE, emphasise, mouth_curves
from .voices import Utterance

CONTACT = 0.02  # inter-ocular distances between the inner lips that count as touching
LARGEST_LAG = 4  # video frames


@dataclass(frozen=True)
class Mouth:
    """Lip gap and mouth width over time [T], in inter-ocular distances."""

    gap: np.ndarray
    width: np.ndarray


def still_face(prior: FacePrior, scale: float = SCALE) -> Keypoints:
    """A frontal face at rest to drive."""

    canonical = torch.tensor([(x, y, 0.0) for x, y in CANONICAL_XY])
    expression = torch.from_numpy(prior.neutral_exp.reshape(1, NUM_KEYPOINTS, 3)).float()
    return Keypoints(canonical, torch.eye(3)[None], torch.tensor([scale]), torch.zeros(1, 3), expression)


def drive(
    model: MotionModel, prior: FacePrior, samples: np.ndarray, style: int | torch.Tensor = 0, scale: float = SCALE
) -> Mouth:
    """What the mouth does under 16 kHz samples, with every default of the pipeline."""
    speech = encode_speech(model.audio_encoder, torch.from_numpy(samples).float(), SAMPLE_RATE)
    lips = predict_lips(model, speech, still_face(prior, scale), style=style, lips="add").offsets[:, LIPS]
    return mouth_of(prior, lips.cpu().numpy() / scale)


def mouth_of(prior: FacePrior, lips: np.ndarray) -> Mouth:
    """The mouth of lip expressions [T, 6, 3] (absolute, not relative to neutral)."""
    expression = np.zeros((len(lips), NUM_KEYPOINTS, 3))
    expression[:, list(LIPS)] = lips
    neutral = np.zeros((NUM_KEYPOINTS, 3))
    neutral[list(LIPS)] = prior.neutral_exp.reshape(NUM_KEYPOINTS, 3)[list(LIPS)]
    relative = (expression - neutral).reshape(-1, VALUES)
    return Mouth(prior.lip_gap(relative), prior.mouth_width(relative))


def reference_mouth(targets: Targets, utterance: Utterance, frames: int) -> Mouth:
    """The mouth that the phones of an utterance ask for, at 25 frames a second."""
    times = np.arange(round(frames * CURVE_RATE / FPS) + 1) / CURVE_RATE
    curves = emphasise(mouth_curves(utterance.phones, times), relative_level(utterance.samples, len(times)))
    lips = targets.lips(curves).reshape(-1, NUM_KEYPOINTS, 3)[:, list(LIPS)]
    mouth = mouth_of(targets.prior, lips)
    at = np.arange(frames) / FPS
    return Mouth(np.interp(at, times, mouth.gap), np.interp(at, times, mouth.width))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two tracks, over their common length; 0 when one of them is constant."""
    n = min(len(a), len(b))
    a, b = a[:n] - a[:n].mean(), b[:n] - b[:n].mean()
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def best_correlation(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, int]:
    """The highest correlation within 4 frames either way, and its lag (positive: the prediction is late)."""
    found = []
    for lag in range(-LARGEST_LAG, LARGEST_LAG + 1):
        shifted = (predicted[lag:], reference[: len(reference) - lag]) if lag >= 0 else (predicted[:lag], reference[-lag:])
        found.append((correlation(*shifted), lag))
    return max(found)


def closures(mouth: Mouth, phones: Sequence[tuple[str, float, float]]) -> list[float]:
    """The smallest lip gap at each p, b, m: within the phone and 20 ms around it."""
    gaps = []
    for phone, start, end in phones:
        if phone.lower() in BILABIALS:
            first, last = int(np.ceil((start - 0.02) * FPS)), int(np.floor((end + 0.02) * FPS))
            during = mouth.gap[max(0, first) : last + 1]
            if len(during):
                gaps.append(float(during.min()))
    return gaps


def align(samples: np.ndarray, transcript: str) -> tuple[tuple[str, float, float], ...] | None:
    """Phones of a recording (16 kHz) by pocketsphinx, or None where the transcript does not fit."""
    from pocketsphinx import Decoder

    pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    decoder = Decoder(samprate=SAMPLE_RATE, lm=None, bestpath=False, loglevel="FATAL")
    words = re.sub(r"[^a-z' ]+", " ", transcript.lower()).split()
    known = [word for word in words if decoder.lookup_word(word)]
    if len(known) < 0.95 * len(words):
        return None
    try:
        decoder.set_align_text(" ".join(known))
        for second in (False, True):
            if second:
                decoder.set_alignment()
            decoder.start_utt()
            decoder.process_raw(pcm, full_utt=True)
            decoder.end_utt()
        return tuple((p.name, p.start / 100, (p.start + p.duration) / 100) for word in decoder.get_alignment() for p in word)
    except RuntimeError:
        return None


def read_recordings(folder: Path) -> list[Utterance]:
    """Recordings VOICE-NAME.wav with transcripts VOICE-NAME.txt, aligned; those that can't be aligned are left out."""
    import librosa

    found = []
    for path in sorted(folder.glob("*.wav")):
        samples, _ = librosa.load(path, sr=SAMPLE_RATE)
        phones = align(samples, path.with_suffix(".txt").read_text())
        if phones is None:
            print(f"{path.name}: the transcript does not fit, left out")
        else:
            found.append(Utterance(samples, phones, path.stem.split("-")[0]))
    return found


def agreement(model: MotionModel, targets: Targets, utterances: Sequence[Utterance]) -> dict[str, dict[str, float]]:
    """Per voice, how the driven mouth agrees with what the phones ask for.

    gap, width: mean r at lag 0; gap_best, width_best: at the best lag within 4 frames; lag: the mean best lag of the gap in
    frames; loudness: r of gap and loudness in dB (floor -50); mismatched: gap_best against the reference of the next utterance;
    closed: share of p, b, m whose lips come within CONTACT; phones: how many of them there are.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    mouths = [drive(model, targets.prior, u.samples) for u in utterances]
    references = [reference_mouth(targets, u, len(m.gap)) for u, m in zip(utterances, mouths, strict=True)]
    for index, (utterance, mouth, reference) in enumerate(zip(utterances, mouths, references, strict=True)):
        other = references[(index + 1) % len(references)]
        common = min(len(other.gap), len(mouth.gap))
        best, lag = best_correlation(mouth.gap, reference.gap)
        level = relative_level(utterance.samples, round(len(mouth.gap) * CURVE_RATE / FPS))
        loudness = np.interp(np.arange(len(mouth.gap)) / FPS, np.arange(len(level)) / CURVE_RATE, level).clip(-50)
        gaps = closures(mouth, utterance.phones)
        rows.setdefault(utterance.voice, []).append({
            "gap": correlation(mouth.gap, reference.gap),
            "width": correlation(mouth.width, reference.width),
            "gap_best": best,
            "width_best": best_correlation(mouth.width, reference.width)[0],
            "lag": lag,
            "loudness": correlation(mouth.gap, loudness),
            "mismatched": best_correlation(mouth.gap[:common], other.gap[:common])[0],
            "closed": sum(gap <= CONTACT for gap in gaps),
            "phones": len(gaps),
        })  # fmt: skip
    table = {}
    for voice, found in rows.items():
        table[voice] = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
        table[voice]["phones"] = sum(row["phones"] for row in found)
        table[voice]["closed"] = sum(row["closed"] for row in found) / max(1, table[voice]["phones"])
    return table


def steadiness(model: MotionModel, prior: FacePrior, utterance: Utterance) -> dict[str, float]:
    """Silence and drift: mean and largest gap in 10 s of faint noise after speech, and how far the mean gap of the last
    10 s of a minute of speech is from that of the first 10 s (the same words)."""
    random = np.random.default_rng(0)
    faint = (random.standard_normal(10 * SAMPLE_RATE) * 1e-3).astype(np.float32)
    start = int(FPS * len(utterance.samples) / SAMPLE_RATE) + int(FPS)
    silent = drive(model, prior, np.concatenate([utterance.samples, faint])).gap[start:]
    ten = np.resize(utterance.samples, 10 * SAMPLE_RATE)
    minute = drive(model, prior, np.tile(ten, 6)).gap
    window = int(10 * FPS)
    return {
        "silent_gap": float(silent.mean()),
        "silent_gap_max": float(silent.max()),
        "silent_jitter": float(np.abs(np.diff(silent)).mean()),
        "drift": float(abs(minute[-window:].mean() - minute[:window].mean())),
    }


def style_spread(model: MotionModel, prior: FacePrior, utterance: Utterance) -> dict[int, tuple[float, float, float]]:
    """Per style id: the 95th percentile of the gap, the 5th and the 95th of the width."""
    found = {}
    for style in range(model.styles):
        mouth = drive(model, prior, utterance.samples, style)
        found[style] = (float(np.percentile(mouth.gap, 95)), *(float(p) for p in np.percentile(mouth.width, (5, 95))))
    return found


def emotion_shapes(model: MotionModel, targets: Targets, samples: np.ndarray) -> dict[str, dict[str, float]]:
    """Per emotion at intensity 1: cosine of the mean expression to the designed one, its size relative to it, and which
    emotion's design it is nearest to (as a cosine to the runner-up)."""
    speech = encode_speech(model.audio_encoder, torch.from_numpy(samples).float(), SAMPLE_RATE)
    found = predict_emotions(model, speech, still_face(targets.prior), [name for name in EMOTIONS if name != "neutral"])
    designs = targets.expressions.emotions @ targets.prior.basis.reshape(VALUES, -1)
    table = {}
    for name, deformation in found.items():
        mean = deformation.offsets.mean(0).reshape(VALUES).numpy() / SCALE @ targets.prior.basis.reshape(VALUES, -1)
        cosines = {
            other: float(mean @ design / (np.linalg.norm(mean) * np.linalg.norm(design)))
            for other, design in zip(EMOTIONS, designs, strict=True)
            if other != "neutral"
        }
        own = cosines.pop(name)
        table[name] = {
            "cosine": own,
            "size": float(np.linalg.norm(mean) / np.linalg.norm(designs[EMOTIONS.index(name)])),
            "runner_up": max(cosines.values()),
        }
    return table
