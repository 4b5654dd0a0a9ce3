"""From a picture to keypoints, and from keypoints back to pictures."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..pctalk.keypoints import FPS, Keypoints
from ..pctalk.render import Portrait, Renderer
from .host import Handle, Progress, empty_images, intermediate_device, run_device
from .sockets import CATEGORY, PACK_NAMES, FaceLandmarksSocket, KeypointsSocket, PortraitSocket, RendererSocket


class KeypointExtract(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_KeypointExtract",
            display_name="Extract Keypoints",
            category=CATEGORY,
            description="Finds the face in a portrait and reads its 21 keypoints: the head's pose and the face's expression.",
            search_aliases=[*PACK_NAMES, "face landmarks", "face crop", "liveportrait", "portrait"],
            inputs=[
                RendererSocket.Input("renderer", tooltip="Use the same renderer here and in Warp and Decode."),
                io.Image.Input(
                    "image",
                    tooltip="A portrait, at least 64 pixels a side, any shape; or the frames of a video of one person.",
                ),
                io.Int.Input(
                    "face_index",
                    default=0,
                    min=0,
                    max=99,
                    tooltip="Which face when there are several: 0 is the largest, 1 the next.",
                ),
                io.Float.Input(
                    "crop_scale",
                    default=2.3,
                    min=1.5,
                    max=4.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How much around the face is redrawn, in face sizes. 2.3 holds the whole head with its hair.",
                ),
                FaceLandmarksSocket.Input(
                    "landmarks",
                    optional=True,
                    tooltip="Landmarks from ComfyUI's own Detect Face Landmarks, to use instead of looking for the face.",
                ),
            ],
            outputs=[
                PortraitSocket.Output(display_name="portrait", tooltip="What Warp and Decode redraws."),
                KeypointsSocket.Output(display_name="keypoints", tooltip="K_ori, the portrait's own keypoints."),
            ],
        )

    @classmethod
    def execute(
        cls,
        renderer: Handle[Renderer],
        image: Tensor,
        face_index: int,
        crop_scale: float,
        landmarks: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        renderer.load()
        given = None if landmarks is None else chosen_landmarks(landmarks, face_index, image)
        portrait, keypoints = renderer.model.extract(image, face_index=face_index, crop_scale=crop_scale, landmarks=given)
        return io.NodeOutput(portrait, keypoints.to(intermediate_device()))


def chosen_landmarks(landmarks: dict[str, Any], face_index: int, image: Tensor) -> list[Tensor | None]:
    """One face's landmarks per frame, in pixels, from core's FACE_LANDMARKS; None where a frame has too few faces."""
    frames, size = landmarks["frames"], tuple(landmarks["image_size"])
    if len(frames) != len(image) or size != tuple(image.shape[1:3]):
        raise ValueError(
            f"The landmarks are of {len(frames)} frames of {size[1]} x {size[0]}, the image has {len(image)} of "
            f"{image.shape[2]} x {image.shape[1]}: detect them on the same image."
        )

    def area(face: dict[str, Any]) -> float:
        left, top, right, bottom = map(float, face["bbox_xyxy"])
        return (right - left) * (bottom - top)

    by_size = [sorted(faces, key=area, reverse=True) for faces in frames]
    chosen = [
        torch.as_tensor(faces[face_index]["landmarks_xy"]).float() if face_index < len(faces) else None for faces in by_size
    ]
    if all(face is None for face in chosen):
        most = max(map(len, frames))
        raise ValueError(
            f"The landmarks hold at most {most} faces a frame, face_index {face_index} needs {face_index + 1}: lower it."
        )
    return chosen


class WarpDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_WarpDecode",
            display_name="Warp and Decode",
            category=CATEGORY,
            description="Draws the portrait with every frame's keypoints. Connect the frames and their rate to Create Video.",
            search_aliases=[*PACK_NAMES, "render", "animate portrait", "liveportrait", "paste back"],
            inputs=[
                RendererSocket.Input("renderer", tooltip="The renderer that Extract Keypoints used."),
                PortraitSocket.Input("portrait", tooltip="From Extract Keypoints."),
                KeypointsSocket.Input("keypoints", tooltip="K_d from Add Deformations, or any keypoints of the same renderer."),
                io.Float.Input(
                    "fps",
                    default=FPS,
                    min=1.0,
                    max=120.0,
                    step=0.01,
                    tooltip="Frames a second of the result. Motion is resampled, so the length stays the same at any rate.",
                ),
                io.Boolean.Input(
                    "paste_back",
                    default=True,
                    tooltip="On: the whole picture, the face drawn back into it. Off: only the face crop, 512 x 512.",
                ),
                io.Boolean.Input(
                    "stitching",
                    default=True,
                    tooltip="Keeps shoulders and neck where they are, so that no seam shows. mesh never moves them.",
                ),
                io.Int.Input(
                    "batch",
                    default=0,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Frames drawn at a time; 0 lets the renderer choose. Smaller needs less memory.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="The frames. An odd side loses its last pixel, because video needs even sides.",
                ),
                io.Mask.Output(display_name="mask", tooltip="Where each frame was redrawn, with a soft edge."),
                io.Float.Output(display_name="fps", tooltip="For Create Video."),
            ],
        )

    @classmethod
    def execute(
        cls,
        renderer: Handle[Renderer],
        portrait: Portrait,
        keypoints: Keypoints,
        fps: float,
        paste_back: bool,
        stitching: bool,
        batch: int,
    ) -> io.NodeOutput:
        portrait.check_made_by(renderer.model.name)
        if keypoints.fps != fps or keypoints.frames == 1:
            keypoints = keypoints.at_fps(fps)
        height, width = portrait.frames.shape[1:3] if paste_back else (portrait.crops[0].size,) * 2
        height, width = height & ~1, width & ~1
        remedy = "shorten the audio, shrink the portrait or turn paste_back off"
        images, mask = empty_images(keypoints.frames, height, width, remedy, with_mask=True)

        renderer.load(renderer.model.working_memory(run_device(), batch))
        progress = Progress()
        progress(0, keypoints.frames)
        done = 0
        for chunk in renderer.model.render(portrait, keypoints, paste_back=paste_back, stitching=stitching, batch=batch):
            rows = slice(done, done + len(chunk.frames))
            images[rows].copy_(chunk.frames[:, :height, :width]).div_(255.0)
            mask[rows] = chunk.mask[:, :height, :width]
            done = rows.stop
            progress(done, keypoints.frames)
        return io.NodeOutput(images, mask, fps)
