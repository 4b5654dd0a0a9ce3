"""The networks against what the authors' own code computed; loosening a tolerance here is wrong, not the numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pctalk.evaluate.golden import NETWORK_TOLERANCE, SEQUENCE_TOLERANCE, read_golden, recipe, relative_difference, verify

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def rows():
    return {(row.file, row.tensor): row for row in verify(GOLDEN)}


@pytest.mark.parametrize("tensor", ["mel", "features"])
def test_audio_encoder(rows, tensor):
    row = rows["audio_encoder.safetensors", tensor]
    assert row.tolerance == NETWORK_TOLERANCE == 2e-4
    assert row.ok and row.difference <= 2e-4


@pytest.mark.parametrize("tensor", ["raw", "refined", "reference_style", "smoothed", "edited"])
def test_lac(rows, tensor):
    row = rows["lac.safetensors", tensor]
    assert row.tolerance == SEQUENCE_TOLERANCE == 1e-3
    assert row.ok and row.difference <= 1e-3


def test_style_encoder(rows):
    row = rows["lac.safetensors", "style_embedding"]
    assert row.ok and row.difference <= 2e-4


@pytest.mark.parametrize("tensor", ["neutral", "happy", "sad", "exp_out"])
def test_emc(rows, tensor):
    row = rows["emc.safetensors", tensor]
    assert row.ok and row.difference <= 1e-3


@pytest.mark.parametrize(
    "tensor",
    ["feature", "kp", "exp", "t", "rotation", "k_ori", "occlusion", "deformation", "warped", "rendered"],
)
def test_liveportrait(rows, tensor):
    row = rows["liveportrait.safetensors", tensor]
    assert row.tolerance == NETWORK_TOLERANCE
    assert row.ok and row.difference <= 2e-4


@pytest.mark.parametrize("tensor", ["stitching", "lip", "eyes"])
def test_stitching_and_retargeting(rows, tensor):
    row = rows["stitching_retargeting.safetensors", tensor]
    assert row.ok and row.difference <= 2e-4


def test_nothing_else_was_compared(rows):
    assert len(rows) == 25


def test_a_difference_is_noticed(tmp_path):
    tensors, config = read_golden(GOLDEN / "audio_encoder.safetensors")
    tensors["mel"][100, 40] += 4e-4 * tensors["mel"].std()
    save_file(tensors, tmp_path / "audio_encoder.safetensors", metadata={"golden": json.dumps(config)})
    mel, features = verify(tmp_path)
    assert not mel.ok and mel.difference == pytest.approx(4e-4, rel=0.1)
    assert features.ok


def test_other_files_are_said_to_be_uncovered(tmp_path):
    shutil.copy(GOLDEN / "audio_encoder.safetensors", tmp_path / "something_else.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "no_golden_file.safetensors")
    (row,) = verify(tmp_path)
    assert row.ok and row.difference is None and "not covered" in row.note


def test_unusable_folders_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        verify(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no golden file"):
        verify(tmp_path)
    whole = (GOLDEN / "lac.safetensors").read_bytes()
    (tmp_path / "lac.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete golden file"):
        verify(tmp_path)
    _, config = read_golden(GOLDEN / "lac.safetensors")
    save_file({"features": torch.zeros(60, 512)}, tmp_path / "lac.safetensors", metadata={"golden": json.dumps(config)})
    with pytest.raises(ValueError, match="has no 'reference'"):
        verify(tmp_path)


def test_relative_difference():
    expected = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert relative_difference(expected + torch.tensor([0.0, 0.0, 0.1, 0.0]), expected) == pytest.approx(
        0.1 / expected.std().item()
    )
    assert relative_difference(expected[:3], expected) == float("inf")
    assert relative_difference(expected * float("nan"), expected) == float("inf")


def test_recipe():
    weight = recipe("layer.weight", (8, 4, 5), seed=1)
    assert weight.shape == (8, 4, 5) and weight.dtype == "float32"
    assert weight.std() == pytest.approx(20**-0.5, rel=0.2)
    assert recipe("norm.weight", (64,), 1).mean() == pytest.approx(1.0, abs=0.05)
    assert recipe("norm.running_var", (64,), 1).min() >= 1.0
    assert (recipe("layer.weight", (4,), 1) != recipe("layer.weight", (4,), 2)).any()
