"""`pctalk bench --renderer liveportrait`: how fast the LivePortrait networks draw, with random weights.

Each network, then W and G together as the renderer runs them, frames of a still portrait; next to the plain networks, eager,
one frame at a time. Timings are medians of several runs in turn, so that a busy machine slows both alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from ..keypoints import NUM_KEYPOINTS
from ..networks.liveportrait.appearance import AppearanceFeatureExtractor
from ..networks.liveportrait.generator import SpadeGenerator
from ..networks.liveportrait.inference import fused_appearance, fused_generator, fused_motion, fused_warping
from ..networks.liveportrait.motion import MotionExtractor
from ..networks.liveportrait.warping import WarpingModule
from ..render.liveportrait import appearance_dtype
from .bench import Row
from .golden import filled

PLAIN_FLOPS = 1.234e12  # of W and G for a frame, in their plain form
SPEEDUP = {"cpu": ">= 2 times", "cuda": ">= 3 times"}


class Networks(NamedTuple):
    """F, M, W and G in one form and precision."""

    appearance: torch.nn.Module
    motion: torch.nn.Module
    warping: torch.nn.Module
    generator: torch.nn.Module

    def draw(self, volume: Tensor, source: Tensor, driving: Tensor) -> Tensor:
        return self.generator(self.warping(volume, source, driving).feature)


def random_networks() -> Networks:
    """The plain networks at the published size."""
    networks = AppearanceFeatureExtractor(), MotionExtractor(), WarpingModule(), SpadeGenerator()
    return Networks(*(filled(network, seed=1).requires_grad_(False) for network in networks))


def inference_networks(plain: Networks, device: torch.device, dtype: torch.dtype) -> Networks:
    """As `LivePortraitRenderer` keeps them."""
    winograd = device.type == "cpu" and dtype == torch.float32
    return Networks(
        fused_appearance(plain.appearance).to(device, appearance_dtype(dtype)),
        fused_motion(plain.motion).to(device),
        fused_warping(plain.warping, winograd=winograd).to(device, dtype),
        fused_generator(plain.generator, winograd=winograd).to(device, dtype),
    )


@torch.no_grad()
def liveportrait_rows(
    runs: int, device: torch.device | str = "cpu", batches: Sequence[int] = (), plain: Networks | None = None
) -> list[Row]:
    """The table's rows. batches: frames drawn at once (default: 1 on a CPU, whose cache more would leave; 1 to 16 on a GPU)."""
    device = torch.device(device)
    accelerated = device.type != "cpu"
    plain = plain or random_networks()
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    source = 0.4 * torch.randn(1, NUM_KEYPOINTS, 3, generator=torch.Generator().manual_seed(1)).to(device)
    batches = batches or ((1, 2, 4, 8, 16) if accelerated else (1,))
    driving = (source + torch.linspace(0.0, 0.05, max(batches), device=device)[:, None, None]).contiguous()
    throughput = {
        dtype: matrix_throughput(device, dtype)
        for dtype in ((torch.float32, torch.float16, torch.bfloat16) if accelerated else (torch.float32, torch.bfloat16))
    }

    baseline_dtype = torch.float16 if accelerated else torch.float32
    baseline = Networks(*(copy.deepcopy(network).to(device, baseline_dtype) for network in plain))
    volume = baseline.appearance(image.to(baseline_dtype))
    single = driving[:1]
    rows, reference = [], None
    for dtype, peak in throughput.items():
        name = str(dtype).removeprefix("torch.")
        ours = inference_networks(plain, device, dtype)
        precise = image.to(appearance_dtype(dtype))
        still = ours.appearance(precise)
        feature = ours.warping(still, source, single).feature
        parts = {
            "F, once a source frame": lambda n=ours, i=precise: n.appearance(i),
            "M, once a source frame": lambda n=ours: n.motion(image),
            "W": lambda n=ours, v=still: n.warping(v, source, single),
            "G": lambda n=ours, f=feature: n.generator(f),
        }
        for part, milliseconds in timings(parts, runs, device).items():
            rows.append(Row(f"{part}, {name}", f"{milliseconds:.1f} ms"))
        pair = {"plain": lambda: baseline.draw(volume, source, single)}
        pair |= {str(batch): lambda n=ours, v=still, b=batch: n.draw(v, source, driving[:b]) for batch in batches}
        taken = timings(pair, runs, device)
        fastest = min(batches, key=lambda batch: taken[str(batch)] / batch)
        for batch in batches:
            frame = taken[str(batch)] / batch
            share = PLAIN_FLOPS / (frame / 1e3) / peak
            figures = f"{frame:.1f} ms a frame, {1e3 / frame:.2f} frames/s, {share:.0%} of the matrix throughput"
            rows.append(Row(f"W + G, {name}, {batch} at once", figures))
        plain_name = f"plain W + G, {str(baseline_dtype).removeprefix('torch.')}, eager, one at a time"
        rows.append(Row(f"- {plain_name}", f"{taken['plain']:.1f} ms a frame"))
        speedup = taken["plain"] / (taken[str(fastest)] / fastest)
        target = SPEEDUP.get(device.type, "") if dtype == baseline_dtype else ""
        rows.append(Row("- faster by", f"{speedup:.1f} times", target))
        picture = ours.draw(still, source, single).float()
        if reference is None:
            reference = picture
        else:
            noise = (picture - reference).square().mean()
            rows.append(Row(f"- {name} against float32", f"PSNR {-10.0 * noise.log10().item():.1f} dB", ">= 45 dB"))
    return rows


def timings(runs_of: dict[str, Callable[[], object]], runs: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each, medians of `runs` in turn after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in runs_of}
    for _ in range(runs + 1):
        for name, run in runs_of.items():
            _finish(device)
            start = time.perf_counter()
            run()
            _finish(device)
            taken[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(values[1:]) for name, values in taken.items()}


def matrix_throughput(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """Operations a second of a square matrix product, the best of five: what W and G could reach at most in plain form."""
    size = size or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _finish(device)
        start = time.perf_counter()
        a @ b
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
