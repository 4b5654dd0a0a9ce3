"""Pictures, sound and video files: read any portrait and any recording, write an MP4 while its frames are being rendered.

Files are read and written through Pillow and PyAV (FFmpeg's libraries). Long recordings are streamed, never held whole.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
AAC_FRAME = 1024
SOUND_BLOCK = 2**16
QUEUE_BYTES = 64 * 2**20
# The code 1 stands for BT.709 among H.264's primaries, transfers and matrices, and for limited range in FFmpeg.
BT709 = LIMITED_RANGE = 1


# Pictures


def read_image(path: str | Path, max_side: int | None = None) -> Tensor:
    """A picture of any kind as float RGB 0..1: [1, H, W, 3].

    Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; what is transparent is shown over white; the camera's
    orientation (EXIF) is applied; of an animation the first frame is taken.

    Args: max_side: reduce a larger picture so that its longer side has this many pixels (said in the log).
    Raises ValueError when the file is not a picture, is damaged or has more than 100 million pixels; OSError when it
    can't be opened.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    too_large = f"{path} has more than {MAX_PIXELS // 1_000_000} million pixels: reduce the picture first."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(path)
        with file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(too_large)
            picture = _as_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read: save it as PNG or JPEG.") from None
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise _cannot_open(path, "picture", error) from None
    except (OSError, SyntaxError) as error:  # Pillow raises either for a damaged file
        raise ValueError(f"{path} is damaged or cut short ({error}): save the picture again.") from None
    if max_side is not None and max(picture.size) > max_side:
        before = picture.size
        picture.thumbnail((max_side, max_side))
        log.warning("%s is reduced from %d x %d to %d x %d pixels.", path, *before, *picture.size)
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return (pixels.float() / 255.0)[None]


