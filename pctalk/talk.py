"""The whole chain: a portrait and a recording in, a talking video out, in memory that doesn't grow with its length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoints import MotionModel
from .emc import mix_regions, predict_emotions
from .keypoints import FPS, Deformation, Keypoints, add_deformations, frame_count
from .lac import predict_lips
from .media import VideoWriter, check_output, frame_rate, read_audio, read_image
from .render import Renderer
from .speech import SAMPLE_RATE, Speech, encode_speech

# Pixels of the longer side of a whole picture. The face is drawn from a crop of 512 pixels, which a larger picture would
# only blur, while time and memory grow with its area.
MAX_SIDE = 1920

Progress = Callable[[str, int, int], None]


class EmotionRequest(NamedTuple):
    """One emotion of keypoints.EMOTIONS on one of keypoints.REGIONS; intensity 0 is none, above 0.5 is strong."""

    emotion: str
    region: str = "all"
    intensity: float = 0.5


@dataclass(frozen=True)
class TalkOptions:
    """What a creator chooses; the defaults speak neutrally.

    emotions: what is added, in any order; style: a preset id (None: the one that the motion model recommends); amplitude,
    follow_loudness, pursing, widening, opening, lips: as for `lac.predict_lips`; fps: frames a second of the video;
    face: which face, 0 is the largest; paste_back: draw into the whole picture instead of the crop; stitching: as for
    `Renderer.render`.
    """

    emotions: tuple[EmotionRequest, ...] = ()
    style: int | None = None
    amplitude: float = 1.0
    follow_loudness: float = 0.0
    pursing: float = 1.0
    widening: float = 1.0
    opening: float = 1.0
    lips: str = "replace"
    fps: Fraction = field(default_factory=lambda: Fraction(25))
    face: int = 0
    paste_back: bool = True
    stitching: bool = True


class Motion(NamedTuple):
    """K_d = K_ori + D_l + D_e, with both addends; 25 frames a second."""

    keypoints: Keypoints
    lips: Deformation
    emotion: Deformation


@dataclass(frozen=True)
class TalkReport:
    """What was written and where the time went, in seconds.

    stages: time by stage, which add up to `elapsed`; encoding: how long the encoder was busy beside them;
    first_frame: from the start until the first frame was drawn.
    """

    path: Path
    frames: int
    fps: Fraction
    size: tuple[int, int]
    elapsed: float
    first_frame: float
    stages: dict[str, float]
    encoding: float

    @property
    def speed(self) -> float:
        """Frames a second, everything included."""
        return self.frames / self.elapsed


class _Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started


def motion(
    model: MotionModel,
    speech: Speech,
    keypoints: Keypoints,
    options: TalkOptions,
    *,
    progress: Progress | None = None,
    watch: _Stopwatch | None = None,
) -> Motion:
    """The motion that speech and options give to a face.

    Args: keypoints: the face's own, K_ori (a still); progress(stage, done, total).
    Returns: keypoints and deformations of speech.frames frames. Raises ValueError for unknown names and styles.
    """
    watch = watch or _Stopwatch()
    style = model.recommended_styles[0] if options.style is None else options.style
    with watch("lips"):
        lips = predict_lips(
            model,
            speech,
            keypoints,
            style=style,
            amplitude=options.amplitude,
            follow_loudness=options.follow_loudness,
            pursing=options.pursing,
            widening=options.widening,
            opening=options.opening,
            lips=options.lips,
            progress=_stage(progress, "lips"),
        )
    with watch("emotions"):
        emotion = _emotion(model, speech, keypoints, options.emotions, _stage(progress, "emotions"))
    return Motion(add_deformations(keypoints, [lips, emotion]), lips, emotion)


def _emotion(model, speech: Speech, keypoints: Keypoints, requests: tuple[EmotionRequest, ...], progress) -> Deformation:
    """D_e: the sum of the requests, all emotions decoded as one batch; zeros without requests."""
    requests = tuple(request for request in requests if request.intensity != 0.0)
    if not requests:
        return Deformation(torch.zeros(speech.frames, *keypoints.canonical.shape, device=keypoints.canonical.device), FPS)
    names = list(dict.fromkeys(request.emotion for request in requests))
    full = predict_emotions(model, speech, keypoints, names, progress=progress)
    return mix_regions([(full[request.emotion], request.region, request.intensity) for request in requests])


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(stage, done, total)


@torch.inference_mode()
def talk(
    portrait_path: str | Path,
    audio_path: str | Path,
    output_path: str | Path,
    model: MotionModel,
    renderer: Renderer,
    options: TalkOptions | None = None,
    *,
    motion_path: str | Path | None = None,
    progress: Progress | None = None,
) -> TalkReport:
    """Write an MP4 in which the portrait speaks the recording.

    The sound is read twice as a stream, motion is small, and frames go to the encoder chunk by chunk, so memory hardly
    grows with the length. A whole picture is reduced to 1920 pixels at most (said in the log). A failure or an interrupt
    leaves no file behind.

    Args: output_path: ends in .mp4; motion_path: also save the keypoints K_d there, at 25 frames a second; progress(stage,
    done, total), called often: raise from it to stop.
    Raises ValueError and OSError with a sentence that says what to do.
    """
    options = options or TalkOptions()
    watch = _Stopwatch()
    fps = frame_rate(options.fps)
    output_path = check_output(output_path)
    if motion_path is not None:
        check_output(motion_path, ".safetensors")

    with watch("reading"):
        image = read_image(portrait_path, MAX_SIDE if options.paste_back else None)
        waveform, _ = read_audio(audio_path, SAMPLE_RATE, mono=True)
    with watch("face"):
        portrait, source = renderer.extract(image, face_index=options.face)
        del image
    with watch("speech"):
        speech = encode_speech(model.audio_encoder, waveform, SAMPLE_RATE, progress=_stage(progress, "speech"))
        del waveform
    keypoints = motion(model, speech, source, options, progress=progress, watch=watch).keypoints
    driving = keypoints.at_fps(float(fps), frame_count(speech.seconds, float(fps)))

    chunks = iter(renderer.render(portrait, driving, paste_back=options.paste_back, stitching=options.stitching))
    with watch("rendering"):
        first = next(chunks)
    first_frame = watch.elapsed
    height, width = first.frames.shape[1:3]
    with VideoWriter(output_path, fps, (width, height), audio_path) as video:
        for chunk in chain([first], _timed(chunks, watch)):
            video.write(chunk.frames)
            if progress is not None:
                progress("frames", video.frames, driving.frames)
    watch.add("waiting for the encoder", video.wait_seconds)
    if motion_path is not None:
        keypoints.save(motion_path)
    watch.add("the rest", watch.elapsed - sum(watch.stages.values()))
    return TalkReport(
        output_path, video.frames, fps, (width, height), watch.elapsed, first_frame, watch.stages, video.encode_seconds
    )


def _timed(chunks: Iterator, watch: _Stopwatch) -> Iterator:
    """The same chunks; the time each took counts as rendering."""
    while True:
        with watch("rendering"):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk
