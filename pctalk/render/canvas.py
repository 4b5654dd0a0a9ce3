"""The picture that is drawn on, and the rectangles of it that are redrawn.

A canvas is either the crop or the source picture itself. Positions on a face are always crop pixels; a canvas knows where its
own pixels lie in the crop, so pasting back draws at the picture's own resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..faces import crop_image, paste_mask, soft_mask
from . import Portrait
from .warp import refine

FINE_PIXELS = 500_000  # rectangles up to this size are sampled from a picture refined to twice its density


@dataclass(frozen=True)
class Canvas:
    """A picture uint8 [H, W, 3] on the CPU, and the similarity [3, 3] float64 from its pixels to the crop's."""

    picture: Tensor
    to_crop: Tensor

    @classmethod
    def of(cls, portrait: Portrait, index: int, paste_back: bool) -> Canvas:
        """The source frame itself, or the crop cut out of it."""
        frame, crop = portrait.frames[index].cpu(), portrait.crops[index]
        if paste_back:
            return cls(frame, crop.matrix.double().cpu())
        return cls(crop_image(frame, crop), torch.eye(3, dtype=torch.float64))

    @property
    def density(self) -> float:
        """Canvas pixels per crop pixel."""
        return 1.0 / float(self.to_crop[0, :2].norm())

    def crop_positions(self, points: Tensor) -> Tensor:
        """Canvas pixels [..., 2] to crop pixels."""
        return points @ self.to_crop[:2, :2].T + self.to_crop[:2, 2]

    def canvas_positions(self, points: Tensor) -> Tensor:
        """Crop pixels [..., 2] to canvas pixels."""
        inverse = torch.linalg.inv(self.to_crop)
        return points @ inverse[:2, :2].T + inverse[:2, 2]

    def look(self, points: Tensor) -> Tensor:
        """The picture's colours at crop positions [..., 2], bicubic: [..., 3] float64, 0..255."""
        height, width = self.picture.shape[:2]
        places = self.canvas_positions(points.double()).reshape(-1, 2)
        # Only the part that is looked at, so that an 8K picture takes no longer than a small one.
        limits = places.new_tensor([width - 1, height - 1])
        left, top = (places.amin(dim=0) - 4.0).clamp(min=0.0).minimum(limits).long().tolist()
        right, bottom = (places.amax(dim=0) + 4.0).clamp(min=0.0).minimum(limits).long().tolist()
        part = self.picture[top : bottom + 1, left : right + 1].permute(2, 0, 1)[None].double()
        size = places.new_tensor([part.shape[3], part.shape[2]])
        grid = (places - places.new_tensor([left, top])) * (2.0 / size) - 1.0
        colours = F.grid_sample(part, grid[None, None], mode="bicubic", padding_mode="border", align_corners=False)
        return colours[0, :, 0].T.reshape(*points.shape[:-1], 3).clamp(0.0, 255.0)


def crop_mask(portrait: Portrait, index: int, paste_back: bool) -> Tensor:
    """Where a frame is redrawn, [H, W] in 0..1: the crop with soft borders, in the source picture or in itself."""
    crop = portrait.crops[index]
    return paste_mask(crop, *portrait.frames.shape[1:3]).cpu() if paste_back else soft_mask(crop.size)


