"""`pctalk bench`: how fast the chain is on this machine and how much memory it takes, as a table.

Every figure is a median of several runs. The chain runs as `pctalk talk` does, on the example portrait and recording,
with two emotions, from reading the files to the finished MP4.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from ..checkpoints import MotionModel, load_motion_model
from ..media import AAC_FRAME, read_audio
from ..render import Renderer
from ..render.mesh import MeshRenderer
from ..talk import EmotionRequest, TalkOptions, TalkReport, talk
from .reference import benchmark_motion

EXAMPLES = Path(__file__).parents[2] / "web" / "examples"
OPTIONS = TalkOptions(emotions=(EmotionRequest("happy", "lips", 0.5), EmotionRequest("sad", "upper_face", 0.3)))
LONG_MINUTES = 10.0

# What the nodes import of the engine, once ComfyUI has imported the libraries that it uses itself.
IMPORT_TIME = """
import time, torch, numpy, PIL.Image, av, einops, safetensors.torch, tqdm, scipy
start = time.perf_counter()
import pctalk.checkpoints, pctalk.drawing, pctalk.emc, pctalk.lac, pctalk.speech, pctalk.render.mesh
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the figure, and what is aimed at."""

    name: str
    value: str
    target: str = ""


def bench(runs: int = 3, long: bool = False) -> list[Row]:
    """Measure and print the table. `long` adds a 10-minute recording, whose memory is measured in a process of its own.

    Raises FileNotFoundError where the example portrait and recording are missing (they come with the repository).
    """
    portrait, speech = EXAMPLES / "portrait.jpg", EXAMPLES / "speech.flac"
    for file in (portrait, speech):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run the benchmark from a checkout of the repository.")
    rows = [
        *chain_rows(load_motion_model(), MeshRenderer.from_assets(), portrait, speech, runs),
        *motion_rows(runs),
        Row("Importing the engine into ComfyUI", f"{import_time(runs):.2f} s", "< 0.5 s"),
    ]
    if long:
        rows += memory_rows(portrait, speech, LONG_MINUTES)
    print(table(rows))
    return rows


def chain_rows(model: MotionModel, renderer: Renderer, portrait: Path, speech: Path, runs: int) -> list[Row]:
    """The whole chain: as the crop of 512 x 512, and drawn back into the whole portrait."""
    rows = []
    for paste_back in (False, True):
        options = TalkOptions(OPTIONS.emotions, paste_back=paste_back)
        reports = [_talk(portrait, speech, model, renderer, options) for _ in range(runs)]
        typical = sorted(reports, key=lambda report: report.elapsed)[len(reports) // 2]
        size = " x ".join(map(str, typical.size))
        what = f"{size} {'whole picture' if paste_back else 'crop'}, {float(typical.frames / typical.fps):.1f} s"
        rows.append(Row(f"Whole chain, {what}", f"{typical.speed:.1f} frames/s", ">= 30 frames/s"))
        first = f"{median(report.first_frame for report in reports):.2f} s"
        # Nothing but the models has been loaded before the very first run.
        first += "" if paste_back else f" (cold: {reports[0].first_frame:.2f} s)"
        rows.append(Row("- first frame after", first, "< 2 s"))
        for stage, seconds in typical.stages.items():
            rows.append(Row(f"- {stage}", f"{seconds:.2f} s ({seconds / typical.elapsed:.0%})"))
        rows.append(Row("- encoding, meanwhile", f"{typical.encoding:.2f} s"))
    return rows


def _talk(portrait: Path, speech: Path, model: MotionModel, renderer: Renderer, options: TalkOptions) -> TalkReport:
    with tempfile.TemporaryDirectory() as folder:
        return talk(portrait, speech, Path(folder) / "talk.mp4", model, renderer, options)


def motion_rows(runs: int) -> list[Row]:
    """LAC and EMC at the published width against the published scheme: 10 s of speech, two emotions."""
    timings = benchmark_motion(seconds=10.0, emotions=("happy", "sad"), repeats=runs)
    return [
        Row("LAC + EMC, width 512, 10 s, two emotions", f"{timings.fast:.2f} s"),
        Row("- published scheme", f"{timings.published:.2f} s"),
        Row("- faster by", f"{timings.speedup:.1f} times", ">= 20 times"),
    ]


def import_time(runs: int) -> float:
    """Seconds to import what the nodes use of the engine, in a fresh interpreter that already holds torch and the like."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-c", IMPORT_TIME]
    done = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(runs)]
    return median(float(process.stdout) for process in done)


def memory_rows(portrait: Path, speech: Path, minutes: float) -> list[Row]:
    """The example recording, repeated until it lasts `minutes`, as an MP4 of the 512 x 512 crop."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as process:
        recording = _repeated(speech, minutes, Path(folder) / "long.flac")
        report, growth = process.submit(_talk_and_watch_memory, portrait, recording).result()
    return [
        Row(f"{minutes:g} minutes, 512 x 512: memory above the loaded models", f"{growth / 2**20:.0f} MB", "< 1024 MB"),
        Row("- speed", f"{report.speed:.1f} frames/s"),
        Row("- first frame after", f"{report.first_frame:.1f} s"),
    ]


def _repeated(speech: Path, minutes: float, path: Path) -> Path:
    """The recording over and over, as FLAC at 48 kHz stereo, as a long recording comes."""
    import av

    waveform, rate = read_audio(speech, 48_000)
    waveform = waveform.expand(2, -1).contiguous()
    total = round(minutes * 60 * rate)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=rate, layout="stereo")
        for start in range(0, total, AAC_FRAME):
            index = torch.arange(start, min(start + AAC_FRAME, total)) % waveform.shape[1]
            samples = (waveform[:, index].clamp(-1, 1) * 32767).to(torch.int16)
            frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).contiguous().numpy(), format="s16", layout="stereo")
            frame.rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _talk_and_watch_memory(portrait: Path, recording: Path) -> tuple[TalkReport, int]:
    """The report, and by how many bytes the process grew at most beyond what it held once the models were loaded."""
    model, renderer = load_motion_model(), MeshRenderer.from_assets()
    before = peak = memory_in_use()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, memory_in_use())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        options = TalkOptions(OPTIONS.emotions, paste_back=False)
        return _talk(portrait, recording, model, renderer, options), peak - before
    finally:
        stop.set()
        watcher.join()


def memory_in_use() -> int:
    """Bytes of memory that this process has resident."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        raise OSError("Memory is measured on Linux and macOS only: leave --long out.")
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, headed by the machine they were measured on."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    cells = [(f"On {machine}", "measured", "target"), *((row.name, row.value, row.target) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
