"""The mesh renderer: still where it should be, moving where it should, the same bytes every time."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pctalk.faces import crop_image
from pctalk.keypoints import LIPS, Keypoints, euler_angles, rotation_matrix
from pctalk.render import Portrait
from pctalk.render.basis import Basis
from pctalk.render.mesh import GROUP, MeshRenderer
from pctalk.render.warp import Lattice, pull_back, refine, spline_weights
from pctalk.train.convert_mesh_basis import convert

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


def raised_brows(amount: float) -> dict[tuple[int, int], float]:
    return {(1, 1): amount, (2, 1): -amount}


def at_rest(renderer, keypoints: Keypoints) -> Keypoints:
    """The portrait's lips replaced by neutral ones, as speech replaces them."""
    expression = keypoints.expression.clone()
    expression[:, list(LIPS)] = renderer.basis.neutral_exp[list(LIPS)]
    return replace(keypoints, expression=expression)


def turned(keypoints: Keypoints, yaw: float) -> Keypoints:
    angles = (torch.zeros(1), torch.tensor([yaw]), torch.zeros(1))
    return replace(keypoints, rotation=keypoints.rotation @ rotation_matrix(*angles))


def measured(renderer, frames: torch.Tensor) -> torch.Tensor:
    """Landmarks that the face mesh sees in rendered frames: [b, 468, 3]."""
    return torch.stack([renderer.face_finder.find(frame)[0].landmarks for frame in frames])


def gap(landmarks: torch.Tensor, upper: list[int], lower: list[int]) -> torch.Tensor:
    return (landmarks[:, lower, 1] - landmarks[:, upper, 1]).mean(dim=1)


def lip_gap(landmarks: torch.Tensor) -> torch.Tensor:
    return gap(landmarks, [82, 13, 312], [87, 14, 317])


def eye_gap(landmarks: torch.Tensor) -> torch.Tensor:
    return gap(landmarks, [160, 159, 158, 385, 386, 387], [144, 145, 153, 380, 374, 373])


def test_the_keypoints_of_a_portrait_are_realistic(renderer, extracted):
    portrait, keypoints = extracted
    assert keypoints.frames == 1 and portrait.renderer == renderer.name
    assert 1.1 < float(keypoints.scale) < 1.7
    assert keypoints.translation.abs().max() < 0.27 and keypoints.translation[0, 2] == 0
    assert max(float(angle.abs()) for angle in euler_angles(keypoints.rotation)) < 15
    assert keypoints.expression.abs().max() < 0.15
    posed = keypoints.posed()[0] * 256 + 256  # crop pixels
    landmarks = portrait.features["landmarks"][0]
    lips, eyes = landmarks[[13, 14], 1].mean(), landmarks[[159, 145, 386, 374], 1].mean()
    assert (posed[[17, 19, 20], 1].mean() - posed[[11, 15], 1].mean() - (lips - eyes)).abs() < 0.35 * (lips - eyes)


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


def test_lips_open_as_far_as_they_are_told(renderer, extracted):
    portrait, keypoints = extracted
    amounts = [0.0, 0.015, 0.03, 0.05, 0.08]
    track = moved(at_rest(renderer, keypoints), *(opened(amount) for amount in amounts))
    gaps = lip_gap(measured(renderer, drawn(renderer, portrait, track, paste_back=False)))
    assert (gaps.diff() > 0.0).all() and gaps[-1] > gaps[0] + 10.0, gaps


def test_a_smiling_portrait_closes_its_mouth_at_rest(renderer, extracted):
    portrait, keypoints = extracted
    frames = drawn(renderer, portrait, at_rest(renderer, keypoints), paste_back=False)
    source = crop_image(portrait.frames[0], portrait.crops[0])
    gaps = lip_gap(measured(renderer, torch.stack([source, frames[0]])))
    assert gaps[1] < 0.5 * gaps[0], gaps


