"""The mesh renderer: any motion of the keypoint space on one portrait, without learnt image synthesis.

A linear basis carries expression to displacements of 468 face landmarks, splines carry those to every pixel, and mouth and
eyes open as layers (see `openings`). It draws in real time on two CPU cores and keeps hair, neck and background still. It
knows no gaze, no hair and no far side of the head: a preview and an embedded default, not the quality path.

Pasted back, the portrait is drawn at its own resolution, pixel by pixel, not through the 512 x 512 crop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..faces import FaceFinder, crop_image, paste_mask, prepare_images, soft_mask
from ..keypoints import LIPS, NUM_KEYPOINTS, Keypoints, euler_angles, hold, rotation_matrix
from . import Chunk, Portrait, openings
from .openings import Outline
from .tracking import find_faces, steady_crops
from .warp import Lattice, pull_back, refine, smoothstep, spline_weights

ASSET = Path(__file__).parents[1] / "assets" / "mesh_basis.safetensors"
NUM_LANDMARKS = 468

# Frames drawn together: at most GROUP, fewer when their moving parts have more than GROUP_PIXELS in all. It depends on the
# portrait only, and the last group is filled up, so bytes never depend on `batch`.
GROUP = 8
GROUP_PIXELS = 4_000_000
FIELD_STEP = 8.0  # crop pixels between nodes of the face's displacement field
MOUTH_STEP, EYE_STEP = 4.0, 2.0  # the same around mouth and eyes; FIELD_STEP is a multiple
FEATHER = 0.6  # crop pixels: half the width of an edge between layers
FINE_PIXELS = 500_000  # regions up to this size are sampled from a picture refined to twice its density

# fmt: off
FACE_OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)
# fmt: on
CHIN, NOSE_BRIDGE = 152, 168
LOWER_LIP_MIDDLE, JAW_SHARE = (87, 14, 317), 0.88  # lower teeth and tongue move with the lip's edge, a little less
CHEEKS = (50, 101, 205, 280, 330, 425)
EYE_CORNERS = ((33, 133), (263, 362))


@dataclass(frozen=True)
class Basis:
    """The asset: expression to landmark displacement in inter-ocular distances, its inverse and the mean face.

    basis [63, 468, 3]; inverse_xy [468, 2, 63]; neutral [468, 3], origin at the nose bridge; neutral_exp [21, 3];
    exp_std [63]; exp_cov [63, 63]; lid_pairs [14, 2], lip_pairs [9, 2] landmarks (upper, lower); stable_points [32];
    region_lips [80]; canonical [21, 3] mean canonical keypoints; lp_units_per_iod: keypoint units of one inter-ocular distance.
    """

    basis: Tensor
    inverse_xy: Tensor
    neutral: Tensor
    neutral_exp: Tensor
    exp_std: Tensor
    exp_cov: Tensor
    lid_pairs: Tensor
    lip_pairs: Tensor
    stable_points: Tensor
    region_lips: Tensor
    canonical: Tensor
    lp_units_per_iod: Tensor

    @classmethod
    def from_assets(cls, path: Path = ASSET) -> Basis:
        """Raises FileNotFoundError or ValueError when the file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: install PC-Talk again.")
        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} does not hold the mesh basis ({error}): install PC-Talk again.") from None

    @property
    def lip_gap(self) -> Tensor:
        """How the mean gap between the lips follows expression: [63]."""
        upper, lower = self.lip_pairs.unbind(dim=1)
        return (self.basis[:, lower, 1] - self.basis[:, upper, 1]).mean(dim=1)


@dataclass(frozen=True)
class HeadFit:
    """The mean face laid onto a portrait: landmarks = unit * neutral @ rotation + origin, in crop pixels."""

    unit: float
    rotation: Tensor
    origin: Tensor


def fit_similarity(source: Tensor, target: Tensor) -> HeadFit:
    """Least-squares similarity between two point sets [n, 3] (Umeyama 1991, row vectors)."""
    source, target = source.double(), target.double()
    centre, middle = source.mean(dim=0), target.mean(dim=0)
    u, singular, vh = torch.linalg.svd((source - centre).T @ (target - middle))
    flip = torch.ones(3, dtype=torch.float64)
    flip[2] = torch.linalg.det(u @ vh).sign()
    rotation = u @ torch.diag(flip) @ vh
    unit = float((singular * flip).sum() / ((source - centre) ** 2).sum())
    return HeadFit(unit, rotation, middle - unit * centre @ rotation)


def with_depth(landmarks: Tensor, basis: Basis) -> Tensor:
    """Landmarks known in x and y only, given the depth of the mean face in the same pose (scaled orthography): [468, 3]."""
    points = basis.stable_points
    source, target = basis.neutral[points].double(), landmarks[points, :2].double()
    linear = torch.linalg.lstsq(source - source.mean(dim=0), target - target.mean(dim=0)).solution  # [3, 2]
    u, singular, vh = torch.linalg.svd(linear, full_matrices=False)
    unit, columns = float(singular.mean()), u @ vh
    depth = basis.neutral.double() @ torch.linalg.cross(columns[:, 0], columns[:, 1]) * unit
    return torch.cat([landmarks[:, :2], depth[:, None].to(landmarks)], dim=1)


# How much of what sets a face apart from the mean face is read as expression; the rest is how the person looks.
EXPRESSIVE = 0.6


def read_expression(landmarks: Tensor, fit: HeadFit, basis: Basis) -> Tensor:
    """Expression of landmarks [468, 3] in crop pixels: [21, 3].

    The posterior mean of the basis, limited to three standard deviations of real expression; the lips' part is then moved
    the least that makes the gap between the lips the one measured, zero for closed lips.
    """
    aligned = (landmarks.double() - fit.origin) @ fit.rotation.T / fit.unit
    displacement = (aligned - basis.neutral)[:, :2].reshape(-1)
    change = displacement @ basis.inverse_xy.double().reshape(-1, 63)
    change = EXPRESSIVE * torch.minimum(torch.maximum(change, -3.0 * basis.exp_std), 3.0 * basis.exp_std)
    lips = torch.zeros(NUM_KEYPOINTS, 3, dtype=torch.float64)
    lips[list(LIPS)] = 1.0
    lips = lips.reshape(63)
    gap = basis.lip_gap.double() * lips
    spread = (basis.exp_cov.double() @ gap) * lips
    change = change + spread * ((lip_opening(landmarks, fit.unit) - gap @ change) / (gap @ spread))
    return (basis.neutral_exp + change.reshape(NUM_KEYPOINTS, 3)).float()


