"""The keypoint space: 21 implicit keypoints, regions, the transform, and motion as additions.

One space carries everything. Coordinates are row vectors in image axes (x right, y down), normalised so
that the square face crop spans about [-1, 1]:

    K_ori = s * (K_c @ R + delta) + t          (t_z is ignored)
    K_d   = K_ori + D_l + D_e                  (PC-Talk, CVPR 2026: motion is added)

`Keypoints` holds the factors of the first line, `Deformation` holds one D. Both are frozen, are float32 on
any device, and go to and from a single safetensors file each.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NUM_KEYPOINTS = 21
FPS = 25.0
FORMAT_VERSION = "1"

LIPS = (6, 12, 14, 17, 19, 20)
EYES = (11, 13, 15, 16, 18)
BROWS = (0, 1, 2)
REGIONS: dict[str, tuple[int, ...]] = {
    "lips": LIPS,
    "eyes": EYES,
    "brows": BROWS,
    "upper_face": tuple(sorted(EYES + BROWS)),
    "lower_face": LIPS,
    "all": tuple(range(NUM_KEYPOINTS)),
}

EMOTIONS = ("neutral", "happy", "sad", "angry", "fear", "disgusted", "surprised", "contempt")


def rotation_matrix(pitch: Tensor, yaw: Tensor, roll: Tensor) -> Tensor:
    """Rotation for row vectors, R = (Rz Ry Rx)^T, from angles in degrees.

    Args: pitch (about x), yaw (about y), roll (about z), each [...].
    Returns: [..., 3, 3].
    """
    x, y, z = (torch.deg2rad(angle) for angle in (pitch, yaw, roll))
    cx, sx, cy, sy, cz, sz = x.cos(), x.sin(), y.cos(), y.sin(), z.cos(), z.sin()
    rows = (
        (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        (-sy, cy * sx, cy * cx),
    )
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    return matrix.transpose(-1, -2)


def euler_angles(rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `rotation_matrix` for |yaw| < 90: [..., 3, 3] to (pitch, yaw, roll) in degrees, each [...]."""
    matrix = rotation.transpose(-1, -2)
    yaw = torch.asin((-matrix[..., 2, 0]).clamp(-1.0, 1.0))
    pitch = torch.atan2(matrix[..., 2, 1], matrix[..., 2, 2])
    roll = torch.atan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return torch.rad2deg(pitch), torch.rad2deg(yaw), torch.rad2deg(roll)


def region_mask(region: str, device: torch.device | None = None) -> Tensor:
    """1.0 on the keypoints of a region, 0.0 elsewhere: [21]. Raises ValueError for an unknown name."""
    if region not in REGIONS:
        raise ValueError(f"Unknown region {region!r}: choose one of {', '.join(REGIONS)}.")
    mask = torch.zeros(NUM_KEYPOINTS, device=device)
    mask[list(REGIONS[region])] = 1.0
    return mask


def hold(track: Tensor, frames: int) -> Tensor:
    """A track [T, ...] at a given length: cut, or held at its last frame."""
    if track.shape[0] >= frames:
        return track[:frames]
    return torch.cat([track, track[-1:].expand(frames - track.shape[0], *track.shape[1:])])


def resample(track: Tensor, fps: float, new_fps: float, frames: int) -> Tensor:
    """A track [T, ...] sampled at fps, linearly interpolated at `frames` instants of new_fps (held past its end)."""
    instants = torch.arange(frames, dtype=torch.float64, device=track.device) * (fps / new_fps)
    instants = instants.clamp(max=track.shape[0] - 1)
    before = instants.floor().long()
    after = (before + 1).clamp(max=track.shape[0] - 1)
    weight = (instants - before).to(track.dtype).reshape(-1, *[1] * (track.dim() - 1))
    return torch.lerp(track[before], track[after], weight)


def frame_count(seconds: float, fps: float) -> int:
    """How many frames show `seconds` of sound: the nearest number, at least one, so the error is half a frame."""
    return max(1, int(seconds * fps + 0.5))


