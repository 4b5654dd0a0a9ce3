"""From source pictures to one face and one crop a frame, the same way for every renderer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..faces import Crop, Face, FaceFinder, bridge, crop_of, select_face

STEADY_FRAMES = 13  # about half a second


def find_faces(finder: FaceFinder, frames: Tensor, face_index: int, landmarks: Sequence | None = None) -> list[Face]:
    """One face per frame; where a video's frame has none, it is bridged from its neighbours.

    Args: frames uint8 [N, H, W, 3]; face_index: 0 is the largest; landmarks: [468 or 478, 2] pixels for each frame (None:
    no face in it), or once for all, to use instead of looking for the face.
    Raises ValueError with a remedy when there is no such face or the landmarks are of other pictures.
    """
    if landmarks is None:
        if len(frames) == 1:
            return [select_face(finder.find(frames[0]), face_index, frames.shape[1:3])]
        return finder.track(frames, face_index)
    if len(landmarks) not in (1, len(frames)):
        raise ValueError(
            f"There are landmarks for {len(landmarks)} frames and {len(frames)} pictures: connect those of these pictures."
        )
    faces = bridge([None if points is None else Face.from_landmarks(points) for points in landmarks])
    return faces if len(faces) == len(frames) else faces * len(frames)


def steady_crops(faces: Sequence[Face], scale: float) -> list[Crop]:
    """One crop a frame; in a video from landmarks averaged over half a second, so that the crop doesn't tremble."""
    landmarks = torch.stack([face.landmarks.cpu() for face in faces])
    if len(landmarks) > 1:
        ends = [part.expand(STEADY_FRAMES // 2, -1, -1) for part in (landmarks[:1], landmarks[-1:])]
        landmarks = torch.cat([ends[0], landmarks, ends[1]]).unfold(0, STEADY_FRAMES, 1).mean(dim=-1)
    return [crop_of(points, scale) for points in landmarks]
