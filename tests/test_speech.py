import math

import pytest
import torch

from pctalk import speech as module
from pctalk.evaluate.golden import filled, relative_difference
from pctalk.networks.audio_encoder import AudioEncoder
from pctalk.speech import encode_speech, load_mono, loudness_envelope, mel_spectrogram, mel_windows


@pytest.fixture(scope="module")
def encoder():
    return filled(AudioEncoder(), seed=1)


def noise(seconds: float, rate: int = 16000, channels: int = 1, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(channels, round(seconds * rate), generator=torch.Generator().manual_seed(0))


def tone(seconds: float, rate: int, hertz: float = 440.0, level: float = 0.5) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate), dtype=torch.float64) / rate).float()


def test_mel_is_the_same_in_chunks(monkeypatch):
    waveform = noise(3.0)[0]
    whole = mel_spectrogram(waveform)
    assert whole.shape == (241, 80) and whole.min() >= -4 and whole.max() <= 4
    monkeypatch.setattr(module, "MEL_CHUNK", 7)
    assert torch.allclose(mel_spectrogram(waveform), whole, atol=1e-5)


def test_mel_of_silence_is_the_floor():
    assert torch.equal(mel_spectrogram(torch.zeros(1600)), torch.full((9, 80), -4.0))


def test_mel_windows_start_at_int_3_2_i():
    mel = torch.arange(400.0)[:, None].expand(-1, 80)
    windows = mel_windows(mel, 130)
    assert windows.shape == (130, 1, 80, 16)
    for frame in range(130):
        heard = [min(int(3.2 * frame) + k, 399) for k in range(16)]  # held past the end
        assert windows[frame, 0, 0].tolist() == heard
    assert torch.equal(mel_windows(mel, 30, first=100), windows[100:])


@pytest.mark.parametrize("seconds", [0.1, 0.119, 0.121, 0.5, 1.0, 1.37, 2.6, 11.003])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_motion_lasts_as_long_as_the_sound(encoder, seconds, rate):
    waveform = noise(seconds, rate)
    speech = encode_speech(encoder, waveform, rate)
    assert speech.seconds == waveform.shape[1] / rate
    assert speech.features.shape == (speech.frames, 512) and speech.loudness.shape == (speech.frames,)
    assert abs(speech.frames / speech.fps - seconds) <= 0.5 / speech.fps + 1e-6


def test_chunked_equals_whole(encoder, monkeypatch):
    waveform = noise(4.0)
    calls = []
    whole = encode_speech(encoder, waveform, 16000, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(64, 100), (100, 100)]
    monkeypatch.setattr(module, "ENCODE_CHUNK", 9)
    chunked = encode_speech(encoder, waveform, 16000)
    assert relative_difference(chunked.features, whole.features) < 1e-4
    assert torch.equal(chunked.loudness, whole.loudness)


def test_features_may_take_part_in_training(encoder):
    features = encode_speech(encoder, noise(0.3), 16000).features
    weight = torch.ones(512, requires_grad=True)
    (features * weight).sum().backward()
    assert not features.requires_grad and weight.grad.any()


def test_loudness_is_the_rms_around_each_frame():
    loud = loudness_envelope(tone(1.0, 16000, level=1.0))
    assert loud.shape == (25,)
    assert torch.allclose(loud, torch.full((25,), -3.01), atol=0.1)
    waveform = torch.zeros(16000)
    waveform[8000:] = 0.1  # from frame 12.5 on: the window of frame 12 is half full, that of 11 a quarter, that of 10 empty
    loudness = loudness_envelope(waveform)
    assert loudness[:11].tolist() == [-80.0] * 11
    assert loudness[12].item() == pytest.approx(-20 - 3.01, abs=0.01)
    assert torch.allclose(loudness[14:], torch.tensor(-20.0), atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000, 192000])
def test_any_rate_becomes_16_khz(rate):
    mono = load_mono(tone(0.5, rate), rate)
    assert abs(len(mono) - 8000) <= 1
    expected = tone(0.5, 16000)[: len(mono)]
    assert (mono[400:-400] - expected[400 : len(mono) - 400]).abs().max() < 0.01


def test_channels_are_averaged():
    stereo = torch.stack([tone(0.2, 16000), torch.zeros(3200)])
    assert torch.equal(load_mono(stereo[None], 16000), stereo.mean(dim=0))
    assert torch.equal(load_mono(stereo[0], 16000), stereo[0])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_integer_samples(dtype):
    samples = (tone(0.2, 16000).double() * -torch.iinfo(dtype).min).to(dtype)
    assert torch.allclose(load_mono(samples, 16000), tone(0.2, 16000), atol=1e-4)


def test_bytes_are_centred_on_128():
    samples = (tone(0.2, 16000) * 128 + 128).round().to(torch.uint8)
    assert torch.allclose(load_mono(samples, 16000), tone(0.2, 16000), atol=0.01)


def test_double_precision_and_clipped_sound():
    clipped = (tone(0.2, 16000).double() * 10).clamp(-1, 1)
    assert load_mono(clipped, 16000).dtype == torch.float32


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(1, 0), "empty"),
        (noise(0.05), "lasts 0.050 s, at least 0.1 s"),
        (noise(1.0) * float("nan"), "NaN or infinite"),
        (torch.full((1, 16000), float("inf")), "NaN or infinite"),
        (torch.zeros(1, 16000), "silent"),
        (noise(1.0, level=5e-4), "silent"),
        (noise(1.0) * 32768, "divide integer samples"),
        (torch.zeros(2, 1, 16000), "batch of 2"),
        (torch.zeros(1, 1, 1, 16000), "expected .channels, samples."),
    ],
)
def test_unusable_sound_is_refused_with_the_remedy(encoder, waveform, message):
    with pytest.raises(ValueError, match=message) as error:
        encode_speech(encoder, waveform, 16000)
    assert "\n" not in str(error.value)


def test_unusable_rate_is_refused():
    with pytest.raises(ValueError, match="sample rate is 0"):
        load_mono(noise(1.0), 0)


def test_one_bad_sample_is_found():
    waveform = noise(1.0)
    waveform[0, 777] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        load_mono(waveform, 16000)