def with_lip_edges(landmarks: Tensor, unit: float, look: openings.Look) -> Tensor:
    """Landmarks [468, 3] with the inner lips where the picture has them.

    Lips that touch are brought onto the dark line between them; the lower edge of an open mouth is moved to its teeth's end.
    """
    points = landmarks.double().clone()
    upper, lower = list(openings.UPPER_LIP), list(openings.LOWER_LIP)
    if lip_opening(landmarks, unit) == 0:
        middle = (points[upper] + points[lower]) / 2
        outline = Outline(middle[:, :2], middle[:, :2])
        p, correction = openings.darkest_line(outline, look, unit)
        axes = outline.to_axes(middle[:, :2])
        axes[:, 1] += openings.along(p, correction, axes[:, 0])
        middle[:, :2] = outline.from_axes(axes)
        points[upper] = middle
        points[lower] = middle
    else:
        outline = Outline(points[upper, :2], points[lower, :2])
        inner = lower[1:-1]
        axes = outline.to_axes(points[inner, :2])
        corners = smoothstep((outline.reach - axes[:, 0].abs()) / (0.15 * outline.reach))
        teeth = openings.read_teeth(outline, look, unit)
        axes[:, 1] += corners * openings.along(teeth.p, teeth.correction, axes[:, 0])
        points[inner, :2] = outline.from_axes(axes)
    return points.to(landmarks)


def lip_opening(landmarks: Tensor, unit: float) -> float:
    """The mean gap between the lips in inter-ocular distances, 0 for lips that touch."""
    upper = landmarks[list(openings.UPPER_LIP[1:-1]), 1]
    lower = landmarks[list(openings.LOWER_LIP[1:-1]), 1]
    gap = float((lower - upper).mean()) / unit
    return gap if gap > openings.CLOSED_GAP else 0.0


def soft_limit(values: Tensor, knee: float, limit: float) -> Tensor:
    """Values whose size [..., n] (the norm of the last axis) is left alone up to `knee` and never passes `limit`."""
    size = values.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    excess = (size - knee).clamp(min=0.0)
    span = limit - knee
    return values * torch.where(size > knee, (knee + span * torch.tanh(excess / span)) / size, torch.ones_like(size))


