"""Pictures of what can't be seen in a video: keypoints over a portrait, and motion over time under its sound."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .faces import crop_image
from .keypoints import BROWS, EYES, LIPS, NUM_KEYPOINTS, Deformation, Keypoints
from .render import Portrait

REST = tuple(k for k in range(NUM_KEYPOINTS) if k not in LIPS + EYES + BROWS)
PARTS = {"lips": LIPS, "eyes": EYES, "brows": BROWS, "rest": REST}
COLORS = {"lips": (255, 107, 107), "eyes": (77, 208, 225), "brows": (255, 213, 79), "rest": (176, 190, 197)}

BACKGROUND = (24, 26, 31)
GRID = (52, 56, 64)
TEXT = (205, 210, 218)
WAVEFORM = (121, 134, 203)


def draw_keypoints(portrait: Portrait, keypoints: Keypoints) -> Iterator[Tensor]:
    """The 21 keypoints over the face crop, coloured by region and numbered, one picture per frame of the track.

    Yields: uint8 [S, S, 3], S the crop's size. A still portrait lies under every frame, a video is held at its last.
    """
    font = ImageFont.load_default(11)
    points = keypoints.posed()[..., :2].cpu()
    drawn_under = -1
    for index, frame_points in enumerate(points):
        source = min(index, len(portrait.crops) - 1)
        if source != drawn_under:
            crop = portrait.crops[source]
            # Half as bright: the points are the subject.
            backdrop = Image.fromarray((crop_image(portrait.frames[source].cpu(), crop) // 2).numpy())
            drawn_under = source
        picture = backdrop.copy()
        draw = ImageDraw.Draw(picture)
        centers = ((frame_points + 1) * (crop.size / 2)).tolist()
        for part, members in PARTS.items():
            for k in members:
                x, y = centers[k]
                draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=COLORS[part], outline=BACKGROUND)
                draw.text((x + 7, y - 7), str(k), fill=COLORS[part], font=font)
        yield torch.from_numpy(np.array(picture))


def plot_deformation(
    deformation: Deformation, waveform: Tensor | None = None, sample_rate: int = 0, width: int = 1280, height: int = 720
) -> Tensor:
    """How far each part of the face moves, frame by frame, under the sound that moves it.

    A curve is the root mean square length of the offsets of a region's keypoints (1 is half the face crop); all share
    one scale. Args: waveform [C, N] or [N] at sample_rate Hz. Returns: uint8 [height, width, 3].
    """
    picture = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(15)
    seconds = deformation.frames / deformation.fps
    lengths = deformation.offsets.float().cpu().square().sum(-1)
    curves = {part: lengths[:, list(members)].mean(-1).sqrt() for part, members in PARTS.items()}
    top = max(1e-4, max(float(curve.max()) for curve in curves.values()))

    left, right, bottom, gap = 88, width - 24, height - 40, 14
    rows = [*PARTS] if waveform is None else ["sound", *PARTS]
    row_height = (bottom - 20 - gap * (len(rows) - 1)) / len(rows)
    step = _tick_step(seconds, 12)
    for tick in range(math.floor(seconds / step) + 1):
        x = left + (right - left) * tick * step / seconds
        draw.line((x, 20, x, bottom), fill=GRID)
        draw.text((x, bottom + 8), f"{tick * step:g} s", fill=TEXT, font=font, anchor="ma")

    for row, name in enumerate(rows):
        y0 = 20 + row * (row_height + gap)
        y1 = y0 + row_height
        draw.line((left, y1, right, y1), fill=GRID)
        draw.text((left - 12, (y0 + y1) / 2), name, fill=COLORS.get(name, WAVEFORM), font=font, anchor="rm")
        if name == "sound":
            _draw_waveform(draw, waveform, sample_rate * seconds, (left, y0, right, y1))
            continue
        draw.text((right, y0), f"{top:.3f}", fill=TEXT, font=font, anchor="ra")
        curve = curves[name]
        xs = left + (right - left) * (torch.arange(len(curve)) + 0.5) / len(curve)
        ys = y1 - row_height * curve / top
        line = list(zip(xs.tolist(), ys.tolist(), strict=True))
        if len(line) == 1:  # a still: the same all the time
            line = [(left, line[0][1]), (right, line[0][1])]
        draw.line(line, fill=COLORS[name], width=2, joint="curve")
    return torch.from_numpy(np.array(picture))


def _tick_step(seconds: float, most: int) -> float:
    """The roundest step in seconds that gives at most `most` ticks."""
    step = 10.0 ** math.floor(math.log10(seconds / most))
    return next(step * factor for factor in (1, 2, 5, 10) if seconds / (step * factor) <= most)


def _draw_waveform(draw: ImageDraw.ImageDraw, waveform: Tensor, samples: float, box: tuple[float, float, float, float]) -> None:
    """Lowest to highest sample under each pixel column; `samples` of it span the box."""
    left, y0, right, y1 = box
    mono = waveform.float().cpu().reshape(-1, waveform.shape[-1]).mean(0)
    mono = mono / mono.abs().max().clamp(min=1e-6)
    middle, half = (y0 + y1) / 2, (y1 - y0) / 2
    columns = int(right - left)
    for column in range(columns):
        piece = mono[int(column * samples / columns) : max(1, int((column + 1) * samples / columns))]
        if len(piece):
            x = left + column
            draw.line((x, middle - half * float(piece.max()), x, middle - half * float(piece.min())), fill=WAVEFORM)
