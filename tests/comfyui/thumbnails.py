"""Make the pictures beside the example workflows from what they really draw: python tests/comfyui/thumbnails.py

Each holds four frames, from every quarter of the clip the one with the mouth open widest.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import av
import comfyui_server
import numpy as np
import torch
import workflow
from PIL import Image

sys.path.insert(0, str(workflow.PACK))

from pctalk.faces import FaceFinder

UPPER_LIP, LOWER_LIP = 13, 14  # their inner edges


def thumbnail(video: Path) -> Image.Image:
    with av.open(str(video)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    faces = FaceFinder.from_assets().track(torch.from_numpy(frames))
    opening = np.array([float(face.landmarks[LOWER_LIP, 1] - face.landmarks[UPPER_LIP, 1]) for face in faces])
    widest = [quarter[opening[quarter].argmax()] for quarter in np.array_split(np.arange(len(frames)), 4)]
    top, bottom = (np.concatenate(frames[pair], axis=1) for pair in (widest[:2], widest[2:]))
    return Image.fromarray(np.concatenate([top, bottom]))


def main() -> None:
    with tempfile.TemporaryDirectory() as base:
        server = comfyui_server.Server(comfyui_server.install(), Path(base), {"comfyui-pctalk": workflow.PACK})
        try:
            for name in ("portrait.jpg", "speech.flac"):
                shutil.copy(workflow.PACK / "web" / "examples" / name, server.base / "input" / f"pctalk_{name}")
            for name in workflow.NAMES:
                prompt = workflow.to_prompt(workflow.saved(name), server.get("/object_info"))
                saved = server.run(prompt).outputs[workflow.node_id(prompt, "SaveVideo")]["images"][0]
                thumbnail(server.file(saved)).save(workflow.FOLDER / f"{name}.jpg", quality=90)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
