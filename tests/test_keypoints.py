import math

import numpy as np
import pytest
import torch

from pctalk.keypoints import (
    EMOTIONS,
    REGIONS,
    Deformation,
    Keypoints,
    add_deformations,
    euler_angles,
    frame_count,
    hold,
    region_mask,
    resample,
    rotation_matrix,
    sum_deformations,
)


def random_keypoints(frames: int = 1, fps: float = 25.0, seed: int = 0) -> Keypoints:
    draw = torch.Generator().manual_seed(seed)
    pitch, yaw, roll = torch.randn(3, frames, generator=draw) * 10
    return Keypoints(
        canonical=torch.randn(21, 3, generator=draw) * 0.4,
        rotation=rotation_matrix(pitch, yaw, roll),
        scale=1.4 + 0.1 * torch.rand(frames, generator=draw),
        translation=torch.randn(frames, 3, generator=draw) * 0.2,
        expression=torch.randn(frames, 21, 3, generator=draw) * 0.05,
        fps=fps,
    )


def random_deformation(frames: int = 10, fps: float = 25.0, seed: int = 0) -> Deformation:
    draw = torch.Generator().manual_seed(seed)
    return Deformation(torch.randn(frames, 21, 3, generator=draw) * 0.05, fps)


def test_rotation_follows_the_published_order():
    # R = (Rz Ry Rx)^T for row vectors: written out with numpy, one axis at a time.
    pitch, yaw, roll = 11.0, -23.0, 7.0
    x, y, z = map(math.radians, (pitch, yaw, roll))
    rx = np.array([[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]])
    ry = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    rz = np.array([[math.cos(z), -math.sin(z), 0], [math.sin(z), math.cos(z), 0], [0, 0, 1]])
    rotation = rotation_matrix(*torch.tensor([pitch, yaw, roll]))
    np.testing.assert_allclose(rotation.numpy(), (rz @ ry @ rx).T, atol=1e-6)


def test_angles_come_back():
    angles = torch.tensor([[12.0, -30.0], [-25.0, 40.0], [3.0, -8.0]])
    torch.testing.assert_close(torch.stack(euler_angles(rotation_matrix(*angles))), angles, atol=1e-4, rtol=0)


def test_posed_is_the_published_formula():
    keypoints = random_keypoints(3)
    expected = []
    for frame in range(3):
        points = keypoints.canonical @ keypoints.rotation[frame] + keypoints.expression[frame]
        shift = keypoints.translation[frame].clone()
        shift[2] = 0
        expected.append(keypoints.scale[frame] * points + shift)
    torch.testing.assert_close(keypoints.posed(), torch.stack(expected))


def test_with_posed_inverts_posed():
    keypoints = random_keypoints(4)
    target = random_keypoints(4, seed=1).posed()
    torch.testing.assert_close(keypoints.with_posed(target).posed(), target)
    torch.testing.assert_close(random_keypoints(1).with_posed(target).posed(), target)


def test_adding_adds_in_keypoint_space():
    keypoints, one, two = random_keypoints(10), random_deformation(seed=1), random_deformation(seed=2)
    driven = add_deformations(keypoints, [one, two])
    torch.testing.assert_close(driven.posed(), keypoints.posed() + one.offsets + two.offsets)


def test_order_of_links_never_matters():
    keypoints = random_keypoints(10)
    parts = [random_deformation(seed=seed).scaled(10.0**seed) for seed in range(5)]
    forward = add_deformations(keypoints, parts).expression
    assert torch.equal(forward, add_deformations(keypoints, parts[::-1]).expression)


def test_zero_is_exactly_zero():
    keypoints = random_keypoints(10)
    assert add_deformations(keypoints, []) is keypoints
    driven = add_deformations(keypoints, [random_deformation().scaled(0.0)])
    assert torch.equal(driven.expression, keypoints.expression)