@dataclass(frozen=True)
class Keypoints:
    """One face's keypoints, a still (T = 1) or a track, as the factors of K = s (K_c R + delta) + t.

    canonical [21, 3]; rotation [T, 3, 3]; scale [T]; translation [T, 3]; expression [T, 21, 3]; fps.
    Raises ValueError when shapes don't agree or a value is not finite.
    """

    canonical: Tensor
    rotation: Tensor
    scale: Tensor
    translation: Tensor
    expression: Tensor
    fps: float = FPS

    def __post_init__(self) -> None:
        frames = self.expression.shape[0]
        expected = {
            "canonical": (NUM_KEYPOINTS, 3),
            "rotation": (frames, 3, 3),
            "scale": (frames,),
            "translation": (frames, 3),
            "expression": (frames, NUM_KEYPOINTS, 3),
        }
        _check(self, expected)

    @property
    def frames(self) -> int:
        return self.expression.shape[0]

    def posed(self) -> Tensor:
        """K = s (K_c R + delta) + t: [T, 21, 3]."""
        return self._transform(self.canonical @ self.rotation + self.expression)

    def undeformed(self) -> Tensor:
        """K_und = s (K_c R) + t, the same pose without expression: [T, 21, 3]."""
        return self._transform(self.canonical @ self.rotation)

    def _transform(self, points: Tensor) -> Tensor:
        translation = self.translation * self.translation.new_tensor([1.0, 1.0, 0.0])
        return self.scale[:, None, None] * points + translation[:, None]

    def with_posed(self, points: Tensor) -> Keypoints:
        """The inverse of `posed`: the same canonical keypoints and pose with the expression that gives K = points.

        Args: points [T, 21, 3] (a still is extended to T).
        """
        still = self.extended(points.shape[0])
        return replace(still, expression=(points - still.undeformed()) / still.scale[:, None, None])

    def extended(self, frames: int) -> Keypoints:
        """The same motion at another length: cut, or held at its last frame."""
        if frames == self.frames:
            return self
        return replace(
            self,
            rotation=hold(self.rotation, frames),
            scale=hold(self.scale, frames),
            translation=hold(self.translation, frames),
            expression=hold(self.expression, frames),
        )

    def at_fps(self, fps: float, frames: int | None = None) -> Keypoints:
        """The same motion at another frame rate; rotations are interpolated as matrices and made orthogonal again.

        Args: frames: how many to return (default: as many as last as long as this track).
        """
        frames = frame_count(self.frames / self.fps, fps) if frames is None else frames
        if fps == self.fps or self.frames == 1:
            return replace(self.extended(frames), fps=fps)
        rotation = resample(self.rotation, self.fps, fps, frames)
        u, _, vh = torch.linalg.svd(rotation)
        return replace(
            self,
            rotation=u @ vh,
            scale=resample(self.scale, self.fps, fps, frames),
            translation=resample(self.translation, self.fps, fps, frames),
            expression=resample(self.expression, self.fps, fps, frames),
            fps=fps,
        )

    def to(self, device: torch.device | str) -> Keypoints:
        return _moved(self, device)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file. Raises OSError when the folder can't be written."""
        _save(self, path, {"pctalk": "keypoints"})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Keypoints:
        """Read what `save` wrote. Raises ValueError when the file is something else."""
        tensors, metadata = _load(path, "keypoints", device)
        return _build(cls, path, tensors, fps=float(metadata["fps"]))


