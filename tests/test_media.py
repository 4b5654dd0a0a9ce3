"""Pictures, sound and video files in and out."""

import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pctalk.media import VideoWriter, check_output, frame_rate, read_audio, read_image

RATE = 16_000


def write_sound(path: Path, samples: np.ndarray, rate: int, codec: str) -> Path:
    """samples [C, N] float to a file, in the encoder's own sample format."""
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
        frame.rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def tone(seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave / (channel + 1) for channel in range(channels)]).astype(np.float32)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Pictures


@pytest.fixture
def gradient() -> np.ndarray:
    return (np.arange(12 * 20 * 3).reshape(12, 20, 3) % 256).astype(np.uint8)


@pytest.mark.parametrize("name", ["plain.png", "plain.bmp", "plain.tiff", "plain.webp"])
def test_pictures_come_back_exactly(tmp_path, gradient, name):
    Image.fromarray(gradient).save(tmp_path / name, lossless=True)
    image = read_image(tmp_path / name)
    assert image.shape == (1, 12, 20, 3) and image.dtype == torch.float32
    assert torch.equal(image[0], torch.from_numpy(gradient).float() / 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(tmp_path, gradient, mode):
    picture = Image.fromarray(gradient).convert(mode)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "YCbCr", "1") else "picture.png")
    (picture.convert("RGB") if mode == "HSV" else picture).save(path)
    assert (read_image(path)[0] - expected).abs().max() <= 2 / 255


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path, name):
    deep = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / name)
    image = read_image(tmp_path / name)[0]
    assert (image - torch.from_numpy(deep / 65535.0)[..., None].float()).abs().max() < 0.003


def test_sixteen_bit_colour_keeps_its_brightness(tmp_path):
    deep = np.linspace(0, 65535, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint16)
    codec = av.CodecContext.create("png", "w")
    codec.width = codec.height = 32
    codec.pix_fmt, codec.time_base = "rgb48be", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(deep, format="rgb48le").reformat(format="rgb48be")
    (tmp_path / "deep.png").write_bytes(b"".join(bytes(packet) for packet in codec.encode(frame)))
    assert (read_image(tmp_path / "deep.png")[0] - torch.from_numpy(deep / 65535.0).float()).abs().max() < 0.005


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    picture.paste((10, 10, 10, 255), (4, 0, 8, 8))
    if mode == "P":
        picture = picture.quantize(4)
    picture.convert(mode).save(tmp_path / "cutout.png")
    image = read_image(tmp_path / "cutout.png")[0]
    assert torch.equal(image[:, :4], torch.ones(8, 4, 3))
    assert (image[:, 4:] < 0.1).all()