def _as_rgb(picture):
    """A Pillow picture of any mode as 8-bit RGB."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        # Deep grey: integers are 16 bits; floats are 0..1 unless they go beyond, then 0..255.
        values = np.nan_to_num(np.asarray(picture, dtype=np.float32))
        peak = 65535.0 if picture.mode.startswith("I") else (1.0 if values.max() <= 1.0 else 255.0)
        picture = Image.fromarray((values * (255.0 / peak) + 0.5).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    return picture.convert("RGB")


# Sound


def read_audio(path: str | Path, rate: int | None = None, mono: bool = False) -> tuple[Tensor, int]:
    """The sound of a recording or of a video, whatever its container: waveform float32 [C, N] and its sample rate.

    It is decoded block by block, so with a rate of 16000 and mono half an hour takes 115 MB. More than two channels
    are mixed down to two; full scale is 1, and float files may go beyond.

    Args: rate: resample to this many samples a second (default: the file's own); mono: average the channels.
    Raises ValueError when the file is not a recording or holds no sound; OSError when it can't be opened.
    """
    stream = _SoundFile(path, rate, mono)
    blocks = list(stream)
    if not blocks:
        raise ValueError(f"{path} is empty or damaged, not a sample of sound is in it: choose a recording of speech.")
    return torch.from_numpy(np.concatenate(blocks, axis=1)), stream.rate


class _Sound:
    """A sound as blocks [C, n] of float32 that are made while they are asked for.

    file_rate and rate: samples a second of the source and of the blocks; channels: 1 or 2.
    """

    def __init__(self, file_rate: int, file_channels: int, rate: int | None, mono: bool) -> None:
        self.file_rate, self.rate = file_rate, rate or file_rate
        self.file_channels, self.channels = file_channels, 1 if mono else file_channels

    @property
    def layout(self) -> str:
        return _layout(self.channels)

    def __iter__(self) -> Iterator[np.ndarray]:
        blocks = self._source()
        if self.channels < self.file_channels:
            blocks = (block.mean(axis=0, keepdims=True) for block in blocks)
        if self.rate != self.file_rate:
            blocks = _resampled(blocks, self.channels, self.file_rate, self.rate)
        return blocks

    def _source(self) -> Iterator[np.ndarray]:
        raise NotImplementedError


class _SoundFile(_Sound):
    """The sound track of a media file. Raises as `read_audio` says."""

    def __init__(self, path: str | Path, rate: int | None = None, mono: bool = False) -> None:
        self.path = Path(path)
        with self._open() as container:
            if not container.streams.audio:
                raise ValueError(f"{self.path} holds no sound: choose a recording, or a video with a sound track.")
            codec = container.streams.audio[0].codec_context
            if not codec.sample_rate:
                raise _not_a_recording(self.path)
            super().__init__(codec.sample_rate, min(2, codec.layout.nb_channels), rate, mono)

    def _source(self) -> Iterator[np.ndarray]:
        import av

        converter = kind = None
        damaged = 0
        with self._open() as container:
            stream = container.streams.audio[0]
            aac = stream.codec_context.name == "aac"
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    damaged += 1
                    continue
                for frame in frames:
                    # Recordings pasted together may change their rate or channels midway.
                    if kind != (kind := (frame.sample_rate, frame.format.name, frame.layout.name)):
                        yield from _converted(converter, None)
                        converter = av.AudioResampler("fltp", _layout(self.file_channels), self.file_rate)
                    # AAC fills its last frame up; only the packet knows how much of it is sound.
                    counted = aac and packet.duration and packet.time_base == Fraction(1, frame.sample_rate)
                    for block in _converted(converter, frame):
                        yield block[:, : packet.duration] if counted else block
            yield from _converted(converter, None)
        if damaged:
            log.warning("%s is damaged: what could not be decoded is left out (%d packets).", self.path, damaged)

    def _open(self):
        import av

        try:
            return av.open(str(self.path))
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise _cannot_open(self.path, "recording", error) from None
        except (OSError, ValueError):  # av's InvalidDataError is a ValueError
            raise _not_a_recording(self.path) from None


class _SoundInMemory(_Sound):
    """A waveform float [C, N] or [N] with its sample rate; more than two channels are averaged to one."""

    def __init__(self, waveform: Tensor, file_rate: int, rate: int | None = None) -> None:
        waveform = waveform.detach().float().cpu().reshape(-1, waveform.shape[-1])
        if not torch.isfinite(waveform).all():
            raise ValueError("The sound holds NaN or infinite samples: export the recording again.")
        self.waveform = waveform.numpy()
        super().__init__(file_rate, len(waveform), rate, mono=len(waveform) > 2)

    def _source(self) -> Iterator[np.ndarray]:
        for start in range(0, self.waveform.shape[1], SOUND_BLOCK):
            yield self.waveform[:, start : start + SOUND_BLOCK]


def _sound_of(audio: str | Path | tuple[Tensor, int]) -> _Sound:
    """A sound at the sample rate that an MP4 gets: 44.1 kHz for it and its fractions, else 48 kHz."""
    file_rate = audio[1] if isinstance(audio, tuple) else _SoundFile(audio).file_rate
    rate = 44_100 if file_rate % 11_025 == 0 else 48_000
    return _SoundInMemory(*audio, rate) if isinstance(audio, tuple) else _SoundFile(audio, rate)


def _converted(converter, frame) -> Iterator[np.ndarray]:
    """A decoded frame (None: what is still inside) as blocks [C, n] in the converter's format."""
    if converter is None:
        return
    if frame is not None:
        frame.pts = None  # gaps between time stamps are no part of the sound
    for part in converter.resample(frame):
        yield part.to_ndarray()


def _layout(channels: int) -> str:
    return "mono" if channels == 1 else "stereo"


def _not_a_recording(path: Path) -> ValueError:
    return ValueError(f"{path} is cut short or not a recording that can be read: save it as WAV, FLAC, MP3 or MP4.")


def _cannot_open(path: Path, kind: str, error: OSError) -> OSError:
    """The same kind of error as one sentence that says what to do."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"There is no {kind} at {path}: check the path.")
    if path.is_dir():
        return IsADirectoryError(f"{path} is a folder, expected a {kind}: name a file in it.")
    return PermissionError(f"{path} can't be read: check the permissions of the file.")


def _resampled(blocks: Iterator[np.ndarray], channels: int, rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """Blocks [C, n] at another sample rate, without delay: round(N * new_rate / rate) samples in all."""
    import soxr

    resampler = soxr.ResampleStream(rate, new_rate, channels, dtype="float32")
    for block in blocks:
        yield resampler.resample_chunk(np.ascontiguousarray(block.T)).reshape(-1, channels).T
    yield resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True).reshape(-1, channels).T


def _framed(blocks: Iterator[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """Blocks [C, n] of any length as blocks of one length (the last may be shorter), limited to full scale."""
    rest: np.ndarray | None = None
    for block in blocks:
        rest = block if rest is None else np.concatenate([rest, block], axis=1)
        whole = rest.shape[1] - rest.shape[1] % samples
        for start in range(0, whole, samples):
            yield rest[:, start : start + samples].clip(-1.0, 1.0)
        rest = rest[:, whole:]
    if rest is not None and rest.shape[1]:
        yield rest.clip(-1.0, 1.0)


# Video


def frame_rate(fps: float | str | Fraction) -> Fraction:
    """A frame rate as the exact fraction that is meant: 23.976, 29.97 and 59.94 are n * 1000 / 1001.

    Args: fps: a number, or text such as "25", "29.97" or "30000/1001".
    Raises ValueError when it is not a number from 1 to 240.
    """
    try:
        exact = Fraction(str(fps).strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{fps!r} is not a frame rate: give a number such as 25 or 29.97.") from None
    if not 1 <= exact <= 240:
        raise ValueError(f"The frame rate must lie between 1 and 240 frames a second, not {fps}.")
    ntsc = Fraction(round(exact * 1001 / 1000) * 1000, 1001)
    if exact.denominator != 1 and abs(exact - ntsc) < Fraction(1, 200):
        return ntsc
    return exact.limit_denominator(1001)


def check_output(path: str | Path, ending: str = ".mp4") -> Path:
    """The path, when a file with this ending can be written there; nothing is left behind.

    Raises ValueError for another ending; OSError with a remedy for a folder that is missing or can't be written.
    """
    path = Path(path)
    if path.suffix.lower() != ending:
        raise ValueError(f"{path} does not end in {ending}: give the output file that ending.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a {ending} file: name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The output folder {path.parent} doesn't exist: create it or choose another.")
    probe = _part_of(path)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"The output folder {path.parent} can't be written ({error.strerror}): choose another folder."
        ) from None
    return path


def _part_of(path: Path) -> Path:
    """A name in the same folder for a file that is still being written."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part")