def test_a_still_is_held_and_a_short_track_too(caplog):
    still, motion = random_keypoints(1), random_deformation(10)
    assert add_deformations(still, [motion]).frames == 10
    assert not caplog.records
    driven = add_deformations(random_keypoints(30), [motion])
    assert driven.frames == 30
    assert "last frame is held" in caplog.text
    torch.testing.assert_close(
        driven.posed()[29], random_keypoints(30).posed()[29] + motion.offsets[-1], atol=1e-6, rtol=0
    )


def test_deformations_of_two_lengths_and_rates_meet(caplog):
    total = sum_deformations([random_deformation(50), random_deformation(30, fps=50.0)])
    assert total.fps == 50.0 and total.frames == 100
    assert "held" in caplog.text


def test_region_masks():
    touched = torch.zeros(21)
    for region in ("lips", "eyes", "brows"):
        touched += region_mask(region)
    assert touched.max() == 1.0, "lips, eyes and brows don't overlap"
    assert set(REGIONS["upper_face"]) == set(REGIONS["eyes"]) | set(REGIONS["brows"])
    deformation = random_deformation().masked("lips")
    outside = [i for i in range(21) if i not in REGIONS["lips"]]
    assert (deformation.offsets[:, outside] == 0).all() and (deformation.offsets[:, list(REGIONS["lips"])] != 0).all()
    assert deformation.regions == ("lips",)
    with pytest.raises(ValueError, match="upper_face"):
        region_mask("nose")


def test_emotions_are_meads_eight_with_neutral_first():
    assert len(set(EMOTIONS)) == 8 and EMOTIONS[0] == "neutral"


@pytest.mark.parametrize("fps", [23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120])
def test_another_rate_lasts_as_long(fps):
    keypoints = random_keypoints(250)
    frames = keypoints.at_fps(fps).frames
    assert abs(frames / fps - 10.0) <= 0.5 / fps


def test_resampling_keeps_instants_and_rotations():
    times = torch.arange(100) / 25.0
    curve = resample(torch.sin(times * 2), 25.0, 50.0, 198)
    torch.testing.assert_close(curve, torch.sin(torch.arange(198) / 50.0 * 2), atol=1e-3, rtol=0)
    rotation = random_keypoints(20).at_fps(60.0).rotation
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5, rtol=0)


def test_hold_cuts_and_holds():
    track = torch.arange(3.0)
    assert hold(track, 2).tolist() == [0, 1]
    assert hold(track, 5).tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.0, 7.39, 600.013])
@pytest.mark.parametrize("fps", [23.976, 25.0, 60.0])
def test_frame_count_is_within_half_a_frame(seconds, fps):
    frames = frame_count(seconds, fps)
    assert frames >= 1
    assert frames == 1 or abs(frames / fps - seconds) <= 0.5 / fps + 1e-9


def test_files_come_back(tmp_path):
    keypoints, deformation = random_keypoints(3, fps=30.0), random_deformation().masked("brows")
    keypoints.save(tmp_path / "k.safetensors")
    deformation.save(tmp_path / "d.safetensors")
    again = Keypoints.load(tmp_path / "k.safetensors")
    assert torch.equal(again.posed(), keypoints.posed()) and again.fps == 30.0
    again = Deformation.load(tmp_path / "d.safetensors")
    assert torch.equal(again.offsets, deformation.offsets) and again.regions == ("brows",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "k.safetensors"]


def test_files_of_another_kind_are_named(tmp_path):
    random_keypoints().save(tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match="holds keypoints, expected deformation"):
        Deformation.load(tmp_path / "k.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "k.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        Keypoints.load(tmp_path / "cut.safetensors")


def test_wrong_shapes_and_nan_are_refused():
    with pytest.raises(ValueError, match=r"offsets is \[4, 20, 3\], expected \[4, 21, 3\]"):
        Deformation(torch.zeros(4, 20, 3))
    with pytest.raises(ValueError, match="NaN"):
        Deformation(torch.full((1, 21, 3), float("nan")))
    with pytest.raises(ValueError, match="at least one"):
        Deformation(torch.zeros(0, 21, 3))
    with pytest.raises(ValueError, match="connect at least one"):
        sum_deformations([])
