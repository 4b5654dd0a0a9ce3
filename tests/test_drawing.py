"""Pictures of keypoints and of motion show what they are given, where it is."""

import numpy as np
import pytest
import torch

from pctalk.drawing import COLORS, draw_keypoints, plot_deformation
from pctalk.faces import Crop
from pctalk.keypoints import LIPS, Deformation, Keypoints
from pctalk.render import Portrait


def pixels_of(picture: torch.Tensor, color: tuple[int, int, int]) -> np.ndarray:
    """(x, y) of every pixel of exactly this colour: [n, 2]."""
    ys, xs = np.nonzero((picture.numpy() == color).all(-1))
    return np.stack([xs, ys], axis=1)


def track(points: torch.Tensor) -> Keypoints:
    frames = len(points)
    still = Keypoints(
        canonical=torch.zeros(21, 3),
        rotation=torch.eye(3).expand(frames, 3, 3),
        scale=torch.ones(frames),
        translation=torch.zeros(frames, 3),
        expression=torch.zeros(frames, 21, 3),
    )
    return still.with_posed(points)


def test_keypoints_are_drawn_at_their_places_one_picture_a_frame():
    points = torch.full((3, 21, 3), 5.0)  # outside the crop
    points[:, LIPS[0]] = torch.tensor([[-0.5, 0.25, 0.0], [0.0, 0.0, 0.0], [0.5, -0.5, 0.0]])
    crop = Crop.around((300.0, 200.0), 256.0)
    portrait = Portrait("test", torch.full((1, 400, 600, 3), 100, dtype=torch.uint8), (crop,), {})
    pictures = list(draw_keypoints(portrait, track(points)))
    assert len(pictures) == 3
    for picture, (x, y, _) in zip(pictures, points[:, LIPS[0]].tolist(), strict=True):
        assert picture.shape == (512, 512, 3) and picture.dtype == torch.uint8
        drawn = pixels_of(picture, COLORS["lips"])
        nearest = np.abs(drawn - [(x + 1) * 256, (y + 1) * 256]).max(1).min()
        assert len(drawn) > 40 and nearest <= 1
        assert not len(pixels_of(picture, COLORS["brows"]))


def test_a_video_portrait_lies_under_its_own_frames_and_is_held_at_the_last():
    shades = torch.tensor([40, 80], dtype=torch.uint8)
    frames = shades[:, None, None, None].expand(2, 300, 300, 3)
    crop = Crop.around((150.0, 150.0), 300.0)
    portrait = Portrait("test", frames, (crop, crop), {})
    pictures = list(draw_keypoints(portrait, track(torch.full((3, 21, 3), 5.0))))
    assert [int(picture.float().mean().round()) for picture in pictures] == [20, 40, 40]


@pytest.mark.parametrize("with_sound", [True, False])
def test_curve_peaks_where_the_motion_does(with_sound):
    offsets = torch.zeros(100, 21, 3)
    offsets[:, LIPS, 1] = torch.exp(-((torch.arange(100.0) - 25) ** 2) / 20)[:, None]
    sound = {"waveform": torch.randn(2, 64000), "sample_rate": 16000} if with_sound else {}
    picture = plot_deformation(Deformation(offsets, 25.0, ("lips",)), **sound)
    assert picture.shape == (720, 1280, 3) and picture.dtype == torch.uint8
    curve = pixels_of(picture, COLORS["lips"])
    curve = curve[curve[:, 0] >= 88]  # right of the labels
    peak = curve[curve[:, 1].argmin(), 0]
    assert abs(peak - (88 + (1280 - 24 - 88) * 25.5 / 100)) < 4


@pytest.mark.parametrize("frames", [1, 2, 15000])
def test_any_length_can_be_plotted(frames):
    picture = plot_deformation(Deformation(torch.rand(frames, 21, 3), 25.0), torch.zeros(1, 100), 16000)
    assert len(pixels_of(picture, COLORS["brows"])) > 100


def test_no_motion_is_a_flat_line():
    picture = plot_deformation(Deformation(torch.zeros(50, 21, 3), 25.0))
    curve = pixels_of(picture, COLORS["eyes"])
    curve = curve[curve[:, 0] >= 100]
    assert len(curve) > 1000 and np.ptp(curve[:, 1]) <= 2
