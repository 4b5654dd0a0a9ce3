"""The training corpus: mel spectrograms with the mouth curves that belong to them, at 80 values a second."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter1d

from ..speech import HOP, SAMPLE_RATE, mel_spectrogram
from .text import HELD_OUT, passage
from .visemes import CURVE_RATE, CURVES, emphasise, mouth_curves, viseme_track
from .voices import Utterance, available_voices, speak

# Utterances of 5 to 12 s for one voice: the smoother the voice, the more of it.
UTTERANCES = {"flite": 72, "festival": 42, "espeak": 9}
HELD_OUT_VOICES = ("flite:slt", "flite:rms", "flite:awb", "flite:kal16")
ALIGNED_PEAK = 0.7


@dataclass(frozen=True)
class Corpus:
    """Clips laid end to end.

    mel [N, 80] float16 in -4..4; curves [N, 4] float16 (visemes.CURVES); viseme [N] int8 (visemes.VISEME_NAMES, -1 where
    only the curves are known); bounds [clips + 1], the first frame of each clip; voices: one name per clip.
    """

    mel: np.ndarray
    curves: np.ndarray
    viseme: np.ndarray
    bounds: np.ndarray
    voices: tuple[str, ...]

    @property
    def clips(self) -> int:
        return len(self.bounds) - 1

    def clip(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """mel [n, 80], curves [n, 4], viseme [n] of one clip, as float32 and int64."""
        rows = slice(self.bounds[index], self.bounds[index + 1])
        return self.mel[rows].astype(np.float32), self.curves[rows].astype(np.float32), self.viseme[rows].astype(np.int64)

    def select(self, keep: Iterable[int]) -> Corpus:
        """The chosen clips, in the given order."""
        keep = list(keep)
        rows = [slice(self.bounds[i], self.bounds[i + 1]) for i in keep]
        lengths = [self.bounds[i + 1] - self.bounds[i] for i in keep]
        return Corpus(
            *(np.concatenate([array[r] for r in rows]) for array in (self.mel, self.curves, self.viseme)),
            np.concatenate([[0], np.cumsum(lengths)]),
            tuple(self.voices[i] for i in keep),
        )

    def __add__(self, other: Corpus) -> Corpus:
        pairs = zip((self.mel, self.curves, self.viseme), (other.mel, other.curves, other.viseme), strict=True)
        bounds = np.concatenate([self.bounds, self.bounds[-1] + other.bounds[1:]])
        return Corpus(*(np.concatenate(pair) for pair in pairs), bounds, self.voices + other.voices)

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".part.npz")
        arrays = {"mel": self.mel, "curves": self.curves, "viseme": self.viseme, "bounds": self.bounds}
        np.savez(temporary, **arrays, voices=np.array(self.voices))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in ("mel", "curves", "viseme", "bounds")]
            return cls(*arrays, tuple(str(voice) for voice in file["voices"]))

    @classmethod
    def join(cls, clips: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]]) -> Corpus:
        """From clips (mel, curves, viseme, voice)."""
        mel, curves, viseme, voices = zip(*clips, strict=True)
        return cls(
            np.concatenate(mel).astype(np.float16),
            np.concatenate(curves).astype(np.float16),
            np.concatenate(viseme).astype(np.int8),
            np.concatenate([[0], np.cumsum([len(m) for m in mel])]),
            tuple(voices),
        )


def label(utterance: Utterance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mel, curves and visemes of an utterance with timed phones."""
    samples = utterance.samples * (ALIGNED_PEAK / max(1e-6, float(np.abs(utterance.samples).max())))
    mel = mel_spectrogram(torch.from_numpy(samples)).numpy()
    times = np.arange(len(mel)) / CURVE_RATE
    curves = emphasise(mouth_curves(utterance.phones, times), relative_level(samples, len(mel)))
    return mel, curves, viseme_track(utterance.phones, times)


