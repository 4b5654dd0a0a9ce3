"""Faces in pictures: find them, place 468 landmarks, crop upright, paste a redrawn crop back.

Positions are pixels of the picture with (0, 0) at the outer corner of the first pixel, so its centre is (0.5, 0.5).
Landmarks follow MediaPipe's face mesh; the networks run on the weights in assets/faces.safetensors.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .networks.face_detector import INPUT_SIZE as DETECTOR_SIZE
from .networks.face_detector import FaceDetector
from .networks.face_mesh import INPUT_SIZE as MESH_SIZE
from .networks.face_mesh import NUM_LANDMARKS, FaceMesh

log = logging.getLogger(__name__)

ASSET = Path(__file__).parent / "assets" / "faces.safetensors"
CROP_SIZE = 512
MIN_SIDE = 64  # pixels; below it a face has too few pixels for the networks

# Landmark indices. Left and right are the image's.
LEFT_EYE = (33, 160, 158, 133, 153, 144)  # corners and lids, as in the 106- and 203-point layouts
RIGHT_EYE = (362, 385, 387, 263, 373, 380)
LEFT_EYE_OUTER, RIGHT_EYE_OUTER = 33, 263
MOUTH_CORNERS = (61, 291)
# fmt: off
JAW = (127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323, 454, 356)
BROWS = (46, 53, 52, 65, 55, 70, 63, 105, 66, 107, 276, 283, 282, 295, 285, 300, 293, 334, 296, 336)
# fmt: on

CANDIDATE_SCORE = 0.4  # of the detector; low, because the mesh is the better judge
FACE_SCORE = 0.9  # of the mesh, for a face to be found: in focus, faces score 0.99 to 1; what isn't a face mostly below 0.3
FOLLOW_SCORE = 0.5  # of the mesh, for a face to be followed through blur
SAME_FACE = 0.3  # overlap (intersection over union) above which two boxes are one face
PORTRAIT = 0.4  # a face at least this part of the shorter side is what the picture is about
TILE_OVERLAP = 0.25  # of the shorter side: smaller faces are whole in one of the tiles
ROI_SCALE = 1.5  # the mesh sees the face's box times this
FIND_PASSES = 3  # of the mesh: from the detector's box, then twice from its own landmarks, which makes them converge
SEEN_WELL = "mostly inside it, uncovered and turned towards the camera"
MASK_RAMP = 16 / 512  # of the crop's side
PASTE_PIXELS = 1 << 19  # drawn at once by `PasteBack`: small enough to stay in a CPU's cache


@dataclass(frozen=True)
class Face:
    """One face: box [4] as left, top, right, bottom; score 0..1; landmarks [468, 3]; all in pixels of the picture.

    z points away from the camera, in the same unit as x and y, zero near the head's centre.
    """

    box: Tensor
    score: float
    landmarks: Tensor

    @classmethod
    def from_landmarks(cls, landmarks: Tensor, score: float = 1.0) -> Face:
        """A face from landmarks found elsewhere, [468 or 478, 2 or 3] pixels; z is 0 where it is not given.

        Raises ValueError for another shape or values that are not finite.
        """
        landmarks = torch.as_tensor(landmarks, dtype=torch.float32)
        if landmarks.dim() != 2 or landmarks.shape[0] not in (NUM_LANDMARKS, 478) or landmarks.shape[1] not in (2, 3):
            raise ValueError(f"Face landmarks are {list(landmarks.shape)}, expected [468 or 478, 2 or 3] in pixels.")
        if not torch.isfinite(landmarks).all():
            raise ValueError("Face landmarks hold NaN or infinite values: leave the frames without a face out.")
        landmarks = F.pad(landmarks[:NUM_LANDMARKS], (0, 3 - landmarks.shape[1]))
        low, high = landmarks[:, :2].amin(dim=0), landmarks[:, :2].amax(dim=0)
        return cls(torch.cat([low, high]), score, landmarks)

    @property
    def side(self) -> float:
        """The side of a square as large as the box, in pixels."""
        return float((self.box[2:] - self.box[:2]).prod()) ** 0.5


@dataclass(frozen=True)
class Crop:
    """A square cut out of a picture, possibly rotated: matrix [3, 3] maps picture pixels to crop pixels (a similarity)."""

    matrix: Tensor
    size: int = CROP_SIZE

    @classmethod
    def around(cls, centre: tuple[float, float], side: float, angle: float = 0.0, size: int = CROP_SIZE) -> Crop:
        """The crop of a square with this centre and side in the picture, its x axis turned by `angle` (radians, clockwise)."""
        scale = size / side
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        x, y = centre
        half = size / 2
        rows = [[cos, sin, half - cos * x - sin * y], [-sin, cos, half + sin * x - cos * y], [0.0, 0.0, 1.0]]
        return cls(torch.tensor(rows, dtype=torch.float64).float(), size)

    @property
    def scale(self) -> float:
        """Crop pixels per picture pixel."""
        return math.hypot(float(self.matrix[0, 0]), float(self.matrix[0, 1]))

    @property
    def inverse(self) -> Tensor:
        """Crop pixels to picture pixels: [3, 3]."""
        return torch.linalg.inv(self.matrix.double()).to(self.matrix.dtype)

    def apply(self, points: Tensor) -> Tensor:
        """Picture pixels [..., 2 or 3] to crop pixels; z is scaled along."""
        return _transform(points, self.matrix, self.scale)

    def undo(self, points: Tensor) -> Tensor:
        """Crop pixels [..., 2 or 3] to picture pixels; z is scaled along."""
        return _transform(points, self.inverse, 1.0 / self.scale)

    def corners(self) -> Tensor:
        """The four corners in the picture: [4, 2]."""
        return self.undo(self.matrix.new_tensor([[0, 0], [self.size, 0], [self.size, self.size], [0, self.size]]))


def _transform(points: Tensor, matrix: Tensor, scale: float) -> Tensor:
    matrix = matrix.to(points)
    moved = points[..., :2] @ matrix[:2, :2].T + matrix[:2, 2]
    return torch.cat([moved, points[..., 2:] * scale], dim=-1)


class FaceFinder(nn.Module):
    """The detector and the face mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = FaceDetector()
        self.mesh = FaceMesh()

    @classmethod
    def from_assets(cls, path: Path = ASSET) -> FaceFinder:
        """The networks with the weights that ship. Raises FileNotFoundError or ValueError without them."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: install PC-Talk again.")
        finder = cls()
        try:
            finder.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{path} is damaged or holds something else than the face networks: install PC-Talk again."
            ) from error
        # Depthwise convolutions on a CPU take about a third less time with channels last.
        return finder.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def find(self, image: Tensor) -> list[Face]:
        """Every face of a picture, largest first, [] when there is none.

        Args: image uint8 [H, W, 3], any size: faces from about 5 % of its height up to larger than the picture.
        """
        # A face larger than the picture is found when there is a margin around it.
        faces = self._search(image, _whole(image)) or self._search(image, _with_margin(image))
        # A picture without a prominent face may hold several small ones, which are found in its parts.
        if not faces or faces[0].side < PORTRAIT * min(image.shape[:2]):
            faces = _distinct(faces + self._search(image, _tiles(image)))
        return sorted(faces, key=lambda face: face.side, reverse=True)

    @torch.no_grad()
    def follow(self, image: Tensor, face: Face) -> Face | None:
        """The same face in the next frame of a video, from where it was: quick and steady; None when it is gone."""
        faces = self._fit(image, [_mesh_crop(face.landmarks)], passes=1, least=FOLLOW_SCORE)
        return faces[0] if faces else None

    def track(self, images: Tensor, face_index: int = 0, *, progress: Callable[[int, int], None] | None = None) -> list[Face]:
        """One face through a video, one result a frame; frames in which it is missing are bridged from their neighbours.

        Args: images uint8 [N, H, W, 3]; face_index: 0 is the largest, in the first frame that shows a face;
        progress: called with frames done and frames in all.
        Raises ValueError when no frame shows a face, or the first that does has too few (see `select_face`).
        """
        found: list[Face | None] = []
        latest: Face | None = None
        missed = 0
        for number, image in enumerate(images):
            face = self.follow(image, latest) if latest is not None and missed == 0 else None
            if face is None:
                seen = self.find(image)
                if latest is not None:
                    face = _again(seen, latest, missed)
                elif seen:
                    face = select_face(seen, face_index, image.shape[:2], number)
            missed = 0 if face is not None else missed + 1
            latest = face if face is not None else latest
            found.append(face)
            if progress is not None:
                progress(number + 1, len(images))
        if latest is None:
            least = _least_height(images.shape[1])
            raise ValueError(
                f"No face found in any of {len(images)} frames: a face must be at least {least} pixels high here "
                f"(5 % of the picture), {SEEN_WELL}; crop the video closer or choose another one."
            )
        return bridge(found)

    def _search(self, image: Tensor, windows: Sequence[Crop]) -> list[Face]:
        """Faces in some windows of the picture, largest first."""
        faces = self._fit(image, self._detect(image, windows), FIND_PASSES, FACE_SCORE)
        return sorted(_distinct(faces), key=lambda face: face.side, reverse=True)

    def _detect(self, image: Tensor, windows: Sequence[Crop]) -> list[Crop]:
        """Mesh crops of the candidates in some windows of the picture."""
        device = self.detector.anchors.device
        boxes, keypoints, confidences = [], [], []
        for window in windows:
            view = sample(image, window, border="zeros")[None].to(device)
            scores, points = self.detector(view.to(memory_format=torch.channels_last) / 127.5 - 1.0)
            score, point = scores[0].cpu(), points[0].cpu() * DETECTOR_SIZE
            candidate = score > CANDIDATE_SCORE
            point = point[candidate]
            half = point[:, 1] / 2
            boxes.append(torch.cat([window.undo(point[:, 0] - half), window.undo(point[:, 0] + half)], dim=1))
            keypoints.append(window.undo(point[:, 2:4]))
            confidences.append(score[candidate])
        merged = suppress(torch.cat(boxes), torch.cat(confidences), torch.cat(keypoints).flatten(1))
        crops = []
        for left, top, right, bottom, *eyes in merged.tolist():
            angle = math.atan2(eyes[3] - eyes[1], eyes[2] - eyes[0])
            side = max(right - left, bottom - top) * ROI_SCALE
            if side > 1.0:
                crops.append(Crop.around(((left + right) / 2, (top + bottom) / 2), side, angle, MESH_SIZE))
        return crops

    def _fit(self, image: Tensor, crops: list[Crop], passes: int, least: float) -> list[Face]:
        """Landmarks of the faces in some crops, each crop moved to its landmarks between passes; only sure ones stay."""
        device = self.detector.anchors.device
        faces: list[Face] = []
        for _ in range(passes):
            if not crops:
                return []
            views = torch.stack([sample(image, crop) for crop in crops]).to(device)
            landmarks, scores = self.mesh(views.to(memory_format=torch.channels_last) / 255.0)
            placed = zip(crops, landmarks.cpu(), scores.tolist(), strict=True)
            faces = [Face.from_landmarks(crop.undo(points), score) for crop, points, score in placed]
            crops = [_mesh_crop(face.landmarks) for face in faces]
        return [face for face in faces if face.score > least]


def suppress(boxes: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """Non-maximum suppression that averages, weighted by score, every box with those it overlaps (as BlazeFace does).

    Args: boxes [n, 4] as left, top, right, bottom; scores [n]; values [n, k] averaged along.
    Returns: [m, 4 + k], best score first.
    """
    rows = torch.cat([boxes, values], dim=1)
    order = scores.argsort(descending=True)
    merged = []
    while len(order):
        together = overlap(boxes[order[0]], boxes[order]) > SAME_FACE
        together[0] = True
        weight = scores[order[together]]
        merged.append((rows[order[together]] * weight[:, None]).sum(dim=0) / weight.sum())
        order = order[~together]
    return torch.stack(merged) if merged else rows


def overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of a box [4] with each of [n, 4]: [n]."""
    low = torch.maximum(box[:2], boxes[:, :2])
    high = torch.minimum(box[2:], boxes[:, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) - intersection
    return intersection / union.clamp(min=1e-9)


def _distinct(faces: list[Face]) -> list[Face]:
    """Without those that landed on the same face, the surest kept."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: face.score, reverse=True):
        if not kept or overlap(face.box, torch.stack([other.box for other in kept])).max() < SAME_FACE:
            kept.append(face)
    return kept


def _whole(image: Tensor) -> list[Crop]:
    height, width = image.shape[:2]
    return [Crop.around((width / 2, height / 2), max(height, width), size=DETECTOR_SIZE)]


def _with_margin(image: Tensor) -> list[Crop]:
    height, width = image.shape[:2]
    return [Crop.around((width / 2, height / 2), 2.0 * max(height, width), size=DETECTOR_SIZE)]


def _tiles(image: Tensor) -> list[Crop]:
    """Squares of two thirds of the shorter side, overlapping so far that a small face is whole in one of them."""
    height, width = image.shape[:2]
    side = min(height, width) * 2 / 3
    stride = side - TILE_OVERLAP * min(height, width)
    columns, rows = (math.ceil((length - side) / stride) + 1 for length in (width, height))
    lefts = [(width - side) * i / (columns - 1) for i in range(columns)]
    tops = [(height - side) * i / (rows - 1) for i in range(rows)]
    return [Crop.around((left + side / 2, top + side / 2), side, size=DETECTOR_SIZE) for top in tops for left in lefts]


def _mesh_crop(landmarks: Tensor) -> Crop:
    """Where the mesh should look for a face whose landmarks are known: level eyes, the longer extent times 1.5."""
    across = landmarks[RIGHT_EYE_OUTER, :2] - landmarks[LEFT_EYE_OUTER, :2]
    angle = math.atan2(float(across[1]), float(across[0]))
    centre, extent = _oriented_box(landmarks[:, :2], angle)
    return Crop.around(centre, max(float(extent.max()), 1.0) * ROI_SCALE, angle, MESH_SIZE)


def _oriented_box(points: Tensor, angle: float) -> tuple[tuple[float, float], Tensor]:
    """Centre (in the picture) and extent [2] of the box around points [n, 2] whose x axis is turned by `angle`."""
    cos, sin = math.cos(angle), math.sin(angle)
    axes = points.new_tensor([[cos, sin], [-sin, cos]])  # rows: along the box, down the box
    turned = points @ axes.T
    low, high = turned.amin(dim=0), turned.amax(dim=0)
    x, y = ((low + high) / 2 @ axes).tolist()
    return (x, y), high - low


def _again(seen: Sequence[Face], latest: Face, missed: int) -> Face | None:
    """The face nearest to where one was last seen, if it can be the same: the reach grows while it is missed."""

    def distance(face: Face) -> float:
        return float(((face.box[:2] + face.box[2:]) - (latest.box[:2] + latest.box[2:])).norm()) / 2

    nearest = min(seen, key=distance, default=None)
    reach = latest.side * (1.0 + missed / 5)
    return nearest if nearest is not None and distance(nearest) < reach else None


def bridge(found: Sequence[Face | None]) -> list[Face]:
    """A track without gaps: linear between the nearest frames that have the face, held at the ends; said in the log.

    Raises ValueError when no frame has a face.
    """
    known = [number for number, face in enumerate(found) if face is not None]
    if not known:
        raise ValueError(f"None of {len(found)} frames has a face: choose a video that shows one.")
    faces: list[Face] = []
    for number, face in enumerate(found):
        if face is None:
            place = bisect_left(known, number)
            before, after = known[max(place - 1, 0)], known[min(place, len(known) - 1)]
            weight = (number - before) / (after - before) if after != before else 0.0
            landmarks = torch.lerp(found[before].landmarks, found[after].landmarks, weight)
            face = Face.from_landmarks(landmarks, score=0.0)
        faces.append(face)
    missing = len(found) - len(known)
    if missing:
        first = next(number for number, face in enumerate(found) if face is None)
        log.warning("No face in %d of %d frames, frame %d first: bridged from their neighbours.", missing, len(found), first)
    return faces


def select_face(faces: Sequence[Face], face_index: int, image_size: Sequence[int], frame: int = 0) -> Face:
    """The face that was asked for. Raises ValueError that says what to do when there is none.

    Args: faces, largest first; face_index: 0 is the largest; image_size: (height, width) in pixels; frame: its number.
    """
    if not faces:
        raise ValueError(
            f"No face found in frame {frame}: a face must be at least {_least_height(image_size[0])} pixels high here "
            f"(5 % of the picture), {SEEN_WELL}; crop the picture closer or choose another one."
        )
    if not 0 <= face_index < len(faces):
        raise ValueError(
            f"Face {face_index} was asked for, but frame {frame} shows {len(faces)} face{'s' if len(faces) > 1 else ''}: "
            f"choose one from 0 (the largest) to {len(faces) - 1}."
        )
    return faces[face_index]


def _least_height(image_height: int) -> int:
    """How high a face must be to be found: in pixels."""
    return max(16, round(0.05 * image_height))


def crop_of(face: Face | Tensor, scale: float = 2.3, vy: float = -0.125, size: int = CROP_SIZE) -> Crop:
    """LivePortrait's crop of a face, rotated upright.

    The axis runs from between the eyes to the lips; the side is the longer extent of the jaw line and brows along that
    axis and across it, times `scale`; the centre moves by vy * side along the axis (negative: towards the hair). The extent
    leaves the forehead out because the published crop is measured on layouts of 106 or 203 points that have none.
    Args: face, or landmarks [468 or 478, 2 or 3] in pixels.
    """
    points = (face.landmarks if isinstance(face, Face) else face)[:, :2].float()
    eyes = (points[list(LEFT_EYE)].mean(dim=0) + points[list(RIGHT_EYE)].mean(dim=0)) / 2
    lips = points[list(MOUTH_CORNERS)].mean(dim=0)
    down = lips - eyes
    length = float(down.norm())
    across, along = (float(down[0]), float(down[1])) if length > 1e-3 else (0.0, 1.0)
    angle = math.atan2(-across, along)  # of the crop's x axis, whose y axis is `down`
    (x, y), extent = _oriented_box(points[list(JAW + BROWS)], angle)
    side = max(float(extent.max()), 1.0) * scale
    centre = (x - math.sin(angle) * vy * side, y + math.cos(angle) * vy * side)
    return Crop.around(centre, side, angle, size)


def crop_image(image: Tensor, crop: Crop) -> Tensor:
    """Cut a crop out of a picture: uint8 [H, W, 3] to uint8 [S, S, 3]; beyond the picture its border is repeated."""
    # Bicubic: an enlarged crop pasted back comes out half as far from the original as a bilinear one.
    return rearrange(sample(image, crop, mode="bicubic").round().clamp(0, 255).byte(), "c h w -> h w c")


def sample(image: Tensor, crop: Crop, mode: str = "bilinear", border: str = "border") -> Tensor:
    """A crop of a picture before rounding: uint8 [H, W, 3] to float [3, S, S], 0..255 (bicubic reaches a little beyond).

    Free of aliasing: a region larger than the crop is first reduced by area to at most twice the crop's resolution,
    then sampled at twice that density and averaged.
    Args: mode: as in `grid_sample`; border: "border" repeats the picture's border beyond it, "zeros" leaves it black.
    """
    height, width = image.shape[:2]
    step = 1.0 / crop.scale  # picture pixels per crop pixel
    margin = math.ceil(2 * step) + 1
    low = (crop.corners().amin(dim=0).floor() - margin).tolist()
    high = (crop.corners().amax(dim=0).ceil() + margin).tolist()
    left, right = _within(low[0], high[0], width)
    top, bottom = _within(low[1], high[1], height)
    region = rearrange(image[top:bottom, left:right], "h w c -> 1 c h w")
    rows, columns = region.shape[2:]
    if step > 2.0:
        region = _reduced(region, max(1, round(rows * 2.0 / step)), max(1, round(columns * 2.0 / step)))
    density = 2 if step > 1.25 else 1
    axis = (torch.arange(crop.size * density, device=image.device) + 0.5) / density
    matrix = crop.inverse.clone()
    matrix[:2, 2] -= matrix.new_tensor([left, top])
    grid = _grid(matrix, axis, axis, rows, columns)
    mode = mode if density == 1 else "bilinear"  # averaged anyway
    sampled = F.grid_sample(region.float(), grid, mode=mode, padding_mode=border, align_corners=False)
    return (F.avg_pool2d(sampled, density) if density > 1 else sampled)[0]


def _grid(matrix: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """For `grid_sample`: where matrix [3, 3] takes rows y [h] and columns x [w] in an image of this size: [1, h, w, 2]."""
    (a, b, c), (d, e, f) = matrix[:2].tolist()
    across = (a * x + c)[None, :] + (b * y)[:, None]
    down = (d * x + f)[None, :] + (e * y)[:, None]
    return torch.stack([across * (2.0 / width) - 1.0, down * (2.0 / height) - 1.0], dim=-1)[None]


def _within(low: float, high: float, length: int) -> tuple[int, int]:
    """The part of low..high inside 0..length, at least one pixel."""
    start = min(max(int(low), 0), length - 1)
    return start, min(max(int(high), start + 1), length)


def _reduced(region: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 [1, 3, h, w] smaller, antialiased. On a CPU in bytes: an 8K picture would take 0.6 GB as float."""
    if region.device.type != "cpu":
        region = region.float()
    return F.interpolate(region, (rows, columns), mode="bilinear", antialias=True, align_corners=False)


def soft_mask(size: int = CROP_SIZE, device: torch.device | None = None) -> Tensor:
    """How much of a rendered crop is pasted: 1 within 16..496 of 512 (in proportion), falling to 0 at its edge: [S, S]."""
    position = (torch.arange(size, device=device) + 0.5) / size
    ramp = (torch.minimum(position, 1.0 - position) / MASK_RAMP).clamp(max=1.0)
    return torch.minimum(ramp[:, None], ramp[None, :])


def paste_mask(crop: Crop, height: int, width: int) -> Tensor:
    """Where and how strongly `PasteBack` redraws a picture: [H, W] in 0..1."""
    rows, columns = _covered(crop, height, width)
    soft = soft_mask(crop.size, crop.matrix.device)[None, None]
    mask = soft.new_zeros(height, width)
    grid = _picture_grid(crop, rows, columns)
    mask[rows, columns] = F.grid_sample(soft, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0]
    return mask


def _covered(crop: Crop, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the picture that hold the crop: none of them when it lies outside."""
    corners = crop.corners()
    (left, top), (right, bottom) = corners.amin(dim=0).floor().tolist(), corners.amax(dim=0).ceil().tolist()
    rows = slice(min(max(int(top), 0), height), min(max(int(bottom), 0), height))
    columns = slice(min(max(int(left), 0), width), min(max(int(right), 0), width))
    return rows, columns


def _picture_grid(crop: Crop, rows: slice, columns: slice) -> Tensor:
    """Where to read a crop to draw a rectangle of the picture."""
    y, x = (torch.arange(part.start, part.stop, device=crop.matrix.device) + 0.5 for part in (rows, columns))
    return _grid(crop.matrix, y, x, crop.size, crop.size)


class PasteBack:
    """Draws rendered crops into the picture they came from; what doesn't depend on the frame is computed once.

    mask [H, W] in 0..1: where and how strongly the picture is redrawn. Nothing outside the mask is touched, and what the
    crop holds from beyond the picture is left out.
    """

    def __init__(self, crop: Crop, source: Tensor) -> None:
        """Args: crop; source uint8 [H, W, 3], on the device that is to do the work."""
        height, width = source.shape[:2]
        crop = Crop(crop.matrix.to(source.device), crop.size)
        self.source = source
        self.mask = paste_mask(crop, height, width)
        self._rows, self._columns = _covered(crop, height, width)
        self._grid = _picture_grid(crop, self._rows, self._columns)
        self._weight = self.mask[self._rows, self._columns, None]
        self._rest = source[self._rows, self._columns] * (1.0 - self._weight) + 0.5  # the half makes uint8's cut a rounding
        # A crop more than twice as fine as the picture is reduced first, or details would flicker.
        self._size = round(crop.size * 2.0 / crop.scale) if crop.scale > 2.0 else crop.size

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [b, S, S, 3] to uint8 [b, H, W, 3]."""
        pasted = self.source.expand(len(frames), -1, -1, -1).clone()
        if self._weight.numel() == 0:
            return pasted
        together = max(1, PASTE_PIXELS // self._weight.numel())
        for chunk, out in zip(frames.split(together), pasted.split(together), strict=True):
            views = rearrange(chunk, "b h w c -> b c h w")
            if self._size != views.shape[2]:
                views = _reduced(views, self._size, self._size)
            grid = self._grid.expand(len(chunk), -1, -1, -1)
            drawn = F.grid_sample(views.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
            out[:, self._rows, self._columns] = torch.addcmul(self._rest, rearrange(drawn, "b c h w -> b h w c"), self._weight)
        return pasted


def paste_back(frames: Tensor, source: Tensor, crop: Crop) -> Tensor:
    """Rendered crops uint8 [b, S, S, 3] drawn into a picture uint8 [H, W, 3]: uint8 [b, H, W, 3]. See `PasteBack`."""
    return PasteBack(crop, source)(frames)


def prepare_images(images: Tensor) -> Tensor:
    """Pictures as ComfyUI gives them, float 0..1 [N, H, W, 1, 3 or 4], as uint8 [N, H, W, 3].

    Grey is copied to three channels, an alpha channel is left out, values outside 0..1 are cut.
    Raises ValueError for another shape, NaN, or a side below 64 pixels.
    """
    if images.dim() != 4 or images.shape[3] not in (1, 3, 4) or images.shape[0] == 0:
        raise ValueError(f"The image is {list(images.shape)}, expected [frames, height, width, 1, 3 or 4 channels].")
    count, height, width, channels = images.shape
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"The image has {width} x {height} pixels, expected at least {MIN_SIDE} x {MIN_SIDE}: "
            "use a larger picture (enlarging this one won't bring the face back)."
        )
    prepared = torch.empty(count, height, width, 3, dtype=torch.uint8, device=images.device)
    # Strip by strip, so that an 8K picture or a long video needs no second copy in float.
    rows = max(1, (1 << 22) // width)
    for strip, out in zip(images.flatten(0, 1).split(rows), prepared.flatten(0, 1).split(rows), strict=True):
        if not strip.sum().isfinite() and not strip.isfinite().all():  # the sum alone takes a tenth of the time
            raise ValueError("The image holds NaN or infinite values: check the node or file it comes from.")
        out.copy_((strip[..., :3] if channels == 4 else strip).float().mul(255.0).round_().clamp_(0.0, 255.0))
    return prepared
