"""Train the audio encoder: what a mouth does while one hears 0.2 s of sound.

The published architecture learns, from 16 mel frames, the mouth curves of the next six video frames, the visemes, and to
tell the lips that belong to the sound from those that don't (contrastive, as SyncNet). A first phase runs it fully
convolutionally over longer segments, where neighbouring windows share their work, every 75 ms one output (the network's
stride in time is six mel frames); a second phase sees single windows, as at inference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks.audio_encoder import FEATURE_DIM, MEL_WINDOW, AudioEncoder
from .augment import REVERB_FRAMES, augment, cut
from .corpus import Corpus
from .visemes import CURVES, VISEME_NAMES

STRIDE = 6  # mel frames between the outputs of the network run convolutionally
AHEAD = tuple(round(3.2 * k) for k in range(6))  # mel frames from a window's start to the video frames it predicts
VISEME_AHEAD = (1, 6)
CURVE_SPREAD = (0.24, 0.2, 0.2, 0.28)  # typical standard deviations: errors are measured in them
SHARES = {"flite": 0.46, "festival": 0.21, "espeak": 0.15, "facegood": 0.18}
EMBEDDING = 64


class Heads(nn.Module):
    """What is asked of a feature during training; none of it ships."""

    def __init__(self) -> None:
        super().__init__()
        self.curves = nn.Linear(FEATURE_DIM, len(AHEAD) * len(CURVES))
        self.visemes = nn.Linear(FEATURE_DIM, len(VISEME_AHEAD) * len(VISEME_NAMES))
        self.sound = nn.Linear(FEATURE_DIM, EMBEDDING)
        self.lips = nn.Sequential(nn.Linear(len(AHEAD) * len(CURVES), 128), nn.ReLU(), nn.Linear(128, EMBEDDING))
        self.temperature = nn.Parameter(torch.tensor(math.log(10.0)))

    def loss(self, features: Tensor, curves: Tensor, visemes: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Args: features [n, 512]; curves [n, 6, 4]; visemes [n, 2], -1 unknown. Returns: the loss and its parts."""
        spread = features.new_tensor(CURVE_SPREAD)
        predicted = self.curves(features).unflatten(1, (len(AHEAD), len(CURVES)))
        error = (predicted - curves / spread) ** 2
        # FACEGOOD's controls hardly cover widening and press: its rows teach the other two.
        animated, spoken = features.new_tensor([1.0, 1.0, 0.2, 0.2]), features.new_tensor([1.3, 1.0, 1.0, 1.0])
        weight = torch.where(visemes[:, :1, None] < 0, animated, spoken)
        regression = (error * weight).mean()
        logits = self.visemes(features).unflatten(1, (len(VISEME_AHEAD), len(VISEME_NAMES)))
        viseme = F.cross_entropy(logits.flatten(0, 1), visemes.flatten(), ignore_index=-1)
        sound = F.normalize(self.sound(features), dim=1)
        lips = F.normalize(self.lips((curves / spread).flatten(1)), dim=1)
        similarity = sound @ lips.t() * self.temperature.exp().clamp(max=50)
        match = torch.arange(len(sound))
        contrast = (F.cross_entropy(similarity, match) + F.cross_entropy(similarity.t(), match)) / 2
        loss = regression + 0.15 * viseme + 0.08 * contrast
        return loss, {"curves": regression.item(), "viseme": viseme.item(), "contrast": contrast.item()}


class Segments:
    """Draws augmented training segments."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.mel = torch.from_numpy(corpus.mel)
        self.curves = torch.from_numpy(corpus.curves)
        self.viseme = torch.from_numpy(corpus.viseme)
        self.bounds = corpus.bounds
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        lengths = np.diff(corpus.bounds).astype(float)
        engines = np.array([voice.split(":")[0] for voice in corpus.voices])
        self.weights = np.zeros(len(lengths))
        for engine, share in SHARES.items():
            chosen = engines == engine
            if chosen.any():
                self.weights[chosen] = share * lengths[chosen] / lengths[chosen].sum()
        self.weights /= self.weights.sum()

    def draw(self, rows: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Segments with `outputs` windows each, STRIDE mel frames apart.

        Returns: mel [rows, 1, 80, 16 + 6 (outputs - 1)]; curves [rows * outputs, 6, 4]; visemes [rows * outputs, 2].
        """
        width = MEL_WINDOW + STRIDE * (outputs - 1)
        reach = width + AHEAD[-1]
        starts = STRIDE * np.arange(outputs)
        mels, curves, visemes = [], [], []
        for clip in self.random.choice(len(self.weights), rows, p=self.weights):
            first, last = self.bounds[clip], self.bounds[clip + 1]
            rate = self.random.uniform(0.85, 1.2)
            at = self.random.uniform(-8, max(1, last - first - rate * width + 8))
            low = max(first, int(first + at - rate * REVERB_FRAMES) - 1)
            high = min(last, int(first + at + rate * reach) + 2)
            origin = first + at - low
            mels.append(cut(self.mel[low:high].float(), origin - rate * REVERB_FRAMES, REVERB_FRAMES + width, rate))
            track = cut(self.curves[low:high].float(), origin, reach, rate)
            curves.append(track[starts[:, None] + np.array(AHEAD)])
            seen = torch.from_numpy(origin + rate * (starts[:, None] + np.array(VISEME_AHEAD))).round().long()
            visemes.append(self.viseme[low:high][seen.clamp(0, high - low - 1)].long())
        mel = augment(torch.stack(mels), self.generator)
        return mel.transpose(1, 2)[:, None], torch.cat(curves), torch.cat(visemes)


def train_encoder(
    corpus: Corpus,
    *,
    steps: int,
    single_steps: int,
    batch: int = 128,
    outputs: int = 8,
    rate: float = 1.5e-3,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> tuple[AudioEncoder, Heads, list[float]]:
    """Train from scratch.

    Args: steps with segments of `outputs` windows, then single_steps with single windows, each about `batch` windows.
    Returns: the encoder in eval mode, its training heads, and the loss of every step.
    """
    torch.manual_seed(seed)
    encoder = AudioEncoder().train().to(memory_format=torch.channels_last)
    heads = Heads().train()
    segments = Segments(corpus, seed)
    parameters = [*encoder.parameters(), *heads.parameters()]
    total = steps + single_steps
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total + 1, pct_start=0.12)
    losses, parts_sum, started = [], {}, time.monotonic()
    for step in range(total):
        windows = outputs if step < steps else 1
        mel, curves, visemes = segments.draw(max(2, batch // windows), windows)
        features = encoder.audio_encoder(mel.contiguous(memory_format=torch.channels_last))  # [rows, 512, 1, outputs]
        features = features[:, :, 0].transpose(1, 2).flatten(0, 1)
        loss, parts = heads.loss(features, curves, visemes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        parts_sum = {name: 0.95 * parts_sum.get(name, value) + 0.05 * value for name, value in parts.items()}
        if step % 50 == 0 or step == total - 1:
            shown = " ".join(f"{name} {value:.3f}" for name, value in parts_sum.items())
            report(f"encoder {step + 1}/{total} {shown} ({time.monotonic() - started:.0f} s)")
    return encoder.eval(), heads.eval(), losses
