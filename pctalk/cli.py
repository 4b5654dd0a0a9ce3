"""The command line: pctalk talk | convert | verify | bench | train.

Nothing that imports torch is imported up here: `main` has a word with OpenMP first.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from . import __version__

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 when a check failed, 2 for bad input (said on stderr), 130 interrupted."""
    # Torch's threads would spin while they wait for each other and take the processor from the video encoder: on two cores
    # the whole chain then runs six times slower as soon as anything else runs too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _termination_as_interrupt():
            if arguments[:1] == ["train"]:
                return _train(arguments[1:])
            options = _parser().parse_args(arguments)
            return options.run(options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        extra = "cli,train" if arguments[:1] == ["train"] else "cli"
        print(f"pctalk: {error.name} is not installed: run `pip install 'comfyui-pctalk[{extra}]'`.", file=sys.stderr)
        return BAD_INPUT
    except (ValueError, OSError) as error:
        print(f"pctalk: {error}", file=sys.stderr)
        return BAD_INPUT


@contextmanager
def _termination_as_interrupt():
    """Lets a request to terminate clean up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (`{self.prog} --help` lists what is expected)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    from .keypoints import EMOTIONS, REGIONS

    parser = _Parser(prog="pctalk", description="A portrait speaks a recording, with the emotion you choose.")
    parser.add_argument("--version", action="version", version=f"pctalk {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    talk = commands.add_parser("talk", help="make a talking video", description="Write a video in which PORTRAIT speaks AUDIO.")
    talk.set_defaults(run=_talk)
    talk.add_argument("portrait", type=Path, metavar="PORTRAIT", help="a picture with a face")
    talk.add_argument("audio", type=Path, metavar="AUDIO", help="a recording of speech, or a video with sound")
    talk.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4", help="the video to write")
    talk.add_argument(
        "--emotion",
        type=_emotion,
        action="append",
        default=[],
        metavar="NAME[:REGION][:INTENSITY]",
        help=f"add an emotion (default region all, intensity 0.5; may be repeated): {', '.join(EMOTIONS[1:])}; "
        f"regions: {', '.join(REGIONS)}",
    )
    talk.add_argument("--style", type=int, metavar="N", help="speaking style by number (default: the model's recommendation)")
    talk.add_argument("--amplitude", type=_number, default=1.0, metavar="F", help="how far the lips move (default 1)")
    talk.add_argument(
        "--follow-loudness",
        type=_number,
        default=0.0,
        metavar="F",
        help="how much the lips follow the volume, 0 to 1 (default 0)",
    )
    talk.add_argument(
        "--articulation",
        type=_articulation,
        action="append",
        default=[],
        metavar="NAME:GAIN",
        help="strengthen or weaken pursing, widening or opening; 1 leaves it, 0.8 to 1.2 is safe (may be repeated)",
    )
    talk.add_argument(
        "--lips", choices=("replace", "add"), default="replace", help="what happens to the portrait's own mouth shape"
    )
    talk.add_argument(
        "--motion-model", default="starter", metavar="starter|DIR", help="the model that moves the face (default starter)"
    )
    talk.add_argument(
        "--renderer",
        default="mesh",
        metavar="mesh|DIR",
        help="what draws the face: mesh, or a folder with LivePortrait's files, such as models/liveportrait (default mesh)",
    )
    talk.add_argument(
        "--precision",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="of LivePortrait's drawing; auto is fp16 on CUDA and fp32 elsewhere, mesh always computes in fp32 (default auto)",
    )
    talk.add_argument(
        "--device",
        type=_device,
        help="where LivePortrait runs, such as cpu, cuda or mps (default cuda where there is one, else cpu)",
    )
    talk.add_argument(
        "--fps", type=_frame_rate, default="25", metavar="FPS", help="frames a second, such as 25, 29.97 or 60 (default 25)"
    )
    talk.add_argument("--face", type=int, default=0, metavar="N", help="which face of several, 0 is the largest (default 0)")
    talk.add_argument("--no-paste-back", action="store_true", help="show the upright face crop instead of the whole picture")
    talk.add_argument("--save-motion", type=Path, metavar="FILE", help="also save the keypoints, as .safetensors")

    convert = commands.add_parser(
        "convert",
        help="make .safetensors of published weights",
        description="Write the networks of PC-Talk or LivePortrait in FILEs of any published layout as .safetensors.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .pth or .safetensors file")
    convert.add_argument("--to", type=Path, metavar="DIR", help="the folder to write to (default: beside each file)")

    verify = commands.add_parser(
        "verify", help="compare the networks with reference numbers", description="Recompute every golden file found in DIR."
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("folder", type=Path, metavar="DIR", help="the folder with the golden .safetensors files")
    verify.add_argument(
        "--device", type=_device, default="cpu", help="where to compute, such as cpu, cuda or mps (default cpu)"
    )

    bench = commands.add_parser(
        "bench", help="measure speed and memory", description="Measure speed and memory on this machine."
    )
    bench.set_defaults(run=_bench)
    bench.add_argument("--long", action="store_true", help="also measure memory over a 10-minute recording (takes minutes)")
    bench.add_argument("--runs", type=_count, default=3, metavar="N", help="measure N times, show medians (default 3)")
    bench.add_argument(
        "--renderer",
        choices=("mesh", "liveportrait"),
        default="mesh",
        help="mesh: the whole chain on the CPU; liveportrait: its networks alone, with random weights (default mesh)",
    )
    bench.add_argument(
        "--device",
        type=_device,
        default="cpu",
        help="where the liveportrait networks run, such as cpu, cuda or mps (default cpu)",
    )

    # Listed here for the help text; its own arguments are read by the training code.
    commands.add_parser("train", help="train the starter motion model")
    return parser


def _emotion(text: str) -> tuple[str, str, float]:
    """NAME, NAME:REGION, NAME:INTENSITY or NAME:REGION:INTENSITY."""
    from .keypoints import EMOTIONS, REGIONS

    name, *rest = text.split(":")
    if name not in EMOTIONS:
        raise argparse.ArgumentTypeError(f"unknown emotion {name!r}, choose one of {', '.join(EMOTIONS)}")
    region = rest.pop(0) if rest and (rest[0] in REGIONS or len(rest) > 1) else "all"
    if region not in REGIONS:
        raise argparse.ArgumentTypeError(f"unknown region {region!r} in {text!r}, choose one of {', '.join(REGIONS)}")
    if len(rest) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} has too many parts, expected NAME:REGION:INTENSITY")
    return name, region, _number(rest[0]) if rest else 0.5


def _articulation(text: str) -> tuple[str, float]:
    name, _, gain = text.partition(":")
    if name not in ("pursing", "widening", "opening"):
        raise argparse.ArgumentTypeError(
            f"unknown articulation {name!r}, choose pursing, widening or opening, as in opening:1.2"
        )
    return name, _number(gain)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs, give 1 or more")
    return int(text)


def _frame_rate(text: str) -> Fraction:
    from .media import frame_rate

    try:
        return frame_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device(text: str):
    import torch

    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError):  # torch raises either for a name it doesn't know or a device that isn't there
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine, choose cpu, cuda or mps") from None


def _talk(options: argparse.Namespace) -> int:
    from .checkpoints import load_motion_model
    from .talk import EmotionRequest, TalkOptions, talk

    chosen = TalkOptions(
        emotions=tuple(EmotionRequest(*emotion) for emotion in options.emotion),
        style=options.style,
        amplitude=options.amplitude,
        follow_loudness=options.follow_loudness,
        **dict(options.articulation),
        lips=options.lips,
        fps=options.fps,
        face=options.face,
        paste_back=not options.no_paste_back,
    )
    model = load_motion_model(None if options.motion_model == "starter" else Path(options.motion_model))
    renderer = _renderer(options.renderer, options.precision, options.device)
    with _progress_bar() as progress:
        report = talk(
            options.portrait,
            options.audio,
            options.output,
            model,
            renderer,
            chosen,
            motion_path=options.save_motion,
            progress=progress,
        )
    width, height = report.size
    print(report.path)
    print(
        f"{report.frames} frames of {width} x {height} at {float(report.fps):.6g} fps in {report.elapsed:.1f} s: "
        f"{report.speed:.1f} frames a second, the first after {report.first_frame:.2f} s"
    )
    for stage, seconds in report.stages.items():
        print(f"  {stage:<24}{seconds:7.2f} s{seconds / report.elapsed:7.1%}")
    print(f"  {'encoding, meanwhile':<24}{report.encoding:7.2f} s")
    return 0


def _renderer(name: str, precision: str, device):
    """The renderer named `mesh`, or the one with LivePortrait's files in the folder of that name."""
    import torch

    if name == "mesh":
        from .render.mesh import MeshRenderer

        if precision not in ("auto", "fp32"):
            raise ValueError(f"--precision {precision} is for LivePortrait: leave it out, the mesh renderer computes in fp32.")
        if device not in (None, torch.device("cpu")):
            raise ValueError(f"--device {device} is for LivePortrait: leave it out, the mesh renderer runs on the CPU.")
        return MeshRenderer.from_assets()
    from .render.liveportrait import LivePortraitRenderer, chosen_dtype

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LivePortraitRenderer.from_folder(Path(name), chosen_dtype(precision, device), device).to(device)


@contextmanager
def _progress_bar():
    """A function progress(stage, done, total) that draws a bar on stderr, or nothing when that is no terminal."""
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            bars[stage] = tqdm(total=total, desc=stage, unit="frame", leave=False, disable=not sys.stderr.isatty())
        bars[stage].update(done - bars[stage].n)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


def _convert(options: argparse.Namespace) -> int:
    from .convert import convert

    for file in options.files:
        print(convert(file, options.to), flush=True)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .evaluate.golden import verify

    return 0 if all(row.ok for row in verify(options.folder, options.device)) else FAILED


def _bench(options: argparse.Namespace) -> int:
    from .evaluate.bench import bench, table
    from .evaluate.bench_liveportrait import liveportrait_rows

    if options.renderer == "liveportrait":
        if options.long:
            raise ValueError("--long measures the mesh renderer's chain: leave it out with --renderer liveportrait.")
        print(table(liveportrait_rows(options.runs, options.device)))
    elif str(options.device) != "cpu":
        raise ValueError(f"--device {options.device} is for --renderer liveportrait: leave it out, the chain runs on the CPU.")
    else:
        bench(runs=options.runs, long=options.long)
    return 0


def _train(arguments: list[str]) -> int:
    from .train.starter import main as train

    return train(arguments) or 0