def relative_level(samples: np.ndarray, frames: int) -> np.ndarray:
    """Level over 120 ms at each mel frame, in dB relative to the clip's 95th percentile: [frames]."""
    power = uniform_filter1d(np.square(samples, dtype=np.float64), int(0.12 * SAMPLE_RATE), mode="nearest")
    level = 10 * np.log10(np.maximum(power[np.minimum(np.arange(frames) * HOP, len(samples) - 1)], 1e-9))
    return level - np.percentile(level, 95)


def synthesise(work: Path, processes: int = 2, scale: float = 1.0) -> Corpus:
    """Speak and label the whole synthetic corpus (about 70 minutes of speech), or read it back from `work`/synthetic.npz.

    Args: scale: how much of it, 1 all. Raises RuntimeError when no synthesiser is installed.
    """
    path = work / "synthetic.npz"
    if path.exists():
        return Corpus.load(path)
    voices = available_voices()
    if not any(voice.startswith("flite:") for voice in voices):
        raise RuntimeError("flite is not installed: install it (Debian: apt-get install flite) or give a ready corpus.")
    jobs = []
    for voice in voices:
        count = max(1, round(scale * UTTERANCES[voice.split(":")[0]]))
        jobs += [(voice, seed) for seed in range(count)]
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        clips = [clip for clip in pool.map(_synthesise_one, jobs, chunksize=8) if clip is not None]
    corpus = Corpus.join(clips)
    corpus.save(path)
    return corpus


def _synthesise_one(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str] | None:
    voice, seed = job
    rng = random.Random(f"{voice} {seed}")
    text = passage(rng, rng.randint(2, 3))
    formants = rng.uniform(0.86, 1.2)
    pitch = formants**1.5 * rng.uniform(0.8, 1.3)  # small heads speak higher
    try:
        utterance = speak(voice, text, stretch=rng.uniform(0.75, 1.3), pitch=pitch, formants=formants)
    except RuntimeError as error:
        print(f"left out one utterance: {error}")
        return None
    return *label(utterance), voice


def held_out_utterances() -> list[Utterance]:
    """Sentences and settings that training never sees, in the flite voices."""
    rng = random.Random(7)
    return [
        speak(voice, text, stretch=rng.uniform(0.9, 1.15), pitch=rng.uniform(0.9, 1.1))
        for text in HELD_OUT
        for voice in HELD_OUT_VOICES
    ]


def read_facegood(folder: Path) -> Corpus:
    """FACEGOOD-Audio2Face's clips (MIT): a recorded voice with animated mouth controls, brought to the same four curves.

    Args: folder with fg_*.flac (16 kHz mono), fg_*.npz (controls [T, 25] at 30 fps, names) and controls.json (the weights
    of the controls and each clip's lag). Raises FileNotFoundError when it holds no such clip.
    """
    import soundfile

    sheet = json.loads((folder / "controls.json").read_text())
    weights = {control["name"]: control["weights"] for control in sheet["controls"]}
    lags = {clip["file"]: clip["jaw_vs_log_energy"]["lag_frames"] for clip in sheet["clips"]}
    clips = []
    for path in sorted(folder.glob("fg_*.npz")):
        samples, _ = soundfile.read(path.with_suffix(".flac"), dtype="float32")
        samples *= ALIGNED_PEAK / np.abs(samples).max()
        mel = mel_spectrogram(torch.from_numpy(samples)).numpy()
        with np.load(path, allow_pickle=False) as file:
            controls, names = file["controls"].astype(np.float32), [str(name) for name in file["names"]]
            matrix = np.array([[weights[name].get(curve, 0.0) for curve in CURVES] for name in names])
            mixed = np.clip(controls @ matrix, 0.0, 1.0)
            mixed[:, 0] *= 1.0 - mixed[:, 3]
            instants = np.arange(len(mel)) / CURVE_RATE * float(file["fps"]) + lags[path.stem]
        curves = np.stack([np.interp(instants, np.arange(len(mixed)), column) for column in mixed.T], axis=1)
        clips.append((mel, curves, np.full(len(mel), -1), f"facegood:{path.stem}"))
    if not clips:
        raise FileNotFoundError(f"{folder} holds no fg_*.npz: give the folder with FACEGOOD's clips, or leave --facegood out.")
    return Corpus.join(clips)
