"""Make assets/mesh_basis.safetensors: the linear basis between expression and face-mesh landmarks.

    python -m pctalk.train.convert_mesh_basis mesh_basis.npz liveportrait_motion.npz

mesh_basis.npz is this project's fit of the displacement of MediaPipe's 468 landmarks to LivePortrait's expression, made from
the motion clips that LivePortrait publishes (MIT License); liveportrait_motion.npz holds those clips. From the second file
only the population's mean canonical keypoints are kept.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OUTPUT = Path(__file__).parents[1] / "assets" / "mesh_basis.safetensors"
FLOATS = ("basis", "inverse_xy", "neutral", "neutral_exp", "exp_std", "exp_cov", "lp_units_per_iod")
INDICES = ("lid_pairs", "lip_pairs", "stable_points", "region_lips")


def mean_canonical(motion: Path) -> Tensor:
    """The canonical keypoints averaged over every frame that has them: [21, 3]."""
    with np.load(motion, allow_pickle=False) as clips:
        keypoints = [clips[name].reshape(-1, 21, 3) for name in clips.files if name.endswith("/kp")]
    return torch.from_numpy(np.concatenate(keypoints).mean(axis=0, dtype=np.float64)).float()


def convert(basis: Path, motion: Path) -> dict[str, Tensor]:
    """The tensors of the asset. Raises KeyError when a file lacks an array."""
    tensors = {"canonical": mean_canonical(motion)}
    with np.load(basis, allow_pickle=False) as arrays:
        for name in FLOATS:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(arrays[name], dtype=np.float32))
        for name in INDICES:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(arrays[name], dtype=np.int64))
    return tensors


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("basis", type=Path, help="mesh_basis.npz")
    parser.add_argument("motion", type=Path, help="liveportrait_motion.npz")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    tensors = convert(arguments.basis, arguments.motion)
    temporary = Path(f"{arguments.output}.part")
    save_file(tensors, temporary)
    os.replace(temporary, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