def test_eyes_close(renderer, extracted):
    portrait, keypoints = extracted
    track = moved(keypoints, {}, shut(0.008), shut(0.02))
    landmarks = measured(renderer, drawn(renderer, portrait, track, paste_back=False))
    gaps = eye_gap(landmarks)
    # The face mesh itself follows a blink by a fraction only; the next test looks at the pixels.
    assert gaps[0] > gaps[1] + 0.5 > gaps[2] + 1.0, gaps


def test_brows_rise_and_fall(renderer, extracted):
    portrait, keypoints = extracted
    frames = drawn(renderer, portrait, moved(keypoints, {}, raised_brows(0.02), raised_brows(-0.02)), paste_back=False).float()
    x, y = portrait.features["landmarks"][0][52, :2].int().tolist()
    # The left brow is the darkest row between the hair and the lid.
    rows = frames[:, y - 8 : y + 12, x - 4 : x + 5].mean(dim=(2, 3)).argmin(dim=1)
    assert rows[1] < rows[0] - 3 and rows[2] > rows[0] + 3, rows


def test_a_closed_eye_shows_skin_not_iris(renderer, extracted):
    portrait, keypoints = extracted
    frames = drawn(renderer, portrait, moved(keypoints, {}, shut(0.02)), paste_back=False).float()
    landmarks = portrait.features["landmarks"][0]
    for upper, lower, corners in ((159, 145, (33, 133)), (386, 374, (362, 263))):
        x, y = landmarks[upper, :2].lerp(landmarks[lower, :2], 0.3).int().tolist()
        before, after = (frame[y - 2 : y + 3, x - 3 : x + 4].mean() for frame in frames)
        assert after > before + 25, (before, after)  # lid where there was iris
        left, right = landmarks[list(corners), 0].int().tolist()
        before, after = (frame[y - 2 : y + 9, left + 6 : right - 6].std() for frame in frames)
        assert after < 0.75 * before, (before, after)  # no white beside dark any more


@pytest.mark.parametrize("yaw", [-10.0, 10.0])
def test_the_head_turns_the_way_it_is_told(renderer, extracted, yaw):
    portrait, keypoints = extracted
    frames = drawn(renderer, portrait, turned(keypoints, yaw), paste_back=False)
    _, seen = renderer.extract(frames.float() / 255.0)
    change = float(euler_angles(seen.rotation)[1] - euler_angles(keypoints.rotation)[1])
    assert 0.4 < change / yaw < 1.5, change


@pytest.mark.parametrize("turn", [0.0, 12.0])
@pytest.mark.parametrize("paste_back", [False, True])
def test_nothing_moves_far_from_the_face(renderer, extracted, paste_back, turn):
    portrait, keypoints = extracted
    keypoints = turned(keypoints, turn) if turn else keypoints
    track = moved(keypoints, {**opened(0.08), **shut(0.02), **raised_brows(0.02)})
    frames = drawn(renderer, portrait, track, paste_back=paste_back)
    crop = portrait.crops[0]
    source = portrait.frames[0] if paste_back else crop_image(portrait.frames[0], crop)
    changed = (frames[0] != source).any(dim=-1)
    y, x = torch.nonzero(changed).unbind(dim=1)
    positions = torch.stack([x, y], dim=1) + 0.5
    positions = crop.apply(positions) if paste_back else positions
    landmarks = portrait.features["landmarks"][0][:, :2]
    assert changed.float().mean() > 0.02
    if turn:  # hair and neck follow the head, the crop's border stays
        assert positions.min() > 2 and positions.max() < crop.size - 2
    else:
        unit = 256 * 0.272 * float(keypoints.scale)  # inter-ocular distance in crop pixels
        assert (positions >= landmarks.amin(dim=0) - 0.45 * unit).all()
        assert (positions <= landmarks.amax(dim=0) + 0.65 * unit).all()


