"""The mesh renderer: still where it should be, moving where it should, the same bytes every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pctalk.faces import FaceFinder, crop_image
from pctalk.keypoints import LIPS, Keypoints
from pctalk.render import Portrait
from pctalk.render.mesh import GROUP, MeshRenderer

PORTRAIT = Path(__file__).parents[1] / "web" / "examples" / "portrait.jpg"


@pytest.fixture(scope="module")
def renderer() -> MeshRenderer:
    return MeshRenderer.from_assets()


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(PORTRAIT).convert("RGB")).copy())[None].float() / 255.0


@pytest.fixture(scope="module")
def extracted(renderer, picture) -> tuple[Portrait, Keypoints]:
    return renderer.extract(picture)


def moved(keypoints: Keypoints, *offsets: dict[tuple[int, int], float]) -> Keypoints:
    """One frame for every set of {(keypoint, axis): offset} in expression space."""
    track = keypoints.extended(len(offsets))
    expression = track.expression.clone()
    for frame, coordinates in enumerate(offsets):
        for (keypoint, axis), value in coordinates.items():
            expression[frame, keypoint, axis] += value
    return replace(track, expression=expression)


def drawn(renderer, portrait, keypoints, **options) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in renderer.render(portrait, keypoints, **options)])


def opened(amount: float) -> dict[tuple[int, int], float]:
    return {(19, 1): amount, (19, 2): 0.1 * amount, (17, 1): -0.1 * amount}


def shut(amount: float) -> dict[tuple[int, int], float]:
    return {(11, 1): amount, (15, 1): amount, (13, 1): -0.3 * amount, (16, 1): -0.3 * amount}


@pytest.mark.parametrize("paste_back", [False, True])
def test_without_motion_the_source_comes_back(renderer, extracted, paste_back):
    portrait, keypoints = extracted
    frame = drawn(renderer, portrait, keypoints, paste_back=paste_back)[0].int()
    source = portrait.frames[0] if paste_back else crop_image(portrait.frames[0], portrait.crops[0])
    assert frame.shape == source.shape
    assert (frame - source.int()).abs().max() <= 1


def test_bytes_do_not_depend_on_batch_or_run(renderer, extracted):
    portrait, keypoints = extracted
    track = moved(keypoints, *({**opened(0.006 * i), **shut(0.002 * i)} for i in range(GROUP + 3)))
    whole = drawn(renderer, portrait, track)
    assert torch.equal(whole, drawn(renderer, portrait, track))
    assert torch.equal(whole, drawn(renderer, portrait, track, batch=3))
    assert [len(chunk.frames) for chunk in renderer.render(portrait, track, batch=4)] == [4, 4, 3]
    alone = replace(track.extended(1), expression=track.expression[5:6])
    assert torch.equal(whole[5:6], drawn(renderer, portrait, alone))


def test_a_portrait_of_another_renderer_is_refused(renderer, extracted):
    portrait, keypoints = extracted
    with pytest.raises(ValueError, match="liveportrait"):
        next(renderer.render(replace(portrait, renderer="liveportrait"), keypoints))


def test_a_picture_without_a_face_is_refused(renderer):
    with pytest.raises(ValueError, match="No face found"):
        renderer.extract(torch.full((1, 128, 128, 3), 0.5))


def test_huge_deformations_stay_pictures(renderer, extracted):
    portrait, keypoints = extracted
    generator = torch.Generator().manual_seed(0)
    track = keypoints.extended(4)
    track = replace(track, expression=track.expression + torch.randn(4, 21, 3, generator=generator))
    frames = drawn(renderer, portrait, track)
    assert frames.shape[0] == 4
    assert torch.equal(frames[:, :8], portrait.frames[:, :8].expand(4, -1, -1, -1))