class VideoWriter:
    """Writes an H.264 MP4 with its sound track while the next frames are being rendered.

        with VideoWriter("out.mp4", 25, (512, 512), audio="speech.wav") as video:
            video.write(frames)  # uint8 [b, H, W, 3], any b, as often as needed

    Frames wait in a queue of at most 64 MB for a thread that converts and encodes them, so memory stays bounded and
    `write` waits when rendering is faster. The file gets its name when everything is written; after an error or an
    interrupt nothing is left of it. Colours are BT.709 in limited range; a picture of odd width or height repeats its
    last column or row, as H.264 needs even sizes. The sound track is the whole input, to the sample, as AAC at 44.1 or
    48 kHz.

    Args:
        fps: as for `frame_rate`.
        size: (width, height) of the frames in pixels.
        audio: a media file, which is streamed, or a waveform float [C, N] with its sample rate.
        crf, preset: x264's quality (lower is better) and effort.
    Raises ValueError for frames or sound that don't fit; OSError when the file can't be written.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float | str | Fraction,
        size: tuple[int, int],
        audio: str | Path | tuple[Tensor, int] | None = None,
        *,
        crf: int = 18,
        preset: str = "veryfast",
    ) -> None:
        import av

        self.path = check_output(path)
        self.fps = frame_rate(fps)
        self.width, self.height = size
        self.frames = 0
        self.encode_seconds = 0.0
        """How long the encoding thread was busy."""
        self.wait_seconds = 0.0
        """How long `write` waited for it."""
        self._sound = None if audio is None else _sound_of(audio)
        self._blocks = iter(()) if audio is None else _framed(iter(self._sound), AAC_FRAME)
        self._samples = 0
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._part = _part_of(self.path)
        self._error: BaseException | None = None
        self._abort = threading.Event()
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(max(2, QUEUE_BYTES // (3 * self.width * self.height)))
        # The header counts the sound's length in this unit; FFmpeg's default of milliseconds would round it.
        timescale = 90_000 if self._sound is None else self._sound.rate
        options = {"movflags": "+faststart", "movie_timescale": str(timescale)}
        try:
            self._container = av.open(str(self._part), "w", format="mp4", options=options)
            self._add_streams(crf, preset)
        except BaseException:
            self._part.unlink(missing_ok=True)
            raise
        self._thread = threading.Thread(target=self._encode, name="pctalk-encode", daemon=True)
        self._thread.start()

    def _add_streams(self, crf: int, preset: str) -> None:
        self._video = self._container.add_stream("libx264", rate=self.fps)
        self._video.width, self._video.height = self.width + self.width % 2, self.height + self.height % 2
        self._video.pix_fmt = "yuv420p"
        self._video.options = {"crf": str(crf), "preset": preset}
        context = self._video.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED_RANGE
        self._track = None
        if self._sound is not None:
            self._track = self._container.add_stream("aac", rate=self._sound.rate, layout=self._sound.layout)
            self._track.bit_rate = 128_000 * self._sound.channels

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Hand over frames uint8 [b, H, W, 3]. They are encoded later: don't change them in place."""
        frames = frames.cpu().numpy() if isinstance(frames, Tensor) else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"The frames are {frames.dtype} {list(frames.shape)}, expected uint8 [b, {self.height}, {self.width}, 3]."
            )
        start = time.perf_counter()
        for frame in frames:
            self._put(frame)
        self.frames += len(frames)
        self.wait_seconds += time.perf_counter() - start

    def _put(self, item: np.ndarray | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                start = time.perf_counter()
                self._put(None)
                while self._thread.is_alive():
                    self._thread.join(0.1)
                self.wait_seconds += time.perf_counter() - start
                if self._error is not None:
                    raise self._error
                self._give_name()
        finally:
            self._abort.set()
            self._thread.join()
            self._part.unlink(missing_ok=True)

    def _give_name(self) -> None:
        try:
            os.replace(self._part, self.path)
        except PermissionError as error:  # Windows, while another program has the earlier video open
            raise PermissionError(
                f"{self.path} can't be replaced ({error.strerror}): close the program that shows it."
            ) from None

    # The rest runs in the encoding thread.

    def _encode(self) -> None:
        try:
            try:
                self._encode_all()
            finally:
                self._container.close()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            self._error = OSError(f"{self.path} could not be written ({reason}): free some space or choose another folder.")
        except BaseException as error:
            self._error = error

    def _encode_all(self) -> None:
        for index, picture in enumerate(self._taken()):
            start = time.perf_counter()
            self._container.mux(self._video.encode(self._picture(picture, index)))
            self._encode_sound(until=(index + 1) / self.fps)
            self.encode_seconds += time.perf_counter() - start
        if self._abort.is_set():
            return
        start = time.perf_counter()
        self._container.mux(self._video.encode())
        self._encode_sound(until=None)
        if self._track is not None:
            self._container.mux(self._track.encode())
        self.encode_seconds += time.perf_counter() - start

    def _taken(self) -> Iterator[np.ndarray]:
        """The queued frames, until the last one or an abort."""
        while not self._abort.is_set():
            try:
                picture = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if picture is None:
                return
            yield picture

    def _picture(self, pixels: np.ndarray, index: int):
        """Frame number `index` [H, W, 3] as BT.709 YUV of even size."""
        import av

        odd = (self.height % 2, self.width % 2)
        if any(odd):
            pixels = np.pad(pixels, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = self._reformatter.reformat(
            frame, format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE, interpolation="BILINEAR"
        )
        frame.pts, frame.time_base = index, 1 / self.fps
        return frame

    def _encode_sound(self, until: Fraction | None) -> None:
        """Encode the sound up to a time in seconds (None: all of it), so that the streams are interleaved in the file."""
        import av

        if self._track is None:
            return
        rate = self._sound.rate
        while until is None or self._samples < until * rate:
            block = next(self._blocks, None)
            if block is None:
                return
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout=self._sound.layout)
            frame.rate, frame.pts, frame.time_base = rate, self._samples, Fraction(1, rate)
            self._samples += block.shape[1]
            self._container.mux(self._track.encode(frame))