@dataclass(frozen=True)
class Patch:
    """A rectangle of a canvas that is redrawn by looking its pixels up in the picture around it.

    left, top, width, height: canvas pixels. texture [1, 3, h, w]: the picture around, plus half a grey level (cutting the
    fraction off is then rounding, and mixing colours keeps it so). places [h, w, 2]: crop positions of its pixels, on the CPU.
    base [1, height, width, 2]: where the rectangle's pixels lie in the texture, as `grid_sample` wants it. to_grid [2, 2]: an
    offset in crop pixels in those terms. nodes [h', w', 2]: crop positions of every so-manieth pixel; down [height, h'] and
    across [2 w', 2 width]: from there to every pixel.
    """

    left: int
    top: int
    width: int
    height: int
    texture: Tensor
    places: Tensor
    base: Tensor
    to_grid: Tensor
    nodes: Tensor
    down: Tensor
    across: Tensor

    @classmethod
    def covering(cls, canvas: Canvas, low: Tensor, high: Tensor, step: float, margin: float, device: torch.device) -> Patch:
        """The pixels of a box of the crop, low [2] to high [2].

        Args: step: crop pixels between nodes; margin: crop pixels around the box that may be looked up as well.
        """
        rows, columns = canvas.picture.shape[:2]
        (x0, y0), (x1, y1) = low.tolist(), high.tolist()
        corners = canvas.canvas_positions(torch.tensor([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=torch.float64))
        (x0, y0), (x1, y1) = corners.amin(dim=0).tolist(), corners.amax(dim=0).tolist()
        left, right = _span(x0, x1, columns)
        top, bottom = _span(y0, y1, rows)
        width, height = right - left, bottom - top

        around = margin * canvas.density + 2.0
        texture_left, texture_right = _span(left - around, right + around, columns)
        texture_top, texture_bottom = _span(top - around, bottom + around, rows)
        image = canvas.picture[texture_top:texture_bottom, texture_left:texture_right].permute(2, 0, 1).float()
        fine = width * height <= FINE_PIXELS
        texture = (refine(image) if fine else image).clamp(0.0, 255.0) + 0.5
        places = _pixels(texture_left, texture_top, texture.shape[2], texture.shape[1], 0.5 if fine else 1.0)

        per_pixel = torch.tensor([2.0 / (image.shape[2] - 1), 2.0 / (image.shape[1] - 1)], dtype=torch.float64)
        base = _pixels(left - texture_left, top - texture_top, width, height) - 0.5
        stride = max(1, round(step * canvas.density))
        nodes_across, nodes_down = (max(2, math.ceil((size - 1) / stride) + 1) for size in (width, height))
        tensors = (
            base[None] * per_pixel - 1.0,
            torch.linalg.inv(canvas.to_crop)[:2, :2].T * per_pixel,
            canvas.crop_positions(_pixels(left, top, nodes_across, nodes_down, stride)),
            _between(nodes_down, stride, height),
            torch.kron(_between(nodes_across, stride, width).T.contiguous(), torch.eye(2)),
        )
        return cls(
            left,
            top,
            width,
            height,
            texture[None].to(device),
            canvas.crop_positions(places).float(),
            *(tensor.float().to(device) for tensor in tensors),
        )

    def pixels(self, canvas: Canvas) -> Tensor:
        """Crop positions of the rectangle's pixels: [height * width, 2] float64."""
        return canvas.crop_positions(_pixels(self.left, self.top, self.width, self.height)).reshape(-1, 2)

    def grid(self, offset: Tensor) -> Tensor:
        """Where all pixels are looked up, from offsets of the nodes in crop pixels [b, h', w', 2]: [b, height, width, 2]."""
        coarse = (offset @ self.to_grid).flatten(2)
        return (self.down @ (coarse @ self.across)).unflatten(2, (-1, 2)).add_(self.base)

    def grid_of_pixels(self, offset: Tensor) -> Tensor:
        """The same from an offset of every pixel, [b, height * width, 2]."""
        return self.grid_step(offset).add_(self.base)

    def grid_step(self, offset: Tensor) -> Tensor:
        """Offsets of every pixel in crop pixels, [b, height * width, 2], as differences between grids."""
        return (offset @ self.to_grid).unflatten(1, (self.height, self.width))

    def shared(self, other: Patch) -> tuple[tuple, tuple]:
        """What another patch of the same canvas has in common with this one: an index into each one's [b, c, height, width]."""
        left, right = max(self.left, other.left), min(self.left + self.width, other.left + other.width)
        top, bottom = max(self.top, other.top), min(self.top + self.height, other.top + other.height)
        return tuple(
            (..., slice(top - patch.top, max(top, bottom) - patch.top), slice(left - patch.left, max(left, right) - patch.left))
            for patch in (self, other)
        )

    def put(self, frames: Tensor, colours: Tensor) -> None:
        """Write colours [b, 3, height, width], 0.5..255.5, into canvases uint8 [b, H, W, 3]."""
        area = frames[:, self.top : self.top + self.height, self.left : self.left + self.width]
        pixels = colours.byte()
        for channel in range(3):  # one strided copy each is three times as fast as a transposition
            area[..., channel] = pixels[:, channel]


def look_up(texture: Tensor, grid: Tensor) -> Tensor:
    """A texture [1, c, h, w] at positions [b, height, width, 2]: [b, c, height, width]."""
    return F.grid_sample(texture.expand(len(grid), -1, -1, -1), grid, padding_mode="border", align_corners=True)


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    """The pixels from low to high that exist, at least two."""
    start = min(max(0, math.floor(low)), size - 2)
    return start, max(min(size, math.ceil(high)), start + 2)


def _pixels(left: float, top: float, columns: int, rows: int, spacing: float = 1.0) -> Tensor:
    """Centres of pixels, the first one's at (left + 0.5, top + 0.5): [rows, columns, 2] float64."""
    y = torch.arange(rows, dtype=torch.float64) * spacing + top + 0.5
    x = torch.arange(columns, dtype=torch.float64) * spacing + left + 0.5
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], dim=-1)


def _between(nodes: int, stride: int, pixels: int) -> Tensor:
    """Linear interpolation from nodes at every stride-th pixel to all pixels: [pixels, nodes]."""
    position = torch.arange(pixels) / stride
    return (1.0 - (position[:, None] - torch.arange(nodes)).abs()).clamp(min=0.0)
