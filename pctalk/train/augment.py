"""Mel spectrograms as other people, rooms and microphones would give them.

Everything happens on the published front end's own output (8 (dB + 100) / 100 - 4), which is undone to power per band,
changed and redone: that is thousands of times cheaper than on waveforms, and the labels stay where they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..networks.audio_encoder import MEL_BANDS
from ..speech import MEL_HIGH, MEL_LOW

REVERB_FRAMES = 40  # mel frames (0.5 s) of sound before a segment that may still ring in it


def band_centres() -> Tensor:
    """Centre frequencies of the mel bands in Hz [80] (Slaney's scale)."""
    turn, steps = 15.0, 27.0 / math.log(6.4)
    low = MEL_LOW * 3 / 200
    high = turn + math.log(MEL_HIGH / 1000) * steps
    mel = torch.linspace(low, high, MEL_BANDS + 2)[1:-1]
    return torch.where(mel < turn, mel * 200 / 3, 1000 * torch.exp((mel - turn) / steps))


def augment(mel: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Another speaker, room, microphone and level for each row.

    Args:
        mel: [rows, 40 + n, 80] in -4..4, each row with REVERB_FRAMES frames of what came before.
        strength: 0 changes nothing, 1 is what training uses.
    Returns: [rows, n, 80].
    """
    if strength <= 0:
        return mel[:, REVERB_FRAMES:]
    rows = mel.shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(rows, *shape, generator=generator)

    def chance(probability: float) -> Tensor:
        return (torch.rand(rows, 1, 1, generator=generator) < probability).float()

    centres = band_centres()
    octaves = torch.log2(centres / 1000)
    decibels = warp_bands((mel + 4) * 12.5 - 100, 2 ** (strength * uniform(-0.22, 0.22)), centres)
    power = 10 ** (decibels / 10)
    speech_level = power.mean(dim=2).flatten(1).quantile(0.9, dim=1)[:, None, None]

    decay = 10 ** (-6 * 0.0125 / uniform(0.12, 0.8, 1))  # per mel frame, from the reverberation time
    tail = reverberate(power, decay)[:, REVERB_FRAMES:]
    wet = chance(0.5) * 10 ** (strength * uniform(-12, 2, 1, 1) / 10)
    power = power[:, REVERB_FRAMES:] + wet * tail

    noise = 10 ** (uniform(-9, 2, 1, 1) * octaves / 10 + smooth_curves(rows, 4.0, generator)[:, None] / 10)
    flicker = torch.randn(power.shape, generator=generator).mul_(0.6).exp_()
    noise = noise / noise.mean(dim=2, keepdim=True) * speech_level * 10 ** (-uniform(8, 45, 1, 1) / 10)
    power = power + chance(0.75) * noise * flicker
    babble = power.roll(1, dims=0)
    power = power + chance(0.15) * babble * 10 ** (-uniform(10, 25, 1, 1) / 10)

    colour = uniform(-3, 3, 1, 1) * octaves + smooth_curves(rows, 3.5, generator)[:, None]
    high_cut, low_cut = uniform(1.6, 2.9, 1, 1), uniform(-3.0, -1.4, 1, 1)  # octaves from 1 kHz: 3 to 7.5 kHz, 125 to 380 Hz
    colour = colour - chance(0.2) * 60 * (octaves - high_cut).clamp(0, 1) - chance(0.2) * 24 * (low_cut - octaves).clamp(0, 2)
    gain = uniform(-16, 9, 1, 1)
    decibels = 10 * power.clamp_min(1e-12).log10() + strength * (colour + gain)
    first = uniform(0, MEL_BANDS, 1, 1).floor()
    bands = torch.arange(MEL_BANDS)
    hidden = chance(0.25) * ((bands >= first) & (bands < first + uniform(2, 9, 1, 1))).float()
    decibels = decibels - 60 * hidden
    return (0.08 * (decibels + 100) - 4).clamp(-4, 4)


def reverberate(power: Tensor, decay: Tensor) -> Tensor:
    """Exponentially ringing power, the weights of past and present summing to 1: [rows, n, d], [rows, 1] to [rows, n, d]."""
    ringing = torch.empty_like(power)
    level = power[:, 0]
    for frame in range(power.shape[1]):
        level = torch.lerp(power[:, frame], level, decay)
        ringing[:, frame] = level
    return ringing


def warp_bands(decibels: Tensor, factor: Tensor, centres: Tensor) -> Tensor:
    """Move all resonances by a factor in frequency: [rows, n, 80], [rows] to [rows, n, 80]. 1.15: a smaller head."""
    wanted = centres[None] / factor[:, None]
    upper = torch.searchsorted(centres, wanted.clamp(centres[0], centres[-1]).contiguous()).clamp(1, MEL_BANDS - 1)
    weight = ((wanted - centres[upper - 1]) / (centres[upper] - centres[upper - 1])).clamp(0, 1)
    index = upper[:, None].expand(-1, decibels.shape[1], -1)
    return torch.lerp(decibels.gather(2, index - 1), decibels.gather(2, index), weight[:, None])


def smooth_curves(rows: int, decibels: float, generator: torch.Generator) -> Tensor:
    """Random smooth curves over the bands, about +-`decibels`: [rows, 80]."""
    waves = torch.cos(math.pi * torch.arange(1, 6)[:, None] * torch.linspace(0, 1, MEL_BANDS))
    return torch.randn(rows, 5, generator=generator) * decibels * 0.6 @ waves


def cut(clip: Tensor, first: float, count: int, rate: float) -> Tensor:
    """Frames first, first + rate, ... of a clip, linearly interpolated, held at its ends: [n, d] to [count, d]."""
    at = (first + rate * torch.arange(count)).clamp(0, clip.shape[0] - 1)
    lower = at.floor().long()
    upper = (lower + 1).clamp(max=clip.shape[0] - 1)
    return torch.lerp(clip[lower], clip[upper], (at - lower)[:, None].to(clip.dtype))