def test_a_still_serves_a_track_and_frames_serve_theirs(renderer, extracted, picture):
    portrait, keypoints = extracted
    darker = torch.cat([picture, picture * 0.8, picture * 0.6])
    video, track = renderer.extract(darker)
    assert track.frames == 3 and len(video.crops) == 3
    frames = drawn(renderer, video, track)
    assert (frames.int() - video.frames.int()).abs().max() <= 1
    held = drawn(renderer, video, track.extended(5))
    assert torch.equal(held[:3], frames) and torch.equal(held[3], held[4])
    assert (held[4].int() - video.frames[2].int()).abs().max() <= 1
    assert torch.equal(*drawn(renderer, portrait, keypoints.extended(2)))


def test_landmarks_found_elsewhere_are_used(renderer, extracted, picture):
    portrait, _ = extracted
    flat = renderer.face_finder.find(portrait.frames[0])[0].landmarks[:, :2]
    given, keypoints = renderer.extract(picture, landmarks=[flat])
    own = portrait.features["landmarks"][0]
    assert (given.features["landmarks"][0, :, :2] - own[:, :2]).abs().max() < 1.0
    assert float(torch.corrcoef(torch.stack([given.features["landmarks"][0, :, 2], own[:, 2]]))[0, 1]) > 0.9
    assert len(drawn(renderer, given, keypoints)) == 1


def test_a_basis_file_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="install PC-Talk again"):
        Basis.from_assets(tmp_path / "missing.safetensors")
    (tmp_path / "wrong.safetensors").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="install PC-Talk again"):
        Basis.from_assets(tmp_path / "wrong.safetensors")


def test_the_inverse_of_a_warp_undoes_it():
    lattice = Lattice.covering(torch.tensor([0.0, 0.0]), torch.tensor([96.0, 96.0]), 4.0)
    nodes = lattice.nodes().float()
    bump = 9.0 * torch.exp(-((nodes - 48.0) ** 2).sum(dim=-1) / 500.0)
    field = torch.stack([0.4 * bump, bump])[None]
    targets = nodes[4:-4, 4:-4]
    origin = targets + pull_back(field, lattice, targets)
    moved = origin + torch.nn.functional.grid_sample(field, lattice.normalise(origin), align_corners=True).permute(0, 2, 3, 1)
    assert (moved - targets).abs().max() < 0.05


def test_a_spline_passes_through_its_points():
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 100
    values = points @ torch.tensor([[0.2, -0.1], [0.3, 0.4]], dtype=torch.float64) + 1.0
    assert torch.allclose(spline_weights(points, points + 5.0) @ values, (points + 5.0) @ torch.tensor(
        [[0.2, -0.1], [0.3, 0.4]], dtype=torch.float64) + 1.0, atol=1e-3)
    bent = torch.sin(points / 30.0)
    assert (spline_weights(points, points) @ bent - bent).abs().max() < 0.02


def test_refining_keeps_the_pixels():
    image = torch.rand(3, 7, 9)
    fine = refine(image)
    assert fine.shape == (3, 13, 17) and torch.equal(fine[:, ::2, ::2], image)


@pytest.mark.parametrize("change", ["tilted", "cut", "small", "grey"])
def test_unusual_portraits_are_drawn_exactly(renderer, change):
    source = Image.open(PORTRAIT).convert("RGB")
    source = {
        "tilted": lambda: source.rotate(35, Image.Resampling.BICUBIC, expand=True),
        "cut": lambda: source.crop((0, 0, 175, 320)),
        "small": lambda: source.resize((128, 128), Image.Resampling.LANCZOS),
        "grey": lambda: source.convert("L").convert("RGB"),
    }[change]()
    portrait, keypoints = renderer.extract(torch.from_numpy(np.asarray(source).copy())[None].float() / 255.0)
    still, talking = drawn(renderer, portrait, moved(keypoints, {}, {**opened(0.05), **shut(0.02)}))
    assert (still.int() - portrait.frames[0].int()).abs().max() <= 1
    assert (talking != still).any(dim=-1).sum() > 200


