"""Speech as the motion networks hear it: waveform to mel spectrogram to audio-visual features, and its loudness.

The front end is Wav2Lip's, as PC-Talk uses it: 16 kHz, pre-emphasis, 80 mel bands every 12.5 ms; the video frame i of
25 a second hears 16 of them (0.2 s) from number int(3.2 i) on. The published frame count stops when those 16 no longer
fit, 0.2 s before the sound does. Here the last mel frame is held instead, so the motion lasts as long as the sound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .keypoints import FPS, frame_count
from .networks.audio_encoder import MEL_BANDS, MEL_WINDOW, AudioEncoder

SAMPLE_RATE = 16000
PRE_EMPHASIS = 0.97
FFT_SIZE = 800
HOP = 200
MEL_LOW, MEL_HIGH = 55.0, 7600.0
SHORTEST_SECONDS = 0.1
SILENCE = -60.0  # dB relative to full scale
LOUDNESS_FLOOR = -80.0
LOUDNESS_WINDOW = 1280  # samples: two video frames, several periods of the lowest voice
MEL_CHUNK = 4096  # mel frames transformed at a time: 51 s
ENCODE_CHUNK = 64  # video frames encoded at a time: what fits the processor's cache is fastest


@dataclass(frozen=True)
class Speech:
    """What the motion networks need of a recording.

    features [T, 512], audio-visual features; loudness [T], dB relative to full scale: the RMS of the 80 ms around the
    middle of each video frame, at least -80 (a full-scale sine is -3); fps; seconds: how long the sound lasts.
    T == frame_count(seconds, fps).
    """

    features: Tensor
    loudness: Tensor
    fps: float = FPS
    seconds: float = 0.0

    @property
    def frames(self) -> int:
        return self.features.shape[0]

    def to(self, device: torch.device | str) -> Speech:
        return replace(self, features=self.features.to(device), loudness=self.loudness.to(device))


def load_mono(waveform: Tensor, sample_rate: int) -> Tensor:
    """One channel at 16 kHz, checked.

    Args: waveform [N], [C, N] or [1, C, N] (ComfyUI's AUDIO), float in -1..1 or integer PCM; sample_rate in Hz.
    Returns: [N'] float32 at 16 kHz, on the same device. Channels are averaged; other rates go through soxr.
    Raises ValueError when the sound is empty, shorter than 0.1 s, silent (below -60 dB throughout), not finite, not
    scaled to -1..1, or a batch of several.
    """
    if sample_rate <= 0:
        raise ValueError(f"The sample rate is {sample_rate} Hz, expected a positive number: load the audio again.")
    if waveform.dim() == 3:
        if waveform.shape[0] != 1:
            raise ValueError(f"The audio is a batch of {waveform.shape[0]} recordings, expected one: choose one of them first.")
        waveform = waveform[0]
    if waveform.dim() not in (1, 2):
        raise ValueError(f"The waveform has shape {list(waveform.shape)}, expected [channels, samples].")
    if waveform.numel() == 0:
        raise ValueError("The audio is empty: choose a recording with sound in it.")
    seconds = waveform.shape[-1] / sample_rate
    if seconds < SHORTEST_SECONDS:
        raise ValueError(
            f"The audio lasts {seconds:.3f} s, at least {SHORTEST_SECONDS} s are needed: choose a longer recording."
        )
    waveform = _as_float(waveform)
    low, high = waveform.aminmax()  # NaN and infinity survive it
    peak = torch.maximum(-low, high)
    if not torch.isfinite(peak):
        raise ValueError("The audio holds NaN or infinite samples: export it again or repair it before encoding.")
    if peak > 16.0:
        raise ValueError(f"The audio peaks at {peak:.0f}, expected samples in -1..1: divide integer samples by full scale.")
    if waveform.dim() == 2:
        waveform = waveform.mean(dim=0)
    if sample_rate != SAMPLE_RATE:
        import soxr

        resampled = soxr.resample(waveform.cpu().numpy(), sample_rate, SAMPLE_RATE)
        waveform = torch.from_numpy(resampled).to(waveform.device)
    if loudness_envelope(waveform).amax() < SILENCE:
        raise ValueError(f"The audio is silent (below {SILENCE:.0f} dB throughout): choose a recording with speech in it.")
    return waveform


def _as_float(waveform: Tensor) -> Tensor:
    if waveform.is_floating_point():
        return waveform.float()
    if waveform.dtype == torch.uint8:  # 8-bit PCM is centred on 128
        return (waveform.float() - 128.0) / 128.0
    return waveform.float() / -float(torch.iinfo(waveform.dtype).min)


@functools.cache
def mel_filters() -> Tensor:
    """librosa's 80 Slaney mel bands over 55-7600 Hz, area-normalised: [80, 401] float32.

    The first call imports librosa, which takes a second or two: loading a motion model makes it.
    """
    import librosa

    bands = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=FFT_SIZE, n_mels=MEL_BANDS, fmin=MEL_LOW, fmax=MEL_HIGH)
    return torch.from_numpy(bands)


def mel_spectrogram(waveform: Tensor) -> Tensor:
    """Wav2Lip's mel spectrogram: waveform [N] at 16 kHz to [N // 200 + 1, 80], one row per 12.5 ms, in -4..4."""
    samples = waveform.shape[0]
    rows = samples // HOP + 1
    window = torch.hann_window(FFT_SIZE, device=waveform.device)
    filters = mel_filters().to(waveform.device).t()
    mel = waveform.new_empty(rows, MEL_BANDS)
    for first in range(0, rows, MEL_CHUNK):
        count = min(MEL_CHUNK, rows - first)
        begin = first * HOP - FFT_SIZE // 2  # each row's 800 samples are centred on a multiple of HOP
        end = begin + (count - 1) * HOP + FFT_SIZE
        heard = F.pad(waveform[max(begin - 1, 0) : end], (1 if begin <= 0 else 0, 0))  # one sample more, for the emphasis
        emphasised = heard[1:] - PRE_EMPHASIS * heard[:-1]
        segments = F.pad(emphasised, (max(-begin, 0), max(end - samples, 0))).unfold(0, FFT_SIZE, HOP)
        bands = torch.fft.rfft(segments * window).abs() @ filters
        decibels = 20.0 * bands.clamp(min=1e-5).log10() - 20.0
        mel[first : first + count] = (8.0 * (decibels + 100.0) / 100.0 - 4.0).clamp(-4.0, 4.0)
    return mel


def mel_windows(mel: Tensor, frames: int, first: int = 0) -> Tensor:
    """What video frames hear: mel [n_mel, 80] to [frames, 1, 80, 16] for the frames from number `first` on.

    Frame i sees the 16 mel frames from int(3.2 i) on (25 video frames a second); past its end the mel is held.
    """
    start = torch.arange(first, first + frames, device=mel.device) * 16 // 5
    index = start[:, None] + torch.arange(MEL_WINDOW, device=mel.device)
    return mel[index.clamp(max=mel.shape[0] - 1)].transpose(1, 2)[:, None]


def loudness_envelope(waveform: Tensor, frames: int | None = None) -> Tensor:
    """Loudness at 25 frames a second: waveform [N] at 16 kHz to [frames] (default: frame_count(N / 16000, 25)).

    In dB relative to full scale: RMS of the 1280 samples around the middle of each frame (those that exist), at least -80.
    """
    frames = frame_count(waveform.shape[0] / SAMPLE_RATE, FPS) if frames is None else frames
    block = LOUDNESS_WINDOW // 4  # a frame lasts two blocks; its window adds the one before and the one after
    blocks = F.pad(waveform, (0, -waveform.shape[0] % block)).unflatten(0, (-1, block))
    energy = torch.linalg.vector_norm(blocks, dim=1).square()
    samples = torch.full_like(energy, block)
    samples[-1] -= -waveform.shape[0] % block
    missing = max(0, 2 * frames + 1 - len(energy))
    energy, samples = (F.pad(x, (1, missing)).unfold(0, 4, 2)[:frames].sum(dim=1) for x in (energy, samples))
    return (10.0 * (energy / samples).clamp(min=1e-30).log10()).clamp(min=LOUDNESS_FLOOR)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions in float32 on CUDA, where cuDNN would round their inputs to TF32: the features steer all that follows."""
    if device.type != "cuda":
        yield
        return
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@torch.no_grad()
def encode_speech(
    audio_encoder: AudioEncoder,
    waveform: Tensor,
    sample_rate: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Speech:
    """Features and loudness of a recording, lasting exactly as long as it does (to half a frame).

    Args: audio_encoder: the network; waveform and sample_rate: see `load_mono`; progress(done, total) in video frames.
    Returns: Speech on the waveform's device. Memory beyond the waveform, its mel and the features is bounded by a chunk.
    """
    mono = load_mono(waveform, sample_rate)
    seconds = waveform.shape[-1] / sample_rate
    frames = frame_count(seconds, FPS)
    encoder = audio_encoder.folded()
    mel = mel_spectrogram(mono).to(next(encoder.parameters()).device)
    features = []
    with _full_precision(mel.device):
        for first in range(0, frames, ENCODE_CHUNK):
            count = min(ENCODE_CHUNK, frames - first)
            windows = mel_windows(mel, count, first).contiguous(memory_format=torch.channels_last)
            features.append(encoder(windows).to(waveform.device))
            if progress is not None:
                progress(first + count, frames)
    return Speech(torch.cat(features), loudness_envelope(mono, frames), FPS, seconds)
