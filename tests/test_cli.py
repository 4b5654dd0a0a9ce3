"""The command line as a user meets it: what it writes, what it says, what it leaves behind when input is bad."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_liveportrait import write_narrow
from test_media import RATE, names, write_sound
from test_talk import babble

from pctalk.checkpoints import save_motion_model
from pctalk.cli import _parser, main
from pctalk.evaluate.reference import random_motion_model
from pctalk.keypoints import Keypoints

ROOT = Path(__file__).parents[1]
PORTRAIT = ROOT / "web" / "examples" / "portrait.jpg"


@pytest.fixture(scope="module")
def motion_model(tmp_path_factory) -> Path:
    """Random weights of the starter's kind, with outputs of the size of real deformations."""
    model = random_motion_model(dim=32, ff_dim=64, styles=3)
    for network in (model.lac, model.emc):
        torch.nn.init.normal_(network.vertice_map_r.weight, std=0.001)
        torch.nn.init.zeros_(network.vertice_map_r.bias)
    torch.nn.init.zeros_(model.refiner.out_fc.weight)
    torch.nn.init.zeros_(model.refiner.out_fc.bias)
    folder = tmp_path_factory.mktemp("motion_model")
    save_motion_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound") / "speech.wav", babble(0.4), RATE, "pcm_s16le")