class MeshRenderer:
    """Draws portraits by warping them; see the module."""

    name = "mesh"

    def __init__(self, face_finder: FaceFinder, basis: Basis) -> None:
        self.face_finder = face_finder
        self.basis = basis
        self.networks: dict[str, nn.Module] = {"face_finder": face_finder}

    @classmethod
    def from_assets(cls) -> MeshRenderer:
        """With the weights and tables that ship."""
        return cls(FaceFinder.from_assets(), Basis.from_assets())

    def extract(
        self, images: Tensor, *, face_index: int = 0, crop_scale: float = 2.3, landmarks: list | None = None
    ) -> tuple[Portrait, Keypoints]:
        """See `Renderer.extract`. Portrait.features: landmarks [N, 468, 3] crop pixels; expression [N, 21, 3];
        rotation [N, 3, 3]; scale [N]; translation [N, 3]."""
        frames = prepare_images(images).cpu()
        faces = find_faces(self.face_finder, frames, face_index, landmarks)
        crops = steady_crops(faces, crop_scale)
        points = torch.stack([crop.apply(face.landmarks.cpu()) for crop, face in zip(crops, faces)])
        if points[..., 2].abs().max() == 0:
            points = torch.stack([with_depth(still, self.basis) for still in points])
        for index, still in enumerate(points):
            look = Canvas(frames[index], crops[index].matrix.double(), frames.new_zeros(0)).look
            points[index] = with_lip_edges(still, self._fit(still).unit, look)
        keypoints = self._keypoints(points, crops[0].size)
        features = {
            "landmarks": points,
            "expression": keypoints.expression,
            "rotation": keypoints.rotation,
            "scale": keypoints.scale,
            "translation": keypoints.translation,
        }
        return Portrait(self.name, frames, tuple(crops), features), keypoints

    def render(
        self, portrait: Portrait, keypoints: Keypoints, *, paste_back: bool = True, stitching: bool = True, batch: int = 0
    ) -> Iterator[Chunk]:
        """See `Renderer.render`. `stitching` changes nothing here: a warped portrait has no seam to mend.

        Raises ValueError for a portrait that another renderer extracted.
        """
        if portrait.renderer != self.name:
            raise ValueError(
                f"This portrait was extracted by the {portrait.renderer!r} renderer, the {self.name!r} renderer can't draw it: "
                "connect the same renderer to Extract Keypoints and to Warp and Decode."
            )
        motion = Motion.between(portrait, keypoints.to("cpu"))
        size = batch or GROUP
        pending: list[Tensor] = []
        mask = None
        for scene, group in self._groups(portrait, motion, paste_back):
            mask = scene.mask if mask is None else mask
            pending.append(scene.draw(group))
            while sum(map(len, pending)) >= size:
                ready = torch.cat(pending) if len(pending) > 1 else pending[0]
                pending = [ready[size:]] if len(ready) > size else []
                yield Chunk(ready[:size], mask.expand(size, -1, -1))
        if pending:
            ready = torch.cat(pending)
            yield Chunk(ready, mask.expand(len(ready), -1, -1))

    def _groups(self, portrait: Portrait, motion: Motion, paste_back: bool) -> Iterator[tuple[Scene, Motion]]:
        device = next(self.face_finder.parameters()).device
        last = len(portrait.frames) - 1
        frame, frames = 0, motion.frames
        while frame < frames:
            source = min(frame, last)
            if frame <= last:
                scene = Scene.of(portrait, source, self.basis, motion.turns, paste_back, device)
            count = 1 if source < last else min(scene.group, frames - frame)
            yield scene, motion.part(frame, frame + count)
            frame += count

    def _fit(self, landmarks: Tensor) -> HeadFit:
        stable = self.basis.stable_points
        return fit_similarity(self.basis.neutral[stable], landmarks[stable])

    def _keypoints(self, landmarks: Tensor, crop_size: int) -> Keypoints:
        """Pose from the mean face laid onto the landmarks, expression from the inverse basis."""
        basis, half = self.basis, crop_size / 2
        anchor, canonical_anchor = _neutral_anchor(basis), _canonical_anchor(basis)
        rotations, scales, translations, expressions = [], [], [], []
        for points in landmarks:
            fit = self._fit(points)
            scale = fit.unit / (half * float(basis.lp_units_per_iod))
            place = (fit.unit * anchor @ fit.rotation + fit.origin) / half
            translation = place - scale * canonical_anchor @ fit.rotation - torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
            rotations.append(fit.rotation)
            scales.append(scale)
            translations.append(translation * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
            expressions.append(read_expression(points, fit, basis))
        return Keypoints(
            canonical=basis.canonical,
            rotation=torch.stack(rotations).float(),
            scale=torch.tensor(scales),
            translation=torch.stack(translations).float(),
            expression=torch.stack(expressions),
        )


def _neutral_anchor(basis: Basis) -> Tensor:
    """The middle between eyes and lips of the mean face: [3]."""
    eyes = basis.neutral[[index for corners in EYE_CORNERS for index in corners]].double().mean(dim=0)
    lips = basis.neutral[[13, 14]].double().mean(dim=0)
    return (eyes + lips) / 2


def _canonical_anchor(basis: Basis) -> Tensor:
    """The same place in the canonical keypoints, by the keypoints that lie on eyes and lips: [3]."""
    eyes = basis.canonical[[11, 13, 15, 16]].double().mean(dim=0)
    lips = basis.canonical[[17, 19, 20]].double().mean(dim=0)
    return (eyes + lips) / 2


MAX_TURN = 25.0  # degrees from the portrait's own pose that the head follows, softly limited
MAX_SHIFT = 0.30  # crop half-widths
MAX_ZOOM = 0.25


@dataclass(frozen=True)
class Motion:
    """What to draw, frame by frame, relative to a portrait's own keypoints.

    change [T, 63] expression; turn [T, 3, 3] rotation and zoom of the head about the keypoints' origin (row vectors);
    shift [T, 2] in crop half-widths; turns: whether the head moves at all anywhere in the track.
    """

    change: Tensor
    turn: Tensor
    shift: Tensor
    turns: bool

    @property
    def frames(self) -> int:
        return len(self.change)

    def part(self, start: int, stop: int) -> Motion:
        return Motion(self.change[start:stop], self.turn[start:stop], self.shift[start:stop], self.turns)

    def filled(self, frames: int) -> Motion:
        return Motion(hold(self.change, frames), hold(self.turn, frames), hold(self.shift, frames), self.turns)

    @classmethod
    def between(cls, portrait: Portrait, driven: Keypoints) -> Motion:
        """A shorter track of source frames is held at its last one."""
        own = {name: hold(track, driven.frames) for name, track in portrait.features.items() if name != "landmarks"}
        change = (driven.expression - own["expression"]).reshape(-1, 63)
        relative = own["rotation"].transpose(1, 2) @ driven.rotation
        angles = torch.stack(euler_angles(relative), dim=-1)
        zoom = soft_limit((driven.scale / own["scale"] - 1.0)[:, None], 0.7 * MAX_ZOOM, MAX_ZOOM)
        shift = soft_limit((driven.translation - own["translation"])[:, :2], 0.7 * MAX_SHIFT, MAX_SHIFT)
        turns = bool(angles.abs().max() > 1e-2 or zoom.abs().max() > 1e-4 or shift.abs().max() > 1e-4)
        if not turns:
            return cls(change, torch.eye(3).expand(len(change), 3, 3), torch.zeros(len(change), 2), False)
        angles = soft_limit(angles, 0.6 * MAX_TURN, MAX_TURN)
        turn = rotation_matrix(*angles.unbind(dim=-1)) * (1.0 + zoom[:, :, None])
        return cls(change, turn, shift, True)


@dataclass(frozen=True)
class Canvas:
    """The picture that is drawn on: uint8 [H, W, 3], and where its pixels lie in the crop (a similarity, [3, 3])."""

    picture: Tensor
    to_crop: Tensor
    mask: Tensor

    @classmethod
    def of(cls, portrait: Portrait, index: int, paste_back: bool) -> Canvas:
        frame, crop = portrait.frames[index], portrait.crops[index]
        if paste_back:
            return cls(frame, crop.matrix.double().cpu(), paste_mask(crop, *frame.shape[:2]))
        return cls(crop_image(frame, crop), torch.eye(3, dtype=torch.float64), soft_mask(crop.size))

    @property
    def density(self) -> float:
        """Canvas pixels per crop pixel."""
        return 1.0 / float(self.to_crop[0, :2].norm())

    def crop_positions(self, points: Tensor) -> Tensor:
        return points @ self.to_crop[:2, :2].T + self.to_crop[:2, 2]

    def canvas_positions(self, points: Tensor) -> Tensor:
        inverse = torch.linalg.inv(self.to_crop)
        return points @ inverse[:2, :2].T + inverse[:2, 2]

    def look(self, points: Tensor) -> Tensor:
        """The picture's colours at crop positions [..., 2], bicubic: [..., 3] float64."""
        height, width = self.picture.shape[:2]
        places = self.canvas_positions(points.double()).reshape(-1, 2)
        # Only the part of the picture that is looked at, so that an 8K picture is no slower than a small one.
        left, top = (max(0, int(v) - 4) for v in places.amin(dim=0).clamp(min=0.0).tolist())
        right, bottom = (int(v) + 4 for v in places.amax(dim=0).clamp(min=0.0).tolist())
        left, top = min(left, width - 1), min(top, height - 1)
        image = self.picture[top : max(bottom, top + 1), left : max(right, left + 1)].permute(2, 0, 1)[None].double()
        size = places.new_tensor([image.shape[3], image.shape[2]])
        grid = (places - places.new_tensor([left, top])) * (2.0 / size) - 1.0
        colours = F.grid_sample(image, grid[None, None], mode="bicubic", padding_mode="border", align_corners=False)
        return colours[0, :, 0].T.reshape(*points.shape[:-1], 3).clamp(0.0, 255.0)


@dataclass(frozen=True)
class Patch:
    """A rectangle of the canvas that is redrawn: where its pixels are looked up, and how a coarse offset becomes fine.

    left, top, width, height in canvas pixels; nodes [h', w', 2] crop positions of a lattice of every `stride`-th pixel;
    texture [1, c, ...] the picture around the rectangle; base [1, height, width, 2] where its pixels lie in the texture,
    as `grid_sample` wants it; to_grid [2, 2] crop offset -> the same.
    """

    left: int
    top: int
    width: int
    height: int
    nodes: Tensor
    texture: Tensor
    base: Tensor
    to_grid: Tensor
    upward: Tensor  # [height, h'] and [2 w', 2 width]: linear interpolation between nodes, x and y interleaved
    across: Tensor
    positions: Tensor  # crop positions of the texture's pixels [th, tw, 2], on the CPU

    @classmethod
    def covering(cls, canvas: Canvas, low: Tensor, high: Tensor, step: float, margin: float, device: torch.device) -> Patch:
        """The pixels whose positions may lie between low and high (crop pixels), with `margin` more of texture."""
        rows, columns = canvas.picture.shape[:2]
        corners = torch.stack([low, torch.stack([high[0], low[1]]), high, torch.stack([low[0], high[1]])])
        corners = canvas.canvas_positions(corners)
        left, top = (max(0, int(v)) for v in corners.amin(dim=0).floor().tolist())
        right, bottom = (min(size, int(v)) for v, size in zip(corners.amax(dim=0).ceil().tolist(), (columns, rows)))
        right, bottom = max(right, left + 2), max(bottom, top + 2)
        width, height = right - left, bottom - top
        stride = max(1, round(step * canvas.density))
        nx, ny = (max(2, -(-(size - 1) // stride) + 1) for size in (width, height))
        y, x = torch.meshgrid(torch.arange(ny).double() * stride + top + 0.5, torch.arange(nx).double() * stride + left + 0.5, indexing="ij")
        nodes = canvas.crop_positions(torch.stack([x, y], dim=-1))

        extra = int(margin * canvas.density) + 2
        tl, tt = max(0, left - extra), max(0, top - extra)
        tr, tb = min(columns, right + extra), min(rows, bottom + extra)
        image = canvas.picture[tt:tb, tl:tr].permute(2, 0, 1).float()
        fine = width * height <= FINE_PIXELS
        # Half a grey level more: cutting the fraction off is then rounding, and mixing colours keeps it so.
        texture = (refine(image) if fine else image).clamp(0.0, 255.0) + 0.5
        th, tw = texture.shape[1:]
        spacing = 0.5 if fine else 1.0
        y, x = torch.meshgrid(torch.arange(th).double() * spacing + tt + 0.5, torch.arange(tw).double() * spacing + tl + 0.5, indexing="ij")
        positions = canvas.crop_positions(torch.stack([x, y], dim=-1))
        per_pixel = torch.tensor([2.0 / (tr - tl - 1), 2.0 / (tb - tt - 1)], dtype=torch.float64)
        y, x = torch.meshgrid(torch.arange(height).double() + top - tt, torch.arange(width).double() + left - tl, indexing="ij")
        base = torch.stack([x, y], dim=-1) * per_pixel - 1.0
        to_grid = torch.linalg.inv(canvas.to_crop)[:2, :2].T * per_pixel
        upward = between_nodes(ny, stride, height)
        across = torch.kron(between_nodes(nx, stride, width).T.contiguous(), torch.eye(2))
        tensors = (nodes, texture[None], base[None], to_grid, upward, across)
        return cls(left, top, width, height, *(tensor.float().to(device) for tensor in tensors), positions.float())

    def spread(self, offset: Tensor) -> Tensor:
        """Coarse offsets [b, h', w', 2] in crop pixels as a sampling grid for every pixel: [b, height, width, 2]."""
        coarse = (offset @ self.to_grid).flatten(2)
        return (self.upward @ (coarse @ self.across)).unflatten(2, (-1, 2)).add_(self.base)

    def centres(self, canvas: Canvas) -> Tensor:
        """Crop positions of the rectangle's pixels: [height, width, 2]."""
        y, x = torch.meshgrid(
            torch.arange(self.height).double() + self.top + 0.5, torch.arange(self.width).double() + self.left + 0.5, indexing="ij"
        )
        return canvas.crop_positions(torch.stack([x, y], dim=-1))


def between_nodes(nodes: int, stride: int, pixels: int) -> Tensor:
    """Linear interpolation from nodes at every stride-th pixel to all pixels: [pixels, nodes]."""
    position = torch.arange(pixels) / stride
    return (1.0 - (position[:, None] - torch.arange(nodes)).abs()).clamp(min=0.0)


def look_up(texture: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(texture.expand(len(grid), -1, -1, -1), grid, padding_mode="border", align_corners=True)


@dataclass(frozen=True)
class Field:
    """Displacement of a box of the crop: weights [g, n] from chosen landmarks, on a lattice."""

    lattice: Lattice
    weights: Tensor
    landmarks: Tensor

    def __call__(self, displacement: Tensor) -> Tensor:
        """[b, 468, 2] to [b, 2, rows, columns]."""
        chosen = displacement[:, self.landmarks].permute(1, 0, 2).reshape(len(self.landmarks), -1)
        values = self.weights @ chosen
        return values.reshape(self.lattice.rows, self.lattice.columns, -1, 2).permute(2, 3, 0, 1)


@dataclass(frozen=True)
class Turning:
    """The head's own motion over a lattice: pivoted positions [g, 3] and how much each node takes part [g, 1]."""

    positions: Tensor
    weight: Tensor

    def __call__(self, field: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        """field [b, 2, r, c] of expression, then turned by [b, 3, 2] and moved by [b, 2]."""
        moved = field.flatten(2).transpose(1, 2)
        places = F.pad(moved, (0, 1)) + self.positions
        moved = moved + self.weight * (places @ turn + shift[:, None])
        return moved.transpose(1, 2).reshape(field.shape)


@dataclass(frozen=True)
class Opening:
    """Mouth or eye, ready to draw."""

    patch: Patch
    upper: Field
    lower: Field
    blend: Tensor  # [1, 1, r, c]: how much of the layers' own fields, how much of the face's
    coarse: Tensor  # [1, r, c, 2] where the nodes lie in the face's lattice
    turning: Turning | None
    upper_texture: Tensor  # colour, alpha, shadow
    lower_texture: Tensor  # colour, alpha
    pixels: Tensor  # [h * w, 2] crop positions of the patch, relative to `centre`
    centre: Tensor  # [3] relative to the pivot
    pairs: Tensor  # [n, 2] landmarks whose gap stretches the eye
    gap: Tensor
    head_texture: Tensor | None
    jaw_texture: Tensor | None
    cavity: Tensor | None


class Scene:
    """One source frame, prepared for drawing."""

    def __init__(self, canvas: Canvas, landmarks: Tensor, expression: Tensor, basis: Basis, turns: bool, crop_size: int, device) -> None:
        self.canvas, self.device, self.turns, self.crop_size = canvas, device, turns, crop_size
        self.mask = canvas.mask
        points = landmarks.double()
        fit = fit_similarity(basis.neutral[basis.stable_points], points[basis.stable_points])
        self.unit = fit.unit
        half = crop_size / 2
        pivot = fit.unit * (_neutral_anchor(basis) - _canonical_anchor(basis) / float(basis.lp_units_per_iod)) @ fit.rotation
        self.pivot = pivot + fit.origin
        self.half = half
        self.points = points
        self._prepare_motion(basis, expression)

        oval = points[list(FACE_OVAL), :2]
        low, high = self._bounds(oval)
        self.patch = Patch.covering(canvas, low, high, FIELD_STEP, 0.3 * self.unit, device)
        self.lattice = Lattice.covering(low - FIELD_STEP, high + FIELD_STEP, FIELD_STEP)
        nodes = self.lattice.nodes().reshape(-1, 2)
        inner = {i for ring in (openings.UPPER_LIP, openings.LOWER_LIP) for i in ring[1:-1]}
        inner |= {
            i
            for ring in (openings.LEFT_UPPER_LID, openings.LEFT_LOWER_LID, openings.RIGHT_UPPER_LID, openings.RIGHT_LOWER_LID)
            for i in ring[1:-1]
        }
        self.inner = inner
        controls = self._thinned([i for i in range(NUM_LANDMARKS) if i not in inner], 0.03 * self.unit)
        self.window = self._window(nodes, oval)
        weights = self._weights(controls, nodes) * self.window[:, None]
        self.field = Field(self.lattice, weights.float().to(device), torch.tensor(controls, device=device))
        self.turning = self._turning(nodes, oval)
        self.openings = self._openings(basis, oval)
        self.background = canvas.picture.to(device)
        self.group = max(1, min(GROUP, GROUP_PIXELS // (self.patch.width * self.patch.height)))

    @classmethod
    def of(cls, portrait: Portrait, index: int, basis: Basis, turns: bool, paste_back: bool, device: torch.device) -> Scene:
        features = portrait.features
        canvas = Canvas.of(portrait, index, paste_back)
        return cls(
            canvas, features["landmarks"][index].cpu(), features["expression"][index].cpu(), basis, turns, portrait.crops[index].size, device
        )

    # Geometry

    def _bounds(self, oval: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the crop that may move, low [2] and high [2]."""
        if self.turns:
            return torch.zeros(2, dtype=torch.float64), torch.full((2,), float(self.crop_size), dtype=torch.float64)
        margin = torch.tensor([SIDE_FALLOFF, SIDE_FALLOFF], dtype=torch.float64) * self.unit
        low, high = oval.amin(dim=0) - margin, oval.amax(dim=0) + margin
        high[1] += (CHIN_FALLOFF - SIDE_FALLOFF) * self.unit
        return low.clamp(min=0.0), high.clamp(max=float(self.crop_size))

    def _window(self, points: Tensor, oval: Tensor) -> Tensor:
        """1 on the face, falling to 0 a little outside it, where expression ends: [n]."""
        distance, below = self._outside(points, oval)
        reach = (SIDE_FALLOFF + (CHIN_FALLOFF - SIDE_FALLOFF) * below) * self.unit
        return smoothstep(1.0 - distance / reach) * self._inside_crop(points)

    def _head(self, points: Tensor, oval: Tensor) -> Tensor:
        """1 on the head with its hair, falling to 0 towards the crop's border and down the neck: [n]."""
        distance, below = self._outside(points, oval)
        whole = (0.5 - 0.45 * below) * self.unit
        reach = (0.95 - 0.05 * below) * self.unit
        return smoothstep(1.0 - (distance - whole) / reach) * self._inside_crop(points)

    def _inside_crop(self, points: Tensor) -> Tensor:
        border = torch.minimum(points, self.crop_size - points).amin(dim=1)
        return smoothstep(border / (0.35 * self.unit))

    def _outside(self, points: Tensor, oval: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the face's outline, 0 inside [n]; and how much a point lies below rather than beside it, 0..1 [n]."""
        x, y = (column[:, None] for column in points.unbind(dim=1))  # [n, 1] against the outline's 36 segments
        x0, y0 = oval.unbind(dim=1)
        x1, y1 = oval.roll(-1, dims=0).unbind(dim=1)
        dx, dy = x1 - x0, y1 - y0
        t = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)).clamp_(0.0, 1.0)
        away = ((x0 + t * dx - x).square_() + (y0 + t * dy - y).square_()).amin(dim=1).sqrt()
        crosses = (y0 > y) != (y1 > y)
        right = x < x0 + (y - y0) * (dx / torch.where(dy == 0, 1e-9, dy))
        inside = ((crosses & right).sum(dim=1) % 2) == 1
        distance = torch.where(inside, 0.0, away)
        centre = oval.mean(dim=0)
        direction = (points - centre) / (points - centre).norm(dim=1, keepdim=True).clamp(min=1e-6)
        return distance, smoothstep((direction[:, 1] - 0.35) / 0.5)

    def _weights(self, controls: Sequence[int], nodes: Tensor) -> Tensor:
        """Spline weights with a ring of fixed points around the face: [g, len(controls)]."""
        oval = self.points[list(FACE_OVAL), :2]
        ring = oval.mean(dim=0) + 1.6 * (oval - oval.mean(dim=0))
        positions = torch.cat([self.points[list(controls), :2], ring])
        return spline_weights(positions, nodes)[:, : len(controls)]

    def _thinned(self, landmarks: Sequence[int], distance: float) -> list[int]:
        """Without those that lie closer than `distance` to an earlier one.

        On a stretched lip rows of the mesh fall together; a spline through all of them would crease the skin.
        """
        points = self.points[list(landmarks), :2]
        close = (torch.cdist(points, points) < distance).tolist()
        kept: list[int] = []
        for row, near in enumerate(close):
            if not any(near[other] for other in kept):
                kept.append(row)
        return [landmarks[row] for row in kept]

    def _turning(self, nodes: Tensor, oval: Tensor) -> Turning | None:
        if not self.turns:
            return None
        distance, _ = self._outside(nodes, oval)
        depth = spline_weights(self.points[:, :2], nodes, smoothing=0.1) @ self.points[:, 2]
        # The mesh falls off steeply at its rim; a warp can't turn that out of sight, so the rim is taken as flat.
        front, rim = self.points[:, 2].min(), self.pivot[2] - 0.4 * self.unit
        depth = torch.minimum(depth.clamp(min=front), rim + 0.25 * (depth - rim).clamp(max=0.4 * self.unit))
        fade = smoothstep(distance / (0.8 * self.unit))
        depth = torch.lerp(depth, self.pivot[2].expand_as(depth), fade)
        positions = torch.cat([nodes, depth[:, None]], dim=1) - self.pivot
        weight = self._head(nodes, oval)[:, None]
        return Turning(positions.float().to(self.device), weight.float().to(self.device))

    # Motion of landmarks

    def _prepare_motion(self, basis: Basis, expression: Tensor) -> None:
        self.basis_xy = (basis.basis[..., :2] * self.unit).reshape(63, -1).to(self.device)
        self.pairs = {"lids": basis.lid_pairs.to(self.device), "lips": basis.lip_pairs.to(self.device)}
        self.gaps = {
            name: (self.points[pairs[:, 1].cpu(), 1] - self.points[pairs[:, 0].cpu(), 1]).float().to(self.device)
            for name, pairs in self.pairs.items()
        }
        self.lip_gap = basis.lip_gap.to(self.device)
        self.opening = lip_opening(self.points, self.unit)
        self.upper_lip = basis.lip_pairs[:, 0].to(self.device)
        self.followers = {
            "lips": self._followers(basis.lip_pairs, 0.16).to(self.device),
            "lids": self._followers(basis.lid_pairs, 0.05).to(self.device),
        }
        self.lip_followers = self.followers["lips"][:, : len(basis.lip_pairs)]

    def _followers(self, pairs: Tensor, reach: float) -> Tensor:
        """How landmarks follow when the clamps move a pair's upper or lower one: [468, 2 n] (uppers, then lowers)."""
        points = self.points[:, :2]
        weights = []
        for side, sign in ((0, -1.0), (1, 1.0)):
            edge = points[pairs[:, side]]
            other = points[pairs[:, 1 - side]]
            across = (points[:, None, 0] - edge[None, :, 0]) / (0.06 * self.unit)
            outward = sign * (points[:, None, 1] - edge[None, :, 1]) / (reach * self.unit)
            inward = sign * (points[:, None, 1] - other[None, :, 1]) < 0
            near = torch.exp(-(across**2)) + 1e-12
            share = near / near.sum(dim=1, keepdim=True) * near.amax(dim=1, keepdim=True).clamp(max=1.0)
            weight = share * torch.exp(-(outward.clamp(min=0.0) ** 2))
            weight[(outward < -0.35) | inward] = 0.0
            weight[pairs[:, 1 - side]] = 0.0
            weight[pairs[:, side]] = torch.eye(len(pairs), dtype=weight.dtype)
            weights.append(weight)
        return torch.cat(weights, dim=1).float()

    def displacement(self, change: Tensor) -> Tensor:
        """Expression changes [b, 63] to displacements of the landmarks [b, 468, 2] in crop pixels."""
        moved = (change @ self.basis_xy).reshape(-1, NUM_LANDMARKS, 2)
        moved = soft_limit(moved, 0.45 * self.unit, 0.65 * self.unit)
        sideways = soft_limit(moved[..., :1], 0.13 * self.unit, 0.26 * self.unit)
        moved = torch.cat([sideways, moved[..., 1:]], dim=-1)
        if self.opening > 0:
            # A lip that already bares the teeth has little room left to rise.
            up = moved[:, self.upper_lip, 1].clamp(max=0.0)
            over = up - soft_limit(up[..., None], 0.01 * self.unit, 0.04 * self.unit)[..., 0]
            moved[..., 1] -= over @ self.lip_followers.T
        kept = torch.ones(len(moved), 1, device=moved.device)
        moved = self._close(moved, "lids", 0.75, kept, PRESSED * self.unit)
        if self.opening == 0:
            return self._close(moved, "lips", 0.5, kept, 0.0)
        kept = ((self.opening + change @ self.lip_gap) / self.opening).clamp(0.0, 1.0)[:, None]
        return self._close(moved, "lips", 0.5, kept, PRESSED * self.unit)

    def _close(self, moved: Tensor, name: str, upper_share: float, kept: Tensor, press: float) -> Tensor:
        """Keep edges from crossing, and let a gap end at zero where the expression's does.

        kept [b, 1]: what is left of the portrait's own gap; press: crop pixels that closed edges overlap.
        """
        upper, lower = self.pairs[name].unbind(dim=1)
        gap = self.gaps[name]
        now = gap + moved[:, lower, 1] - moved[:, upper, 1]
        least = gap.clamp(max=-press)  # edges that already cross more may stay so
        wanted = kept * torch.maximum(now, least) + (1.0 - kept) * (kept * gap - press)
        missing = wanted - now
        pull = torch.cat([-upper_share * missing, (1.0 - upper_share) * missing], dim=1)
        moved = moved.clone()
        moved[..., 1] += pull @ self.followers[name].T
        return moved

    # Openings

    def _openings(self, basis: Basis, oval: Tensor) -> list[Opening]:
        eyes = [
            self._opening(upper, lower, EYE_STEP, self._eye_fields(upper, lower), oval, None)
            for upper, lower in (
                (openings.LEFT_UPPER_LID, openings.LEFT_LOWER_LID),
                (openings.RIGHT_UPPER_LID, openings.RIGHT_LOWER_LID),
            )
        ]
        outline = Outline(self.points[list(openings.UPPER_LIP), :2], self.points[list(openings.LOWER_LIP), :2])
        balls = torch.cat([self.points[list(ring[1:-1]), :2] for ring in (openings.LEFT_LOWER_LID, openings.RIGHT_LOWER_LID)])
        tops = torch.cat([self.points[list(ring[1:-1]), :2] for ring in (openings.LEFT_UPPER_LID, openings.RIGHT_UPPER_LID)])
        whites = torch.cat([torch.lerp(balls, tops, w) for w in (0.3, 0.5, 0.7)])
        lips = basis.region_lips.tolist()
        middle = outline.to_axes(self.points[:, :2])
        edges = outline.edges(middle[:, 0])
        split = (edges[0] + edges[1]) / 2
        upper_half = {i for i in lips if middle[i, 1] < split[i]}
        lower_half = set(lips) - upper_half
        corners = {openings.UPPER_LIP[0], openings.UPPER_LIP[-1]}
        upper_half = (upper_half | set(openings.UPPER_LIP)) - set(openings.LOWER_LIP[1:-1])
        lower_half = (lower_half | set(openings.LOWER_LIP)) - set(openings.UPPER_LIP[1:-1])
        fields = (lower_half - corners, upper_half - corners)
        return [*eyes, self._opening(openings.UPPER_LIP, openings.LOWER_LIP, MOUTH_STEP, fields, oval, whites)]

    def _eye_fields(self, upper: tuple[int, ...], lower: tuple[int, ...]) -> tuple[set[int], set[int]]:
        """Landmarks that the upper layer does without, and those that the lower one does without."""
        outline = Outline(self.points[list(upper), :2], self.points[list(lower), :2])
        axes = outline.to_axes(self.points[:, :2])
        edges = outline.edges(axes[:, 0])
        near = (axes[:, 0].abs() < outline.reach) & (axes[:, 1].abs() < 0.35 * self.unit)
        under = near & (axes[:, 1] > (edges[0] + edges[1]) / 2) & (axes[:, 1] - edges[1] < 0.10 * self.unit)
        above = near & (axes[:, 1] < (edges[0] + edges[1]) / 2) & (edges[0] - axes[:, 1] < 0.06 * self.unit)
        below = set(torch.nonzero(under).flatten().tolist()) | set(lower[1:-1])
        over = set(torch.nonzero(above).flatten().tolist()) | set(upper[1:-1])
        # The row of the mesh next to each edge lies in the lashes, which move with the edge.
        next_above = near & (axes[:, 1] < edges[0]) & (edges[0] - axes[:, 1] < 2.0 * LASHES * self.unit)
        next_below = near & (axes[:, 1] > edges[1]) & (axes[:, 1] - edges[1] < 1.5 * LASHES * self.unit)
        below |= set(torch.nonzero(next_above).flatten().tolist()) - set(upper)
        over |= set(torch.nonzero(next_below).flatten().tolist()) - set(lower)
        return below - set(upper), over - set(lower)

    def _opening(self, upper, lower, step: float, without, oval: Tensor, whites: Tensor | None) -> Opening:
        outline = Outline(self.points[list(upper), :2], self.points[list(lower), :2])
        unit, mouth = self.unit, whites is not None
        # Where the layers' own fields hold, and where they have turned into the face's.
        inner = torch.tensor([outline.reach + 0.05 * unit, (0.28 if mouth else 0.16) * unit], dtype=torch.float64)
        outer = inner + torch.tensor([0.22, 0.2] if mouth else [0.14, 0.12], dtype=torch.float64) * unit
        margin = (0.4 if self.turns else 0.04) * unit
        centre = outline.from_axes(torch.tensor([[0.0, 0.0]], dtype=torch.float64))[0]
        middle = self.points[list(lower), :2].mean(dim=0) * 0.5 + self.points[list(upper), :2].mean(dim=0) * 0.5
        centre = (centre + middle) / 2
        low, high = centre - outer - margin, centre + outer + margin
        if mouth:
            high = high + torch.tensor([0.0, 0.35], dtype=torch.float64) * unit
        low, high = low.clamp(min=0.0), high.clamp(max=float(self.crop_size))
        lattice = Lattice.covering(low / FIELD_STEP * FIELD_STEP, high, step)
        nodes = lattice.nodes().reshape(-1, 2)
        axes = (nodes - centre) @ outline.axes.T
        excess = ((axes.abs() - inner) / (outer - inner)).clamp(min=0.0).norm(dim=1)
        blend = smoothstep(1.0 - excess)
        near = (((self.points[:, :2] - centre).abs() - outer) < 0.15 * unit).all(dim=1)
        window = self._window(nodes, oval)
        fields = []
        for left_out in without:
            edges = [*upper, *lower]
            others = torch.nonzero(near).flatten().tolist()
            controls = [i for i in dict.fromkeys(edges + others) if i not in left_out]
            controls = self._thinned(controls, (0.035 if mouth else 0.02) * unit)
            positions = self.points[controls, :2]
            if not mouth:
                # Lashes and the lid's rim keep their shape: what lies just outside the edge moves as the edge does.
                rim = [i for i in (upper if left_out is without[0] else lower)[1:-1] if i in controls]
                outward = -LASHES if left_out is without[0] else LASHES
                controls = controls + rim
                positions = torch.cat([positions, self.points[rim, :2] + outward * unit * outline.axes[1]])
            weights = spline_weights(positions, nodes) * (window * blend)[:, None]
            fields.append(Field(lattice, weights.float().to(self.device), torch.tensor(controls, device=self.device)))
        patch = Patch.covering(self.canvas, low, high, step, 0.2 * unit, self.device)
        feather = max(FEATHER, 0.6 / self.canvas.density)
        overlap = 1.5 * feather if mouth and self.opening == 0 else 0.0
        above, below, shadow = openings.layer_masks(outline, patch.positions, unit, feather, overlap)
        colour = patch.texture[0]
        masks = torch.stack([above, below, shadow]).float().to(self.device)
        upper_texture = torch.cat([colour, masks[:1], masks[2:]])[None] if mouth else torch.cat([colour, masks[:1]])[None]
        lower_texture = torch.cat([colour, masks[1:2]])[None]
        depth = self.points[[ring[len(ring) // 2] for ring in (upper, lower)], 2].mean()
        centre3 = torch.cat([middle, depth[None]]) - self.pivot
        pairs = torch.tensor([[u, d] for u, d in zip(upper[1:-1], lower[1:-1])], device=self.device)
        gap = (self.points[list(lower[1:-1]), 1] - self.points[list(upper[1:-1]), 1]).mean().float()
        pixels = patch.centres(self.canvas).reshape(-1, 2) - middle
        head_texture = jaw_texture = cavity = None
        if whites is not None:
            look = self.canvas.look
            white, lips = openings.white_of(look(whites), look(self.points[list(CHEEKS), :2])), openings.lip_colour(look, outline, unit)
            own = None
            if self.opening > 0:
                own = colour.permute(1, 2, 0).cpu(), openings.read_teeth(outline, look, unit).upper_share
            interior = openings.paint_mouth(outline, patch.positions, unit, feather, white, lips, own)
            head_texture, jaw_texture, cavity = (part.float().to(self.device) for part in interior)
        return Opening(
            patch=patch,
            upper=fields[0],
            lower=fields[1],
            blend=(1.0 - blend).reshape(1, 1, lattice.rows, lattice.columns).float().to(self.device),
            coarse=self.lattice.normalise(lattice.nodes())[None].float().to(self.device),
            turning=self._turning(nodes, oval),
            upper_texture=upper_texture,
            lower_texture=lower_texture,
            pixels=pixels.float().to(self.device),
            centre=centre3.float().to(self.device),
            pairs=pairs,
            gap=gap.to(self.device),
            head_texture=head_texture,
            jaw_texture=jaw_texture,
            cavity=cavity,
        )

    # Drawing

    @torch.no_grad()
    def draw(self, motion: Motion) -> Tensor:
        """Every frame of a group: uint8 [b, H, W, 3] on the CPU."""
        count = motion.frames
        motion = motion.filled(self.group) if count < self.group else motion
        change, turn, shift = (t.to(self.device) for t in (motion.change, motion.turn, motion.shift))
        displacement = self.displacement(change)
        turn = (turn - torch.eye(3, device=self.device))[..., :2]
        shift = shift * self.half
        expression = self.field(displacement)
        field = self.turning(expression, turn, shift) if self.turns else expression
        offset = pull_back(field, self.lattice, self.patch.nodes)
        frames = self.background.expand(len(change), -1, -1, -1).clone()
        self._put(frames, self.patch, look_up(self.patch.texture, self.patch.spread(offset)))
        for opening in self.openings:
            self._put(frames, opening.patch, self._draw_opening(opening, displacement, expression, turn, shift))
        return frames[:count].cpu()

    @staticmethod
    def _put(frames: Tensor, patch: Patch, colours: Tensor) -> None:
        """colours [b, 3, h, w] float, 0.5..255.5, into the frames."""
        area = frames[:, patch.top : patch.top + patch.height, patch.left : patch.left + patch.width]
        pixels = colours.byte()
        for channel in range(3):  # one strided copy each is three times as fast as a transposition
            area[..., channel] = pixels[:, channel]

    def _draw_opening(self, opening: Opening, displacement: Tensor, expression: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        patch = opening.patch
        face = F.grid_sample(
            expression, opening.coarse.expand(len(expression), -1, -1, -1), padding_mode="border", align_corners=True
        )
        face = face * opening.blend
        layers = []
        for field, texture in ((opening.upper, opening.upper_texture), (opening.lower, opening.lower_texture)):
            forward = field(displacement) + face
            if self.turns:
                forward = opening.turning(forward, turn, shift)
            offset = pull_back(forward, field.lattice, patch.nodes)
            layers.append(look_up(texture, patch.spread(offset)))
        upper, lower = layers
        if opening.cavity is None:
            inside = self._eyeball(opening, displacement, turn, shift)
        else:
            inside = self._mouth(opening, displacement, turn, shift, 1.0 - openings.SHADOW * upper[:, 4:5])
        behind = torch.lerp(inside, lower[:, :3], lower[:, 3:4])
        return torch.lerp(behind, upper[:, :3], upper[:, 3:4])

    def _carried(self, opening: Opening, turn: Tensor, shift: Tensor, extra: Tensor | None = None, stretch: Tensor | None = None) -> Tensor:
        """A sampling grid of what the head carries behind an opening: [b, h, w, 2].

        extra [b, 2]: its own displacement; stretch [b]: its own vertical stretch.
        """
        linear = turn[:, :2] + torch.eye(2, device=turn.device)
        moved = opening.centre @ turn + shift
        if extra is not None:
            moved = moved + extra
        if stretch is not None:
            linear = torch.stack([linear[..., 0], linear[..., 1] * stretch[:, None]], dim=-1)
        back = torch.linalg.inv(linear)
        offset = opening.pixels @ (back - torch.eye(2, device=turn.device)) - moved[:, None] @ back
        patch = opening.patch
        return (offset @ patch.to_grid).reshape(-1, patch.height, patch.width, 2) + patch.base

    def _eyeball(self, opening: Opening, displacement: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        upper, lower = opening.pairs.unbind(dim=1)
        gap = (displacement[:, lower, 1] - displacement[:, upper, 1]).mean(dim=1)
        stretch = 1.0 + soft_limit((gap / opening.gap.clamp(min=1.0)).clamp(min=0.0)[:, None], 0.2, 0.4)[:, 0]
        return look_up(opening.patch.texture, self._carried(opening, turn, shift, stretch=stretch))

    def _mouth(self, opening: Opening, displacement: Tensor, turn: Tensor, shift: Tensor, light: Tensor) -> Tensor:
        """light [b, 1, h, w]: what the upper lip's shadow leaves."""
        jaw = look_up(opening.jaw_texture, self._carried(opening, turn, shift, JAW_SHARE * displacement[:, LOWER_LIP_MIDDLE].mean(dim=1)))
        head = look_up(opening.head_texture, self._carried(opening, turn, shift))
        behind = torch.lerp(opening.cavity[None, :, None, None], jaw[:, :3], jaw[:, 3:]) * light
        return torch.lerp(behind, head[:, :3] * (light / head[:, 4:]).clamp(max=1.0), head[:, 3:4])


PRESSED = 0.025  # inter-ocular distances that closed edges overlap, so that nothing shines through
LASHES = 0.05  # inter-ocular distances beside a lid's edge that move with it
SIDE_FALLOFF, CHIN_FALLOFF = 0.40, 0.60  # inter-ocular distances outside the face at which expression has died away
