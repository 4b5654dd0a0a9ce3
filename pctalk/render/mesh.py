"""The mesh renderer: any motion of the keypoint space on one portrait, without learnt image synthesis.

A linear basis carries expression to displacements of 468 face landmarks (`basis`, `motion`), splines carry those to every pixel
(`shape`, `warp`), mouth and eyes open as layers (`openings`, `mouth`), and a `scene` draws it all. It is faster than real time
on a laptop's CPU and keeps hair, neck and background still. It knows no hair and no far side of the head, and eyes look aside
but not up or down: a preview and an embedded default, not the quality path.

Pasted back, the portrait is drawn at its own resolution, pixel by pixel, not through the 512 x 512 crop.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..faces import FaceFinder, prepare_images
from ..keypoints import Keypoints
from . import Chunk, Portrait
from .basis import Basis, HeadFit, read_keypoints, with_depth
from .canvas import Canvas, crop_mask
from .motion import Motion
from .mouth import with_lip_edges
from .scene import GROUP, Scene
from .tracking import find_faces, steady_crops


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

    def working_memory(self, device: torch.device, batch: int = 0) -> int:
        """See `Renderer.working_memory`: none is asked for, it holds a few pictures at once."""
        return 0

    def extract(
        self, images: Tensor, *, face_index: int = 0, crop_scale: float = 2.3, landmarks: list | None = None
    ) -> tuple[Portrait, Keypoints]:
        """See `Renderer.extract`.

        Portrait.features: landmarks [N, 468, 3] in crop pixels, the inner lips where the picture has them; and the portrait's
        own expression [N, 21, 3], rotation [N, 3, 3], scale [N] and translation [N, 3].
        """
        frames = prepare_images(images).cpu()
        faces = find_faces(self.face_finder, frames, face_index, landmarks)
        crops = steady_crops(faces, crop_scale)
        points = torch.stack([crop.apply(face.landmarks.cpu()) for crop, face in zip(crops, faces, strict=True)])
        for index, (still, frame, crop) in enumerate(zip(points, frames, crops, strict=True)):
            if still[:, 2].abs().max() == 0:
                still = with_depth(still, self.basis)
            canvas = Canvas(frame, crop.matrix.double().cpu())
            points[index] = with_lip_edges(still, HeadFit.of(still, self.basis).unit, canvas.look)
        keypoints = read_keypoints(points, crops[0].size, self.basis)
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
        portrait.check_made_by(self.name)
        size = batch or GROUP
        mask = crop_mask(portrait, 0, paste_back)
        pending: list[Tensor] = []
        for frames in self._drawn(portrait, Motion.between(portrait, keypoints), paste_back):
            pending.append(frames)
            while sum(map(len, pending)) >= size:
                ready = torch.cat(pending) if len(pending) > 1 else pending[0]
                pending = [ready[size:]] if len(ready) > size else []
                yield Chunk(ready[:size], mask.expand(size, -1, -1))
        if pending:
            ready = torch.cat(pending)
            yield Chunk(ready, mask.expand(len(ready), -1, -1))

    def _drawn(self, portrait: Portrait, motion: Motion, paste_back: bool) -> Iterator[Tensor]:
        """Groups of frames: a video's own frame each, then its last one, or a still's only one, for all that remain."""
        device = next(self.face_finder.parameters()).device
        last = len(portrait.frames) - 1
        for index in range(min(last, motion.frames)):
            own = motion.part(index, index + 1)
            yield Scene(portrait, index, own, self.basis, paste_back, device).draw(own)
        rest = motion.part(last)
        if rest.frames:
            scene = Scene(portrait, last, rest, self.basis, paste_back, device)
            for start in range(0, rest.frames, scene.group):
                yield scene.draw(rest.part(start, start + scene.group))
