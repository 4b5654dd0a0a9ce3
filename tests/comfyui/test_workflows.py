"""The example workflows, executed by the server as they are, and the videos that come out of them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
import workflow
from PIL import Image

from pctalk.faces import Face, FaceFinder
from pctalk.media import read_audio
from pctalk.speech import load_mono, loudness_envelope

INNER_LIPS = (13, 14)
MOUTH_CORNERS = (61, 291)
EYE_CORNERS = (33, 263)
INNER_BROWS = (55, 285)
SPOKEN = -35.0  # dB


class Video(NamedTuple):
    codec: str
    pixel_format: str
    rate: Fraction
    frames: np.ndarray  # uint8 [T, H, W, 3]
    sound_codec: str
    sound: np.ndarray  # [N], the channels' mean
    sound_rate: int


def read(path: Path) -> Video:
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
        head = stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        sound = np.concatenate([frame.to_ndarray().mean(0) for frame in file.decode(stream)])
        return Video(*head, frames, stream.codec_context.name, sound, stream.rate)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks on single faces gain nothing from two threads, and lose much beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(server, example) -> dict:
    return {name: server.run(example(name)) for name in workflow.NAMES}


@pytest.fixture(scope="module")
def videos(server, example, runs) -> dict[str, Video]:
    def saved_by(name: str) -> dict:
        return runs[name].outputs[workflow.node_id(example(name), "SaveVideo")]["images"][0]

    return {name: read(server.file(saved_by(name))) for name in workflow.NAMES}


@pytest.fixture(scope="module")
def speech(media) -> tuple[np.ndarray, int]:
    waveform, rate = read_audio(media / "pctalk_speech.flac")
    return waveform.mean(0).numpy(), rate


@pytest.fixture(scope="module")
def loudness(speech) -> np.ndarray:
    """dB per video frame."""
    waveform, rate = speech
    return loudness_envelope(load_mono(torch.from_numpy(waveform), rate)).numpy()


@pytest.fixture(scope="module")
def faces(videos) -> dict[str, list[Face]]:
    finder = FaceFinder.from_assets()
    return {name: finder.track(torch.from_numpy(video.frames)) for name, video in videos.items()}


def distance(face: Face, pair: tuple[int, int]) -> float:
    """Between two landmarks, as a fraction of that between the outer eye corners."""
    points = face.landmarks[:, :2]
    return float((points[pair[0]] - points[pair[1]]).norm() / (points[EYE_CORNERS[0]] - points[EYE_CORNERS[1]]).norm())


@pytest.mark.parametrize("name", workflow.NAMES)
def test_video_has_the_portraits_size_and_the_speechs_length(videos, speech, name):
    video = videos[name]
    waveform, rate = speech
    assert (video.codec, video.pixel_format) == ("h264", "yuv420p")
    assert video.rate == 25
    assert video.frames.shape[1:] == (320, 320, 3)
    assert abs(len(video.frames) / 25 - len(waveform) / rate) <= 0.5 / 25


@pytest.mark.parametrize("name", workflow.NAMES)
def test_sound_track_is_the_speech(videos, speech, name):
    video = videos[name]
    waveform, rate = speech
    assert (video.sound_codec, video.sound_rate) == ("aac", rate)
    heard = video.sound[: len(waveform)]
    spectrum = np.fft.rfft(heard, 2 * len(waveform)).conj() * np.fft.rfft(waveform, 2 * len(waveform))
    lags = np.fft.irfft(spectrum)
    lag = int(np.argmax(lags))
    lag -= 2 * len(waveform) * (lag > len(waveform))
    assert abs(lag) / rate < 0.005
    assert lags.max() / np.linalg.norm(heard) / np.linalg.norm(waveform) > 0.9


@pytest.mark.parametrize("name", workflow.NAMES)
def test_face_moves_where_speech_is_and_background_holds_still(videos, faces, loudness, name):
    frames = videos[name].frames.astype(np.float32)
    left, top, right, bottom = faces[name][0].box.round().int().tolist()
    mouth = frames[:, (top + bottom) // 2 : bottom, left:right]
    change = np.abs(np.diff(mouth, axis=0)).mean((1, 2, 3))
    spoken = loudness[1:] > SPOKEN
    assert change[spoken].mean() > 1.5 * change[~spoken].mean()
    assert np.abs(np.diff(frames[:, :60, :60], axis=0)).mean() < 0.5  # what H.264 leaves of a still background


def test_lips_open_with_loudness(faces, loudness):
    opening = np.array([distance(face, INNER_LIPS) for face in faces["talking_portrait"]])
    level = np.maximum(loudness, -50.0)

    def agreement(track: np.ndarray) -> float:
        return max(np.corrcoef(opening, np.roll(track, lag))[0, 1] for lag in range(-2, 3))

    assert agreement(level) > 0.25
    assert agreement(level) > agreement(level[::-1]) + 0.2
    assert np.percentile(opening, 95) > 1.5 * np.percentile(opening, 5)


def test_mixed_emotions_show_in_their_regions(example, kept):
    """Against the same graph with both emotions at 0: a wider mouth whose corners rise, under inner brows that rise."""

    def clip(**change: float) -> np.ndarray:
        """Every sixth face crop, uint8 [n, 512, 512, 3]."""
        prompt = example("mixed_emotions")
        for node in prompt.values():
            if node["class_type"] == "PCTalk_EMCDeform":
                node["inputs"].update(change)
        draw = workflow.node_id(prompt, "PCTalk_WarpDecode")
        prompt[draw]["inputs"]["paste_back"] = False
        prompt["keep"] = {"class_type": "ProbeKeep", "inputs": {"value": [draw, 0], "name": "mixed"}}
        return np.rint(kept(prompt, "mixed")["value"][::6] * 255).astype(np.uint8)

    def corners(frames: np.ndarray) -> torch.Tensor:
        """Mouth corners [2, 2] from the middle between the eyes, averaged; 1 is the distance of the outer eye corners."""
        faces = FaceFinder.from_assets().track(torch.from_numpy(frames))
        points = torch.stack([face.landmarks[:, :2] for face in faces]).mean(0)
        eyes = points[list(EYE_CORNERS)]
        return (points[list(MOUTH_CORNERS)] - eyes.mean(0)) / (eyes[0] - eyes[1]).norm()

    neutral, mixed = clip(intensity=0.0), clip()
    (left, right) = corners(mixed) - corners(neutral)
    assert left[0] < -0.01 and right[0] > 0.01  # apart
    assert left[1] < -0.01 and right[1] < -0.01  # up
    still = FaceFinder.from_assets().find(torch.from_numpy(neutral[0]))[0]
    assert all(rise(neutral.mean(0), mixed.mean(0), still.landmarks[brow, :2].tolist()) >= 1 for brow in INNER_BROWS)


def rise(before: np.ndarray, after: np.ndarray, at: list[float]) -> int:
    """By how many pixels the patch around a point moved up between two pictures [H, W, 3]: where it matches best."""
    x, y = map(round, at)
    patch = before[y - 12 : y + 12, x - 15 : x + 15]
    return min(range(-10, 11), key=lambda up: np.square(after[y - up - 12 : y - up + 12, x - 15 : x + 15] - patch).sum())


def test_preview_of_the_plot(server, runs, example):
    reference = runs["mixed_emotions"].outputs[workflow.node_id(example("mixed_emotions"), "PreviewImage")]["images"][0]
    with Image.open(server.file(reference)) as picture:
        assert picture.size == (1280, 720)


@pytest.mark.parametrize("name", workflow.NAMES)
def test_second_run_is_cached(server, example, runs, name):
    prompt = example(name)
    server.run(prompt)
    again = server.run(prompt)
    assert again.cached == prompt.keys()
    assert again.seconds < 1.0


def test_changing_one_emotion_runs_only_what_depends_on_it(server, example):
    prompt = example("talking_portrait")
    server.run(prompt)
    changed = example("talking_portrait")
    emotion = workflow.node_id(changed, "PCTalk_EMCDeform")
    changed[emotion]["inputs"]["intensity"] = 0.25
    run = server.run(changed)
    ran = {changed[number]["class_type"] for number in changed.keys() - run.cached}
    assert ran == {"PCTalk_EMCDeform", "PCTalk_AddDeformations", "PCTalk_WarpDecode", "CreateVideo", "SaveVideo"}