@pytest.fixture
def say(tmp_path, motion_model, recording, capsys):
    """Runs `pctalk talk` into a fresh folder `out`: say(*options, portrait=, audio=) to (exit code, stdout, stderr)."""
    (tmp_path / "out").mkdir()

    def run(*options: str | Path, portrait: Path = PORTRAIT, audio: Path = recording) -> tuple[int, str, str]:
        usual = ["-o", tmp_path / "out" / "out.mp4", "--motion-model", motion_model]  # options given later win
        try:
            code = main([str(argument) for argument in ("talk", portrait, audio, *usual, *options)])
        except SystemExit as stopped:  # argparse's way
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def assert_refused(result: tuple[int, str, str], folder: Path, *expected: str) -> None:
    """Exit code 2, one sentence on stderr with the expected words, and no file left."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("pctalk") and "Traceback" not in err
    for words in expected:
        assert re.search(words, err), f"{words!r} is not in {err!r}"
    assert names(folder) == []


# What works


def test_it_writes_a_video_and_says_where_the_time_went(tmp_path, say):
    saved = tmp_path / "out" / "motion.safetensors"
    code, out, err = say(
        *("--emotion", "happy:lips:0.5", "--emotion", "sad:upper_face:0.3", "--emotion", "contempt"),
        *("--style", "1", "--amplitude", "1.2", "--follow-loudness", "0.5", "--articulation", "opening:1.2"),
        *("--articulation", "pursing:0.9", "--lips", "add", "--fps", "29.97", "--save-motion", saved),
        audio=write_sound(tmp_path / "a.wav", babble(0.6), RATE, "pcm_s16le"),
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    video = Path(lines[0])
    assert video == tmp_path / "out" / "out.mp4"
    assert re.match(r"18 frames of \d+ x \d+ at 29\.97 fps in .* s: .* frames a second, the first after .* s", lines[1])
    stages = [line.split("  ")[1] for line in lines[2:]]
    assert stages == [
        *("reading", "face", "speech", "lips", "emotions", "rendering"),
        *("waiting for the encoder", "the rest", "encoding, meanwhile"),
    ]
    assert names(tmp_path / "out") == ["motion.safetensors", "out.mp4"]
    assert Keypoints.load(saved).frames == 15
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        assert len(frames) == 18 and container.streams.audio
    with Image.open(PORTRAIT) as picture:
        assert frames[0].shape == (picture.height, picture.width)
        assert np.abs(frames[0].astype(float) - np.array(picture.convert("L"))).mean() < 6


def test_the_crop_instead_of_the_whole_picture(tmp_path, say):
    code, out, _ = say("--no-paste-back")
    assert code == 0 and "10 frames of 512 x 512 at 25 fps" in out


def test_liveportrait_draws_with_the_files_of_a_folder(tmp_path, say):
    folder = write_narrow(tmp_path / "liveportrait")
    pictures = {}
    for options in ((), ("--renderer", folder), ("--renderer", folder, "--precision", "bf16")):
        code, out, err = say(*options, "--device", "cpu")
        assert (code, err) == (0, "") and "10 frames of 320 x 320" in out
        with av.open(str(tmp_path / "out" / "out.mp4")) as container:
            pictures[options] = next(container.decode(video=0)).to_ndarray(format="gray").astype(float)
    mesh, exact, rounded = pictures.values()
    assert np.abs(mesh - exact).mean() > 5
    assert np.abs(exact - rounded).mean() < 1


def test_the_same_input_gives_the_same_frames(tmp_path, say):
    frames = []
    for _ in range(2):
        assert say()[0] == 0
        with av.open(str(tmp_path / "out" / "out.mp4")) as container:
            frames.append([frame.to_ndarray() for frame in container.decode(video=0)])
    assert all(np.array_equal(*pair) for pair in zip(*frames, strict=True))


def test_in_a_shell(tmp_path, motion_model, recording):
    """A pipe instead of a terminal: the result on stdout, nothing on stderr, not even a progress bar."""
    command = [sys.executable, "-m", "pctalk", "talk", PORTRAIT, recording, "-o", "out.mp4", "--motion-model", motion_model]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out.mp4\n10 frames of ")
    assert names(tmp_path) == ["out.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are a POSIX feature")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path, motion_model, number):
    sound = write_sound(tmp_path / "long.wav", babble(40), RATE, "pcm_s16le")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "pctalk", "talk", PORTRAIT, sound, "-o", tmp_path / "out" / "out.mp4"]
    process = subprocess.Popen(
        [*command, "--motion-model", motion_model],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and not names(tmp_path / "out"):
            time.sleep(0.05)
        assert names(tmp_path / "out")[0].endswith(".part")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")
    assert names(tmp_path / "out") == []


def test_the_starter_opens_the_lips_with_the_voice(tmp_path, capsys):
    """What ships, as `make demo` runs it, on the first four seconds of the example."""
    from pctalk.media import read_audio
    from pctalk.speech import loudness_envelope

    waveform, _ = read_audio(ROOT / "web" / "examples" / "speech.flac")
    sound = write_sound(tmp_path / "a.wav", waveform[:, : 4 * RATE].numpy(), RATE, "pcm_s16le")
    arguments = ["talk", PORTRAIT, sound, "-o", tmp_path / "out.mp4", "--save-motion", tmp_path / "motion.safetensors"]
    assert main([*map(str, arguments), "--emotion", "happy:all:0.5"]) == 0
    assert "100 frames of 320 x 320" in capsys.readouterr().out
    expression = Keypoints.load(tmp_path / "motion.safetensors").expression
    opening = expression[:, 19, 1] - expression[:, 20, 1]  # lower against upper lip
    voice = 10.0 ** (loudness_envelope(waveform[0, : 4 * RATE]) / 20.0)
    together = [torch.corrcoef(torch.stack([opening.roll(shift), voice]))[0, 1] for shift in range(100)]
    assert together[0] > 0.3 and together[0] > torch.stack(together[10:90]).quantile(0.9)


# Pictures


def portrait() -> Image.Image:
    with Image.open(PORTRAIT) as picture:
        return picture.convert("RGB")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_pictures_of_other_kinds(tmp_path, say, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.array(portrait().convert("L")).astype(np.uint16) * 257)
    else:
        picture = portrait().convert(mode)
    picture.save(tmp_path / "portrait.png")
    code, _, err = say(portrait=tmp_path / "portrait.png")
    assert (code, err) == (0, "") and names(tmp_path / "out") == ["out.mp4"]


def test_a_huge_picture(tmp_path, say, caplog):
    huge = Image.new("RGB", (8000, 6000), "grey")
    huge.paste(portrait().resize((3600, 3600)), (2000, 1200))
    huge.save(tmp_path / "huge.jpg")
    code, out, _ = say("--fps", "5", portrait=tmp_path / "huge.jpg")
    assert code == 0 and "2 frames of 1920 x 1440" in out
    assert "huge.jpg is reduced from 8000 x 6000 to 1920 x 1440 pixels" in caplog.text


def test_several_faces(tmp_path, say):
    both = Image.new("RGB", (640, 320), "grey")
    both.paste(portrait().resize((320, 320)), (0, 0))
    both.paste(portrait().resize((240, 240)), (360, 40))
    both.save(tmp_path / "both.png")
    changes = []
    for face in ("0", "1"):
        code, _, err = say("--face", face, "--amplitude", "5", portrait=tmp_path / "both.png")
        assert (code, err) == (0, "")
        with av.open(str(tmp_path / "out" / "out.mp4")) as container:
            frames = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
        changes.append(np.ptp(frames.astype(float), axis=0))
    # Each run moves its own face, the left and larger one first, and nothing else.
    left, right = slice(0, 320), slice(360, 600)
    assert changes[0][:, left].mean() > 4 * changes[0][:, right].mean()
    assert changes[1][:, right].mean() > 4 * changes[1][:, left].mean()
    (tmp_path / "out" / "out.mp4").unlink()
    assert_refused(say("--face", "2", portrait=tmp_path / "both.png"), tmp_path / "out", "shows 2 faces", "from 0 .* to 1")


def test_a_face_half_out_of_the_frame(tmp_path, say):
    picture = portrait()
    middle = picture.width // 2
    picture.crop((middle - 20, 0, picture.width, picture.height)).save(tmp_path / "half.png")
    code, out, err = say(portrait=tmp_path / "half.png")
    if code == 0:
        assert names(tmp_path / "out") == ["out.mp4"]
    else:
        assert_refused((code, out, err), tmp_path / "out", "No face found", "choose another")


@pytest.mark.parametrize(
    ("name", "picture", "expected"),
    [
        ("landscape.png", Image.effect_noise((300, 200), 60), ("No face found", "choose another")),
        ("tiny.png", Image.new("RGB", (16, 16)), ("16", "at least")),
    ],
)
def test_pictures_without_a_usable_face(tmp_path, say, name, picture, expected):
    picture.save(tmp_path / name)
    assert_refused(say(portrait=tmp_path / name), tmp_path / "out", *expected)


def test_files_that_are_no_pictures(tmp_path, say, recording):
    (tmp_path / "cut.jpg").write_bytes(PORTRAIT.read_bytes()[:9000])
    assert_refused(say(portrait=tmp_path / "cut.jpg"), tmp_path / "out", "damaged or cut short", "save the picture again")
    assert_refused(say(portrait=recording), tmp_path / "out", "not a picture", "save it as PNG or JPEG")
    assert_refused(say(portrait=tmp_path / "absent.png"), tmp_path / "out", "no picture at", "check the path")
    assert_refused(say(portrait=tmp_path), tmp_path / "out", "is a folder", "name a file")


# Sound (what works is in test_talk.py and test_media.py)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.zeros((1, RATE), np.float32), ("silent", "choose a recording")),
        (1e-4 * babble(1.0), ("silent", "choose a recording")),
        (np.full((1, RATE), np.nan, np.float32), ("NaN", "export it again")),
        (babble(0.05), (r"0\.05", "choose a longer recording")),
        (babble(1.0) * 32767, ("expected samples in -1..1",)),
    ],
)
def test_sound_that_can_not_be_spoken(tmp_path, say, samples, expected):
    sound = write_sound(tmp_path / "a.wav", samples, RATE, "pcm_f32le")
    assert_refused(say(audio=sound), tmp_path / "out", *expected)


def test_files_that_are_no_recordings(tmp_path, say):
    (tmp_path / "empty.wav").touch()
    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode())
    assert_refused(say(audio=tmp_path / "empty.wav"), tmp_path / "out", "not a recording", "save it as WAV")
    assert_refused(say(audio=tmp_path / "silent.mp4"), tmp_path / "out", "holds no sound", "a video with a sound track")
    assert_refused(say(audio=PORTRAIT), tmp_path / "out", "holds no sound")
    assert_refused(say(audio=tmp_path / "absent.wav"), tmp_path / "out", "no recording at", "check the path")


# Weights


def test_weight_files_that_are_missing_or_broken(tmp_path, say, motion_model):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in motion_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    lac = (copy / "lac.safetensors").read_bytes()
    (copy / "lac.safetensors").write_bytes(lac[: len(lac) // 2])
    assert_refused(say("--motion-model", copy), tmp_path / "out", "lac.safetensors", "again")
    (copy / "lac.safetensors").unlink()
    assert_refused(say("--motion-model", copy), tmp_path / "out", "no lac.safetensors", "put the file there")
    (copy / "lac.safetensors").write_bytes((copy / "emc.safetensors").read_bytes())
    assert_refused(say("--motion-model", copy), tmp_path / "out", "emc", "expected lac")
    assert_refused(say("--motion-model", tmp_path / "absent"), tmp_path / "out", "no motion model at")


# Output


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("absent/out.mp4", ("doesn't exist", "create it")),
        ("out.avi", ("does not end in .mp4",)),
        ("folder.mp4", ("is a folder",)),
    ],
)
def test_outputs_that_can_not_be_written(tmp_path, say, output, expected):
    (tmp_path / "folder.mp4").mkdir()
    assert_refused(say("-o", tmp_path / output), tmp_path / "out", *expected)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_can_not_be_written(tmp_path, say):
    assert_refused(say("-o", "/proc/self/out.mp4"), tmp_path / "out", "can't be written", "choose another folder")


# Arguments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--emotion", "joy"), ("unknown emotion 'joy'", "happy")),
        (("--emotion", "happy:nose:0.5"), ("unknown region 'nose'", "lips")),
        (("--emotion", "happy:lips:0.5:1"), ("too many parts",)),
        (("--emotion", "happy:much"), ("'much' is not a number",)),
        (("--emotion", "happy:nan"), ("'nan' is not a number",)),
        (("--articulation", "smiling:2"), ("unknown articulation 'smiling'", "opening:1.2")),
        (("--articulation", "opening"), ("is not a number",)),
        (("--amplitude", "loud"), ("'loud' is not a number",)),
        (("--follow-loudness", "2"), ("follow_loudness is 2",)),
        (("--style", "99"), ("Style 99 is out of range", "0 to 2")),
        (("--fps", "0"), ("between 1 and 240",)),
        (("--fps", "fast"), ("not a frame rate",)),
        (("--lips", "keep"), ("invalid choice: 'keep'",)),
        (("--save-motion", "absent/motion.safetensors"), ("doesn't exist",)),
        (("--save-motion", "motion.pt"), ("does not end in .safetensors",)),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, say, options, expected):
    assert_refused(say(*options), tmp_path / "out", *expected)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("happy", ("happy", "all", 0.5)),
        ("happy:0.3", ("happy", "all", 0.3)),
        ("sad:brows", ("sad", "brows", 0.5)),
        ("sad:brows:0", ("sad", "brows", 0.0)),
    ],
)
def test_short_forms_of_an_emotion(text, parsed):
    assert _parser().parse_args(["talk", "a", "b", "-o", "c.mp4", "--emotion", text]).emotion == [parsed]


def test_help_and_version(capsys):
    for arguments in (["--help"], ["talk", "--help"], ["verify", "--help"], ["bench", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    assert "--articulation" in capsys.readouterr().out


# The other commands


def test_verify_prints_every_tensor_and_fails_above_the_tolerance(tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    original = ROOT / "tests" / "golden" / "emc.safetensors"
    (tmp_path / original.name).write_bytes(original.read_bytes())
    assert main(["verify", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4 and all(line.startswith("emc.safetensors") and line.endswith("ok") for line in lines)
    with safe_open(original, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    tensors["happy"] = tensors["happy"] + 0.01 * tensors["happy"].std()
    save_file(tensors, tmp_path / original.name, metadata)
    assert main(["verify", str(tmp_path)]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_verify_says_what_is_wrong_with_its_input(tmp_path, capsys):
    for folder, expected in ((tmp_path, "no golden file"), (tmp_path / "absent", "no folder")):
        assert main(["verify", str(folder)]) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(tmp_path), "--device", "abacus"])
    assert stopped.value.code == 2 and "no device of this machine" in capsys.readouterr().err


def test_bench_passes_its_options_on(monkeypatch):
    from pctalk.evaluate import bench

    calls = []
    monkeypatch.setattr(bench, "bench", lambda **options: calls.append(options))
    assert main(["bench", "--long", "--runs", "5"]) == 0
    assert calls == [{"runs": 5, "long": True}]


def test_train_hands_over_to_the_training(monkeypatch):
    from pctalk.train import starter

    calls = []
    monkeypatch.setattr(starter, "main", lambda arguments: calls.append(arguments) or 0)
    assert main(["train", "--work", "somewhere", "--quick"]) == 0
    assert calls == [["--work", "somewhere", "--quick"]]


def test_torch_is_told_not_to_spin():
    """OpenMP reads its wait policy when torch is imported, so the command line must not import it any earlier."""
    script = "import os, sys, pctalk.cli; early = 'torch' in sys.modules; pctalk.cli.main(['verify', 'absent']); "
    script += "print(early, 'torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "False True PASSIVE\n", done.stderr


# Renderers


def test_a_folder_without_liveportraits_files(tmp_path, say):
    words = ("liveportrait lacks .*motion_extractor.safetensors", "Kijai/LivePortrait_safetensors", "pctalk convert")
    assert_refused(say("--renderer", tmp_path / "liveportrait"), tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "fp16"], "the mesh renderer computes in fp32"),
        (["--device", "meta"], "the mesh renderer runs on the CPU"),
        (["--renderer", "files", "--precision", "fp16", "--device", "cpu"], "choose auto, fp32 or bf16"),
        (["--precision", "fp8"], "invalid choice"),
    ],
)
def test_precision_and_device_that_do_not_fit(tmp_path, say, options, words):
    assert_refused(say(*options), tmp_path / "out", words)
