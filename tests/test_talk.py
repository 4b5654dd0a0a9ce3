"""The chain from portrait and recording to video, on random motion weights and a renderer that draws a dial."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_media import RATE, names, write_sound

from pctalk.checkpoints import MotionModel
from pctalk.faces import Crop
from pctalk.keypoints import LIPS, Keypoints, frame_count
from pctalk.media import frame_rate
from pctalk.networks.audio_encoder import AudioEncoder
from pctalk.networks.emotion import EmotionPredictor
from pctalk.networks.predictor import LipPredictor, Refiner
from pctalk.render import Chunk, Portrait
from pctalk.speech import encode_speech
from pctalk.talk import EmotionRequest, Motion, TalkOptions, motion, talk

EMOTIONAL = (EmotionRequest("happy", "lips", 0.5), EmotionRequest("sad", "upper_face", 0.3))


class Dial:
    """A renderer whose whole picture is as bright as the lower lip is low."""

    name = "dial"

    def __init__(self, batch: int = 8) -> None:
        self.batch = batch
        self.networks = {}

    def extract(self, images, *, face_index=0, crop_scale=2.3, landmarks=None):
        generator = torch.Generator().manual_seed(3)
        canonical = torch.rand(21, 3, generator=generator) - 0.5
        expression = 0.02 * torch.randn(1, 21, 3, generator=generator)
        keypoints = Keypoints(canonical, torch.eye(3)[None], torch.tensor([1.4]), torch.zeros(1, 3), expression)
        frames = (images[..., :3] * 255).to(torch.uint8)
        return Portrait(self.name, frames, (Crop(torch.eye(3), 32),), {}), keypoints

    def render(self, portrait, keypoints, *, paste_back=True, stitching=True, batch=0):
        height, width = portrait.frames.shape[1:3] if paste_back else (32, 32)
        rest = keypoints.undeformed()[0, 19, 1]
        brightness = (128 + 400 * (keypoints.posed()[:, 19, 1] - rest)).clamp(0, 255).to(torch.uint8)
        for levels in brightness.split(batch or self.batch):
            frames = levels[:, None, None, None].expand(-1, height, width, 3).contiguous()
            yield Chunk(frames, torch.ones(len(levels), height, width))


@pytest.fixture(scope="module")
def model() -> MotionModel:
    """Random weights with outputs of the size of real deformations."""
    torch.manual_seed(0)
    lac = LipPredictor(styles=3, dim=32, ff_dim=64)
    emc = EmotionPredictor(styles=2, dim=32, ff_dim=64)
    for network in (lac, emc):
        torch.nn.init.normal_(network.vertice_map_r.weight, std=0.01)
    model = MotionModel("random", AudioEncoder(), lac, Refiner(), emc, recommended_styles=(2, 0))
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return model


def babble(seconds: float, rate: int = RATE) -> np.ndarray:
    """Something like syllables: a buzz that swells four times a second, [1, N]."""
    t = np.arange(round(seconds * rate)) / rate
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 12))
    return (0.2 * buzz * np.sin(2 * np.pi * 2 * t) ** 2).astype(np.float32)[None]


@pytest.fixture
def portrait(tmp_path) -> Path:
    Image.new("RGB", (48, 36), "grey").save(tmp_path / "portrait.png")
    return tmp_path / "portrait.png"


@pytest.fixture
def recording(tmp_path) -> Path:
    return write_sound(tmp_path / "speech.flac", babble(1.3), RATE, "flac")


@pytest.fixture(scope="module")
def speech(model):
    return encode_speech(model.audio_encoder, torch.from_numpy(babble(1.7)), RATE)


@pytest.fixture(scope="module")
def source() -> Keypoints:
    return Dial().extract(torch.zeros(1, 8, 8, 3))[1]


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray")[8:24, 8:24].mean() for frame in container.decode(video=0)])


def offsets(result: Motion, source: Keypoints) -> torch.Tensor:
    return result.keypoints.posed() - source.posed()


# Motion


def test_motion_is_the_sum_of_what_it_returns(model, speech, source):
    result = motion(model, speech, source, TalkOptions(emotions=EMOTIONAL))
    assert result.keypoints.frames == result.lips.frames == result.emotion.frames == speech.frames
    assert (offsets(result, source) - result.lips.offsets - result.emotion.offsets).abs().max() < 1e-6
    assert result.lips.offsets[:, list(LIPS)].std() > 0.001 and result.emotion.offsets.std() > 0.001


def test_zero_intensity_is_no_emotion_exactly(model, speech, source):
    plain = motion(model, speech, source, TalkOptions())
    silenced = TalkOptions(emotions=tuple(request._replace(intensity=0.0) for request in EMOTIONAL))
    neutral = TalkOptions(emotions=(EmotionRequest("neutral", "all", 1.0),))
    for options in (silenced, neutral):
        result = motion(model, speech, source, options)
        assert torch.equal(result.keypoints.expression, plain.keypoints.expression)
        assert not result.emotion.offsets.any()


def test_zero_amplitude_keeps_the_portraits_own_face_exactly(model, speech, source):
    still = motion(model, speech, source, TalkOptions(amplitude=0.0, lips="add"))
    assert torch.equal(still.keypoints.expression, source.expression.expand(speech.frames, -1, -1))


def test_emotions_add_up_in_any_order_and_scale_linearly(model, speech, source):
    both = motion(model, speech, source, TalkOptions(emotions=EMOTIONAL)).emotion.offsets
    turned = motion(model, speech, source, TalkOptions(emotions=EMOTIONAL[::-1])).emotion.offsets
    single = [motion(model, speech, source, TalkOptions(emotions=(request,))).emotion.offsets for request in EMOTIONAL]
    double = tuple(request._replace(intensity=2 * request.intensity) for request in EMOTIONAL)
    doubled = motion(model, speech, source, TalkOptions(emotions=double)).emotion.offsets
    assert torch.equal(both, turned)
    assert (single[0] + single[1] - both).abs().max() < 1e-6
    assert (doubled - 2 * both).abs().max() < 1e-6


def test_the_style_defaults_to_the_recommended_one(model, speech, source):
    default, chosen, other = (motion(model, speech, source, TalkOptions(style=style)).lips.offsets for style in (None, 2, 0))
    assert torch.equal(default, chosen) and not torch.equal(default, other)
    with pytest.raises(ValueError, match="styles 0 to 2"):
        motion(model, speech, source, TalkOptions(style=3))


# The whole chain


@pytest.mark.parametrize("fps", ["24", "25", "29.97", "30", "60"])
@pytest.mark.parametrize("seconds", [0.37, 1.31])
def test_the_video_lasts_as_long_as_the_sound(tmp_path, model, portrait, fps, seconds):
    sound = write_sound(tmp_path / "speech.wav", babble(seconds, 44_100), 44_100, "pcm_s16le")
    exact = frame_rate(fps)
    report = talk(portrait, sound, tmp_path / "out.mp4", model, Dial(), TalkOptions(fps=exact))
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.average_rate == exact
        assert video.frames == report.frames == len(list(container.decode(video)))
        assert abs(video.frames / float(exact) - seconds) <= 0.5 / float(exact) + 1e-9
        assert float(audio.duration * audio.time_base) == pytest.approx(seconds, abs=1 / 44_100)


@pytest.mark.parametrize("fps", [25, Fraction(30000, 1001)])
def test_chunks_do_not_show(tmp_path, model, portrait, recording, fps):
    frames = []
    for batch in (1, 7, 1000):
        out = tmp_path / f"{batch}.mp4"
        talk(portrait, recording, out, model, Dial(batch), TalkOptions(EMOTIONAL, amplitude=3.0, fps=Fraction(fps)))
        frames.append(pictures(out))
    assert frames[0].std() > 0.5
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[2])


def test_the_video_shows_the_motion_at_its_time(tmp_path, model, portrait, recording, speech):
    """Every rendered frame shows the keypoints of its instant, at a frame rate of 60 too."""
    options = TalkOptions(fps=Fraction(60), amplitude=1.5)
    talk(portrait, recording, tmp_path / "out.mp4", model, Dial(), options, motion_path=tmp_path / "k.safetensors")
    shown = pictures(tmp_path / "out.mp4")
    saved = Keypoints.load(tmp_path / "k.safetensors")
    assert saved.fps == 25.0 and saved.frames == frame_count(1.3, 25)
    instants = np.arange(len(shown)) / 60
    heights = (saved.posed() - saved.undeformed())[:, 19, 1].numpy()
    expected = 128 + 400 * np.interp(instants, np.arange(saved.frames) / 25, heights)
    assert shown.std() > 5 and expected.min() > 0 and expected.max() < 255
    assert np.abs(shown - expected).max() < 4


def test_the_report_accounts_for_the_time(tmp_path, model, portrait, recording):
    seen = []
    report = talk(
        portrait, recording, tmp_path / "out.mp4", model, Dial(), TalkOptions(EMOTIONAL), progress=lambda *at: seen.append(at)
    )
    assert report.path == tmp_path / "out.mp4" and report.path.is_file()
    assert (report.frames, report.fps, report.size) == (33, 25, (48, 36))
    assert sum(report.stages.values()) == pytest.approx(report.elapsed, rel=1e-3)
    assert min(report.stages.values()) > -1e-3 and 0 < report.first_frame < report.elapsed
    assert report.speed == report.frames / report.elapsed
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["speech", "lips", "emotions", "frames"]
    assert all(0 < done <= total for _, done, total in seen)
    assert {stage: done for stage, done, total in seen if done == total} == dict.fromkeys(stages, 33)


def test_the_crop_or_the_whole_picture(tmp_path, model, portrait, recording):
    whole = talk(portrait, recording, tmp_path / "whole.mp4", model, Dial())
    crop = talk(portrait, recording, tmp_path / "crop.mp4", model, Dial(), TalkOptions(paste_back=False))
    assert whole.size == (48, 36) and crop.size == (32, 32)


@pytest.mark.parametrize("stage", ["speech", "lips", "emotions", "frames"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing(tmp_path, model, portrait, recording, stage, error):
    def interrupt(at: str, done: int, total: int) -> None:
        if at == stage and done > total // 2:
            raise error

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(error):
        talk(
            portrait,
            recording,
            out / "out.mp4",
            model,
            Dial(),
            TalkOptions(EMOTIONAL),
            motion_path=out / "motion.safetensors",
            progress=interrupt,
        )
    assert names(out) == []


def test_a_renderer_that_fails_leaves_nothing(tmp_path, model, portrait, recording):
    class Failing(Dial):
        def render(self, portrait, keypoints, **options):
            yield from list(super().render(portrait, keypoints, **options))[:2]
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        talk(portrait, recording, tmp_path / "out.mp4", model, Failing())
    assert not [name for name in names(tmp_path) if name.endswith((".mp4", ".part"))]


def test_the_output_is_checked_before_the_work(tmp_path, model, portrait, recording):
    class Unused(Dial):
        def extract(self, images, **options):
            raise AssertionError("the output had to be refused first")

    for output, saved, expected in (
        ("absent/out.mp4", None, "doesn't exist"),
        ("out.gif", None, "does not end in .mp4"),
        ("out.mp4", "absent/motion.safetensors", "doesn't exist"),
        ("out.mp4", "motion.pt", "does not end in .safetensors"),
    ):
        with pytest.raises((OSError, ValueError), match=expected):
            saved = None if saved is None else tmp_path / saved
            talk(portrait, recording, tmp_path / output, model, Unused(), motion_path=saved)
    with pytest.raises(ValueError, match="between 1 and 240"):
        talk(portrait, recording, tmp_path / "out.mp4", model, Unused(), replace(TalkOptions(), fps=Fraction(1000)))


@pytest.mark.parametrize(
    ("rate", "codec", "channels", "name"),
    [
        (8_000, "pcm_s16le", 1, "a.wav"),
        (192_000, "pcm_s24le", 2, "a.wav"),
        (44_100, "libmp3lame", 2, "a.mp3"),
        (48_000, "aac", 1, "a.mp4"),
    ],
)
def test_every_kind_of_sound_is_spoken(tmp_path, model, portrait, rate, codec, channels, name):
    sound = write_sound(tmp_path / name, babble(0.6, rate).repeat(channels, axis=0), rate, codec)
    report = talk(portrait, sound, tmp_path / "out.mp4", model, Dial())
    assert report.frames == pytest.approx(15, abs=1)


def test_clipped_sound_is_spoken(tmp_path, model, portrait):
    sound = write_sound(tmp_path / "a.wav", babble(0.6) * 10, RATE, "pcm_f32le")
    assert talk(portrait, sound, tmp_path / "out.mp4", model, Dial()).frames == 15


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.zeros((1, 16_000), np.float32), "silent"),
        (np.full((1, 16_000), math.nan, np.float32), "NaN"),
        (babble(0.05), "at least 0.1 s"),
    ],
)
def test_sound_that_can_not_be_spoken_is_refused(tmp_path, model, portrait, samples, expected):
    sound = write_sound(tmp_path / "a.wav", samples, RATE, "pcm_f32le")
    with pytest.raises(ValueError, match=expected):
        talk(portrait, sound, tmp_path / "out.mp4", model, Dial())
    assert names(tmp_path) == ["a.wav", "portrait.png"]


def test_a_huge_picture_is_reduced(tmp_path, model, recording, caplog):
    Image.new("RGB", (4000, 1000), "grey").save(tmp_path / "wide.png")
    report = talk(tmp_path / "wide.png", recording, tmp_path / "out.mp4", model, Dial(), TalkOptions(fps=Fraction(2)))
    assert report.size == (1920, 480) and "reduced from 4000 x 1000" in caplog.text