def test_the_mouth_goes_along_with_the_head(renderer, extracted):
    portrait, keypoints = extracted
    far = replace(keypoints, translation=keypoints.translation + torch.tensor([[0.2, 0.0, 0.0]]))
    track = moved(far, {**opened(0.06)})
    here, there = (drawn(renderer, portrait, keys, paste_back=False)[0] for keys in (moved(keypoints, {**opened(0.06)}), track))
    shift = 0.6 * 0.3 + 0.4 * 0.3 * np.tanh((0.2 - 0.6 * 0.3) / (0.4 * 0.3))  # the soft limit of MAX_SHIFT
    pixels = round(shift * 256)
    x, y = portrait.features["landmarks"][0][[13, 14], :2].mean(dim=0).int().tolist()
    mouth = here[y - 25 : y + 55, x - 60 : x + 60].float()
    moved_mouth = there[y - 25 : y + 55, x - 60 + pixels : x + 60 + pixels].float()
    assert (mouth - moved_mouth).abs().mean() < 4.0


def test_both_eyes_close_on_a_turned_head(renderer, extracted):
    portrait, keypoints = extracted
    aside = turned(replace(keypoints, translation=keypoints.translation + torch.tensor([[0.1, 0.0, 0.0]])), 8.0)
    awake, asleep = drawn(renderer, portrait, moved(aside, {}, shut(0.02)), paste_back=False).float()
    seen = measured(renderer, awake[None].byte())[0]
    for lids in ([159, 145], [386, 374]):
        x, y = seen[lids, :2].mean(dim=0).int().tolist()
        assert (awake - asleep)[y - 6 : y + 6, x - 8 : x + 8].abs().mean() > 15


def test_landmarks_that_are_no_face_are_refused(renderer, picture):
    with pytest.raises(ValueError, match="in their order"):
        renderer.extract(picture, landmarks=[torch.full((468, 2), 100.0)])


@pytest.mark.parametrize("offset", [200.0, 5000.0])
def test_a_face_outside_the_picture_does_no_harm(renderer, extracted, picture, offset):
    portrait, _ = extracted
    elsewhere = renderer.face_finder.find(portrait.frames[0])[0].landmarks[:, :2] + offset
    given, keypoints = renderer.extract(picture, landmarks=[elsewhere])
    frames = drawn(renderer, given, moved(keypoints, {}, {**opened(0.05), **shut(0.02)}))
    assert torch.equal(frames[:, :100, :100], given.frames[:, :100, :100].expand(2, -1, -1, -1))


def test_eyes_look_aside(renderer, extracted):
    portrait, keypoints = extracted
    track = moved(keypoints, *({(11, 0): x, (15, 0): x} for x in (-0.01, 0.01)))
    frames = drawn(renderer, portrait, track, paste_back=False)
    landmarks = portrait.features["landmarks"][0]
    for corners, lids in (((33, 133), (159, 145)), ((362, 263), (386, 374))):
        left, right = landmarks[list(corners), 0].int().tolist()
        y = int(landmarks[list(lids), 1].mean())
        dark = 255.0 - frames[:, y - 4 : y + 4, left + 5 : right - 5].float().mean(dim=(1, 3))
        iris = (dark**4 * torch.arange(dark.shape[1])).sum(dim=1) / (dark**4).sum(dim=1)
        assert iris[1] > iris[0] + 3, iris


def test_the_converter_makes_what_the_renderer_reads(tmp_path):
    source = Basis.from_assets()
    arrays = {field.name: getattr(source, field.name).numpy() for field in fields(source) if field.name != "canonical"}
    np.savez(tmp_path / "basis.npz", **arrays, units=np.array("text that is left out"))
    keypoints = source.canonical.numpy()[None]
    np.savez(tmp_path / "motion.npz", **{"a/kp": keypoints - 0.1, "b/kp": keypoints + 0.1, "b/exp": keypoints})
    made = Basis(**convert(tmp_path / "basis.npz", tmp_path / "motion.npz"))
    for field in fields(source):
        assert torch.allclose(getattr(made, field.name), getattr(source, field.name)), field.name