def test_the_camera_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (30, 20))
    picture.paste("white", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: the left edge is shown on top
    picture.save(tmp_path / "turned.jpg", exif=exif)
    image = read_image(tmp_path / "turned.jpg")[0]
    assert image.shape == (30, 20, 3)
    assert image[:8].mean() > 0.9 and image[12:].mean() < 0.1


def test_a_huge_picture_is_read_and_can_be_reduced(tmp_path):
    Image.new("RGB", (8000, 6000), "grey").save(tmp_path / "huge.png")
    assert read_image(tmp_path / "huge.png").shape == (1, 6000, 8000, 3)
    assert read_image(tmp_path / "huge.png", max_side=1000).shape == (1, 750, 1000, 3)


@pytest.mark.parametrize("size", [(10_100, 10_000), (20_000, 20_000)])
def test_a_picture_beyond_the_limit_is_refused(tmp_path, size):
    Image.new("1", size).save(tmp_path / "poster.png")
    with pytest.raises(ValueError, match="more than 100 million pixels: reduce"):
        read_image(tmp_path / "poster.png")


def test_files_that_are_no_pictures_are_refused(tmp_path, gradient):
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(gradient.repeat(20, axis=0)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"not a picture .* PNG or JPEG"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match=r"no picture at .*absent\.png: check the path"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(OSError, match="is a folder"):
        read_image(tmp_path)


# Sound


@pytest.mark.parametrize(
    ("name", "codec", "tolerance"),
    [
        ("a.wav", "pcm_u8", 0.01),
        ("a.wav", "pcm_s16le", 1e-4),
        ("a.wav", "pcm_s24le", 1e-6),
        ("a.wav", "pcm_s32le", 1e-6),
        ("a.wav", "pcm_f32le", 0),
        ("a.flac", "flac", 1e-4),
        ("a.mp3", "libmp3lame", 0.05),
        ("a.m4a", "aac", 0.15),
        ("a.mkv", "pcm_s16le", 1e-4),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_every_kind(tmp_path, name, codec, tolerance, channels):
    samples = tone(channels=channels)
    waveform, rate = read_audio(write_sound(tmp_path / name, samples, RATE, codec))
    assert rate == RATE and waveform.dtype == torch.float32
    assert waveform.shape == samples.shape
    assert (waveform - torch.from_numpy(samples)).abs().max() <= tolerance


def test_sound_as_opus(tmp_path):
    samples = tone(1.0, 48_000)
    waveform, rate = read_audio(write_sound(tmp_path / "a.ogg", samples, 48_000, "libopus"))
    assert rate == 48_000 and waveform.shape == samples.shape
    assert (waveform - torch.from_numpy(samples))[:, 2000:-2000].abs().max() < 0.05


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 192_000])
def test_reading_at_16_khz_equals_resampling_the_whole(tmp_path, rate):
    import soxr

    samples = tone(0.7, rate, channels=2)
    waveform, new_rate = read_audio(write_sound(tmp_path / "a.wav", samples, rate, "pcm_f32le"), RATE, mono=True)
    expected = soxr.resample(samples.mean(axis=0), rate, RATE)
    assert new_rate == RATE and waveform.shape == (1, round(0.7 * RATE))
    assert (waveform[0] - torch.from_numpy(expected)).abs().max() < 1e-6


def test_beyond_full_scale_and_nan_are_passed_on(tmp_path):
    samples = tone() * 4
    samples[0, 100] = np.nan
    waveform, _ = read_audio(write_sound(tmp_path / "a.wav", samples, RATE, "pcm_f32le"))
    assert waveform[0, 100].isnan() and waveform.nan_to_num().max() > 1.9


def test_files_without_sound_are_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    (tmp_path / "zero.wav").touch()
    (tmp_path / "text.wav").write_text("no sound here " * 100)
    write_sound(tmp_path / "whole.m4a", tone(), RATE, "aac")
    whole = (tmp_path / "whole.m4a").read_bytes()
    (tmp_path / "cut.m4a").write_bytes(whole[: len(whole) // 2])
    write_sound(tmp_path / "header.wav", tone(), RATE, "pcm_s16le")
    header = (tmp_path / "header.wav").read_bytes()
    (tmp_path / "header.wav").write_bytes(header[: header.index(b"data") + 4] + bytes(4))
    with pytest.raises(ValueError, match="holds no sound: choose"):
        read_audio(tmp_path / "picture.png")
    for name in ("zero.wav", "text.wav", "cut.m4a"):
        with pytest.raises(ValueError, match=f"{name} is cut short or not a recording"):
            read_audio(tmp_path / name)
    with pytest.raises(ValueError, match="empty or damaged"):
        read_audio(tmp_path / "header.wav")
    with pytest.raises(FileNotFoundError, match=r"no recording at .*absent\.wav: check the path"):
        read_audio(tmp_path / "absent.wav")
    with pytest.raises(OSError, match="is a folder"):
        read_audio(tmp_path)


def test_a_damaged_recording_gives_what_can_be_decoded(tmp_path, caplog):
    whole = write_sound(tmp_path / "a.mp3", tone(2.0), RATE, "libmp3lame").read_bytes()
    (tmp_path / "b.mp3").write_bytes(whole[:3000] + os.urandom(2000) + whole[5000:])
    waveform, _ = read_audio(tmp_path / "b.mp3")
    assert 0.5 * RATE < waveform.shape[1] < 2.1 * RATE
    assert "damaged" in caplog.text


def test_recordings_pasted_together(tmp_path):
    first = write_sound(tmp_path / "a.mp3", tone(1.0, 44_100, channels=2), 44_100, "libmp3lame").read_bytes()
    second = write_sound(tmp_path / "b.mp3", tone(1.0, 22_050), 22_050, "libmp3lame").read_bytes()
    (tmp_path / "both.mp3").write_bytes(first + second)
    waveform, rate = read_audio(tmp_path / "both.mp3")
    assert waveform.shape[1] / rate == pytest.approx(2.0, abs=0.15)
    for start in (0.2, 1.3):  # both are heard at their own pitch
        part = waveform[0, round(start * rate) : round((start + 0.5) * rate)]
        assert part.std() == pytest.approx(0.35, abs=0.05)
        assert (part.sign().diff() != 0).sum() / 2 / 0.5 == pytest.approx(440, rel=0.03)


def test_surround_sound_becomes_stereo(tmp_path):
    samples = np.concatenate([tone(channels=2), np.zeros((4, RATE // 2), np.float32)])
    with av.open(str(tmp_path / "a.flac"), "w") as container:
        stream = container.add_stream("flac", rate=RATE, layout="5.1")
        packed = np.ascontiguousarray((samples * 32767).astype(np.int16).T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout="5.1")
        frame.rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    waveform, _ = read_audio(tmp_path / "a.flac")
    assert waveform.shape == (2, RATE // 2)
    assert (waveform[0] - 2 * waveform[1]).abs().max() < 0.01 and waveform[0].max() > 0.2


# Video


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (25, Fraction(25)),
        (25.0, Fraction(25)),
        ("23.976", Fraction(24000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        ("59.94", Fraction(60000, 1001)),
        ("30000/1001", Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
        (Fraction(24000, 1001), Fraction(24000, 1001)),
        (240, Fraction(240)),
    ],
)
def test_frame_rates(given, meant):
    assert frame_rate(given) == meant


@pytest.mark.parametrize("given", ["fast", "25/0", float("nan"), 0, -25, 1000])
def test_impossible_frame_rates_are_refused(given):
    with pytest.raises(ValueError, match="frame rate"):
        frame_rate(given)


def click_video(path: Path, fps: str, rate: int, flashes: tuple[int, ...], frames: int, size=(64, 48)) -> torch.Tensor:
    """A video that flashes at some frames, each with a click at the frame's time; returns its waveform [1, N]."""
    exact = frame_rate(fps)
    waveform = torch.zeros(1, round(float(frames / exact) * rate))
    for flash in flashes:
        start = round(float(flash / exact) * rate)
        waveform[0, start : start + rate // 200] = 0.9
    pictures = torch.full((frames, size[1], size[0], 3), 40, dtype=torch.uint8)
    pictures[list(flashes)] = torch.tensor([200, 60, 30], dtype=torch.uint8)
    with VideoWriter(path, fps, size, audio=(waveform, rate)) as video:
        for chunk in pictures.split(7):
            video.write(chunk)
    return waveform


@pytest.mark.parametrize(("fps", "rate"), [("25", 44_100), ("23.976", 48_000), ("60", 8_000), ("29.97", 192_000)])
def test_picture_and_sound_meet(tmp_path, fps, rate):
    exact, flashes, frames = frame_rate(fps), (13, 30, 47), 60
    waveform = click_video(tmp_path / "out.mp4", fps, rate, flashes, frames)
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.name == "h264" and sound.codec_context.name == "aac"
        assert video.average_rate == exact and video.frames == frames
        assert float(video.duration * video.time_base) == pytest.approx(float(frames / exact), abs=1e-4)
        length = float(sound.duration * sound.time_base)
        seen = [frame.time for frame in container.decode(video) if frame.to_ndarray(format="rgb24").mean() > 60]
    assert seen == pytest.approx([float(flash / exact) for flash in flashes], abs=1e-4)
    assert length == pytest.approx(waveform.shape[1] / rate, abs=1 / 44_100)
    heard, new_rate = read_audio(tmp_path / "out.mp4")
    assert abs(heard.shape[1] - waveform.shape[1] * new_rate / rate) <= 1
    loud = (heard[0].abs() > 0.4).nonzero()[:, 0]
    onsets = loud[torch.cat([torch.tensor([True]), loud.diff() > new_rate // 20])] / new_rate
    assert len(onsets) == len(flashes)
    assert (onsets - torch.tensor(seen)).abs().max() < 0.002


def test_sound_and_picture_are_interleaved(tmp_path):
    click_video(tmp_path / "out.mp4", "25", 44_100, (10,), 200)
    with av.open(str(tmp_path / "out.mp4")) as container:
        last = {"video": 0.0, "audio": 0.0}
        for packet in container.demux():
            if packet.dts is not None:
                last[packet.stream.type] = float(packet.dts * packet.time_base)
                assert abs(last["video"] - last["audio"]) < 1.1


def test_sound_is_streamed_from_a_file(tmp_path):
    samples = tone(1.0, channels=2)
    write_sound(tmp_path / "a.flac", samples, 44_100, "flac")
    with VideoWriter(tmp_path / "out.mp4", 25, (32, 32), audio=tmp_path / "a.flac") as video:
        video.write(torch.zeros(9, 32, 32, 3, dtype=torch.uint8))
    heard, rate = read_audio(tmp_path / "out.mp4")
    assert rate == 44_100 and heard.shape == samples.shape  # all of it, although the picture ended earlier
    assert (heard - torch.from_numpy(samples)).std() < 0.02


def bt709(red: int, green: int, blue: int) -> tuple[float, float, float]:
    """Y, Cb, Cr in limited range (ITU-R BT.709)."""
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 16 + luma * 219 / 255, 128 + (blue - luma) / 1.8556 * 224 / 255, 128 + (red - luma) / 1.5748 * 224 / 255


@pytest.mark.parametrize("size", [(64, 48), (33, 47), (17, 16)])
def test_colours_and_odd_sizes(tmp_path, size):
    width, height = size
    colours = torch.tensor([[200, 60, 30], [20, 180, 90], [30, 40, 220], [255, 255, 255], [0, 0, 0]], dtype=torch.uint8)
    frames = colours[:, None, None].expand(-1, height, width, -1)
    with VideoWriter(tmp_path / "out.mp4", 25, size) as video:
        video.write(frames)
    with av.open(str(tmp_path / "out.mp4")) as container:
        codec = container.streams.video[0].codec_context
        # BT.709 (1) throughout, limited range (1): a player needs no guess
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
        for frame, colour in zip(container.decode(video=0), colours, strict=True):
            assert (frame.width, frame.height) == (width + width % 2, height + height % 2)
            planes = (frame.to_ndarray()[:height, :width], *np.split(frame.to_ndarray()[frame.height :].ravel(), 2))
            for plane, value in zip(planes, bt709(*colour.tolist()), strict=True):
                assert np.abs(plane - value).max() <= 2


def test_frames_and_sound_that_do_not_fit_are_refused(tmp_path):
    expected = r"expected uint8 \[b, 32, 48, 3\]"
    with pytest.raises(ValueError, match=expected), VideoWriter(tmp_path / "out.mp4", 25, (48, 32)) as video:
        video.write(torch.zeros(2, 48, 32, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        VideoWriter(tmp_path / "out.mp4", 25, (48, 32), audio=(torch.full((1, 100), torch.nan), RATE))
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_video_leaves_nothing(tmp_path, error):
    (tmp_path / "out.mp4").write_bytes(b"an earlier result")
    threads = threading.active_count()
    with pytest.raises(error), VideoWriter(tmp_path / "out.mp4", 25, (64, 64)) as video:
        for _ in range(10):
            video.write(torch.zeros(30, 64, 64, 3, dtype=torch.uint8))
        while len(names(tmp_path)) == 1:
            time.sleep(0.01)
        raise error
    assert names(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"an earlier result"
    assert threading.active_count() == threads


def test_an_error_in_the_encoding_thread_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    def broken(self, pixels, index):
        raise RuntimeError("the encoder broke")

    monkeypatch.setattr(VideoWriter, "_picture", broken)
    with pytest.raises(RuntimeError, match="the encoder broke"), VideoWriter(tmp_path / "out.mp4", 25, (512, 512)) as video:
        for _ in range(100):  # more than the queue holds: writing must not hang
            video.write(torch.zeros(8, 512, 512, 3, dtype=torch.uint8))
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX feature")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    script = f"""
import resource, signal, torch
from pctalk.media import VideoWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with VideoWriter({str(tmp_path / "out.mp4")!r}, 25, (256, 256)) as video:
        for seed in range(4):
            video.write(torch.randint(0, 256, (8, 256, 256, 3), dtype=torch.uint8))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "out.mp4 could not be written" in done.stdout and "free some space" in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_the_queue_is_bounded(tmp_path, monkeypatch):
    encode, size = VideoWriter._picture, 1024
    monkeypatch.setattr(VideoWriter, "_picture", lambda *args: (time.sleep(0.02), encode(*args))[1])
    with VideoWriter(tmp_path / "out.mp4", 25, (size, size), preset="ultrafast") as video:
        assert video._queue.maxsize * size * size * 3 <= 64 * 2**20
        video.write(torch.zeros(40, size, size, 3, dtype=torch.uint8))
        assert video.wait_seconds > 0.1  # 40 frames don't fit: writing had to wait
    assert video.frames == 40 and video.encode_seconds > 0.8


def test_output_paths(tmp_path):
    assert check_output(tmp_path / "out.mp4") == tmp_path / "out.mp4"
    assert names(tmp_path) == []
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"does not end in \.mp4"):
        check_output(tmp_path / "out.avi")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_output(tmp_path / "folder.mp4")
    with pytest.raises(FileNotFoundError, match="doesn't exist: create it"):
        check_output(tmp_path / "absent" / "out.mp4")
    with pytest.raises(FileNotFoundError, match="doesn't exist: create it"):
        check_output(tmp_path / "file" / "out.mp4")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_can_not_be_written(tmp_path):
    with pytest.raises(OSError, match=r"can't be written .*: choose another folder"):
        check_output("/proc/self/out.mp4")