@dataclass(frozen=True)
class Deformation:
    """An offset to add to keypoints: D_l from speech, D_e from an emotion, or a mix.

    offsets [T, 21, 3] in K space (after scale); fps; regions: the names of the regions it touches.
    """

    offsets: Tensor
    fps: float = FPS
    regions: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        _check(self, {"offsets": (self.offsets.shape[0], NUM_KEYPOINTS, 3)})

    @property
    def frames(self) -> int:
        return self.offsets.shape[0]

    def masked(self, region: str) -> Deformation:
        """Only what moves inside a region; exactly zero outside."""
        mask = region_mask(region, self.offsets.device)[:, None]
        return replace(self, offsets=self.offsets * mask, regions=(region,))

    def scaled(self, gain: float | Tensor) -> Deformation:
        """Times a gain: a number, or one value per frame [T]."""
        if isinstance(gain, Tensor) and gain.dim() == 1:
            gain = gain[:, None, None]
        return replace(self, offsets=self.offsets * gain)

    def at_fps(self, fps: float, frames: int | None = None) -> Deformation:
        """The same motion at another frame rate (see `Keypoints.at_fps`)."""
        frames = frame_count(self.frames / self.fps, fps) if frames is None else frames
        if fps == self.fps:
            return replace(self, offsets=hold(self.offsets, frames))
        return replace(self, offsets=resample(self.offsets, self.fps, fps, frames), fps=fps)

    def to(self, device: torch.device | str) -> Deformation:
        return _moved(self, device)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file. Raises OSError when the folder can't be written."""
        _save(self, path, {"pctalk": "deformation", "regions": json.dumps(self.regions)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Deformation:
        """Read what `save` wrote. Raises ValueError when the file is something else."""
        tensors, metadata = _load(path, "deformation", device)
        regions = tuple(json.loads(metadata["regions"]))
        return _build(cls, path, tensors, fps=float(metadata["fps"]), regions=regions)


def sum_deformations(
    deformations: Sequence[Deformation], frames: int | None = None, fps: float | None = None
) -> Deformation:
    """The sum of deformations, whatever their order, to the last bit.

    Shorter tracks are held at their last frame (said in the log); other rates are resampled to `fps` (default: the
    highest given). Raises ValueError for an empty list.
    """
    if not deformations:
        raise ValueError("There is no deformation to add: connect at least one.")
    fps = fps or max(d.fps for d in deformations)
    tracks = [d if d.fps == fps else d.at_fps(fps) for d in deformations]
    frames = frames or max(d.frames for d in tracks)
    for track in tracks:
        if 1 < track.frames < frames:
            log.warning(
                "A deformation of %.2f s is shorter than the %.2f s it is added to: its last frame is held.",
                track.frames / fps,
                frames / fps,
            )
    offsets = torch.stack([hold(d.offsets, frames) for d in tracks])
    # Floating-point sums depend on their order; sorting the addends makes the order of links irrelevant.
    offsets = offsets.sort(dim=0).values.sum(dim=0)
    regions = tuple(sorted({region for d in deformations for region in d.regions}))
    return Deformation(offsets, fps, regions)


def add_deformations(keypoints: Keypoints, deformations: Iterable[Deformation]) -> Keypoints:
    """K_d = K_ori + sum of D (PC-Talk, eq. of the additive deformation), kept as expression: delta += D / s.

    A still or a shorter track is held at its last frame; with no deformation the keypoints come back unchanged.
    """
    deformations = list(deformations)
    if not deformations:
        return keypoints
    total = sum_deformations(deformations)
    if keypoints.frames > 1 and keypoints.fps != total.fps:
        keypoints = keypoints.at_fps(total.fps)
    frames = max(keypoints.frames, total.frames)
    if 1 < keypoints.frames < frames:
        log.warning(
            "The keypoints last %.2f s and the deformation %.2f s: the last keypoints are held.",
            keypoints.frames / total.fps,
            total.frames / total.fps,
        )
    elif 1 < total.frames < frames:
        log.warning(
            "The deformation lasts %.2f s and the keypoints %.2f s: its last frame is held.",
            total.frames / total.fps,
            frames / total.fps,
        )
    keypoints = keypoints.extended(frames)
    offsets = hold(total.offsets, frames).to(keypoints.expression.device)
    expression = keypoints.expression + offsets / keypoints.scale[:, None, None]
    return replace(keypoints, expression=expression, fps=total.fps)


def _check(value: Keypoints | Deformation, expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        tensor = getattr(value, name)
        if tuple(tensor.shape) != shape or shape[0] == 0:
            raise ValueError(
                f"{type(value).__name__}.{name} is {list(tensor.shape)}, expected {list(shape)} and at least one frame."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{type(value).__name__}.{name} holds NaN or infinite values: check the input it was made from.")
    if not value.fps > 0:
        raise ValueError(f"The frame rate must be above 0, not {value.fps}.")


def _moved(value, device):
    tensors = {f.name: getattr(value, f.name) for f in fields(value) if isinstance(getattr(value, f.name), Tensor)}
    return replace(value, **{name: tensor.to(device) for name, tensor in tensors.items()})


def _save(value, path: str | Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    tensors = {f.name: getattr(value, f.name) for f in fields(value) if isinstance(getattr(value, f.name), Tensor)}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "fps": repr(float(value.fps)), "version": FORMAT_VERSION}
    temporary = Path(f"{path}.part")
    try:
        temporary.write_bytes(save(tensors, metadata))  # save_file would make it unreadable to other users
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: str | Path, kind: str, device) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            found = metadata.get("pctalk")
            if found != kind:
                raise ValueError(f"{path} holds {found or 'something that PC-Talk did not save'}, expected {kind}.")
            version = metadata.get("version")
            if version != FORMAT_VERSION:
                raise ValueError(f"{path} has format version {version}: this version of PC-Talk reads {FORMAT_VERSION}.")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable .safetensors file ({error}): save it again.") from None


def _build(cls, path, tensors: dict[str, Tensor], **rest):
    try:
        return cls(**tensors, **rest)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a valid {cls.__name__}: {error}") from None
