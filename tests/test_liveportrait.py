"""The LivePortrait networks, plain against inference forms, and the renderer that runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pctalk.cli import main
from pctalk.evaluate import bench_liveportrait
from pctalk.evaluate.bench_liveportrait import Networks
from pctalk.faces import FaceFinder, paste_back, paste_mask
from pctalk.keypoints import Deformation, Keypoints, add_deformations, rotation_matrix
from pctalk.media import read_image
from pctalk.networks.liveportrait import blocks, inference, winograd
from pctalk.networks.liveportrait.appearance import AppearanceFeatureExtractor
from pctalk.networks.liveportrait.generator import SpadeGenerator
from pctalk.networks.liveportrait.inference import UpsampledConv
from pctalk.networks.liveportrait.motion import MotionExtractor
from pctalk.networks.liveportrait.retargeting import StitchingRetargeting
from pctalk.networks.liveportrait.warping import WarpingModule, gaussian_heatmaps
from pctalk.render import Portrait
from pctalk.render.liveportrait import LivePortraitRenderer, chosen_dtype

PUBLISHED = json.loads((Path(__file__).parent / "golden" / "state_dict_shapes.json").read_text())


def seasoned(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with statistics, gains and shifts that are not the identity, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point() and "weight_" not in name and (value.dim() < 2 or "grn" in name):
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
    return network.eval().requires_grad_(False)


def built(network: type[nn.Module], **widths) -> nn.Module:
    """The same random network every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return seasoned(network(**widths))


def narrow_appearance() -> AppearanceFeatureExtractor:
    return built(AppearanceFeatureExtractor, width=8, channels=6, depth=4, blocks=2)


def narrow_motion() -> MotionExtractor:
    return built(MotionExtractor, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))


def narrow_warping() -> WarpingModule:
    return built(WarpingModule, channels=6, depth=4, compressed=2, expansion=8, blocks=3, widest=32, outputs=16)


def narrow_generator() -> SpadeGenerator:
    return built(SpadeGenerator, inputs=16, width=24, narrow=(16, 8), hidden=8)


def write_narrow(folder: Path, layout: str = "flat") -> Path:
    """Random narrow networks as LivePortrait's files: `flat` .safetensors, or the `original` .pth in two folders."""
    networks = {
        "appearance_feature_extractor": narrow_appearance(),
        "motion_extractor": narrow_motion(),
        "warping_module": narrow_warping(),
        "spade_generator": narrow_generator(),
        "stitching_retargeting_module": built(StitchingRetargeting),
    }
    for name, network in networks.items():
        tensors = network.state_dict()
        if layout == "flat":
            file = folder / f"{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in tensors.items()}, file)
            continue
        file = folder / "base_models" / f"{name}.pth"
        if name == "stitching_retargeting_module":
            file = folder / "retargeting_models" / file.name
            parts = ("retarget_shoulder", "retarget_mouth", "retarget_eye")
            tensors = {part: _within(tensors, f"{part}_module.") for part in parts}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
    return folder


def _within(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those below a prefix, under the one that the original files have instead."""
    return {f"module.{key.removeprefix(prefix)}": value for key, value in tensors.items() if key.startswith(prefix)}


def keypoints(batch: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(batch, 21, 3, generator=generator) * 0.4
    return source, source + torch.randn(batch, 21, 3, generator=generator) * 0.1


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference in standard deviations of the reference."""
    return float((ours.float() - reference).abs().max() / reference.std())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("published", "network"),
    [
        ("appearance_feature_extractor", AppearanceFeatureExtractor),
        ("motion_extractor", MotionExtractor),
        ("warping_module", WarpingModule),
        ("spade_generator", SpadeGenerator),
    ],
)
def test_published_keys_and_shapes(published, network):
    with torch.device("meta"):
        state = network().state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == PUBLISHED[published]


def test_published_keys_and_shapes_of_stitching():
    networks = StitchingRetargeting()
    for prefix, published in (("shoulder", "stitching"), ("mouth", "lip_retargeting"), ("eye", "eye_retargeting")):
        state = networks.get_submodule(f"retarget_{prefix}_module").state_dict()
        assert {name: list(value.shape) for name, value in state.items()} == PUBLISHED[published]


def test_gather_samples_like_grid_sample():
    volume = torch.randn(2, 3, 4, 8, 6)
    grid = torch.rand(2, 5, 7, 9, 3) * 3.0 - 1.5  # a third of it outside
    expected = F.grid_sample(volume, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(blocks._gather_volume(volume, grid), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(blocks.sample_volume(volume, grid), expected)


def test_positions_are_resolved_in_single_precision():
    volume = torch.randn(1, 3, 4, 8, 8)
    grid = torch.rand(1, 4, 8, 8, 3) * 2.0 - 1.0
    half = blocks.sample_volume(volume.bfloat16(), grid)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, blocks.sample_volume(volume.bfloat16().float(), grid).bfloat16())


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("dims", [2, 3])
def test_convolution_of_an_upsampled_map(dims, factor):
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2](3, 6, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 3, *(4,) * (dims - 2), 6, 7)
    expected = conv(F.interpolate(x, scale_factor=(*(1,) * (dims - 2), factor, factor), mode="nearest")).relu()
    for parts in (1, 2):
        ours = torch.cat(UpsampledConv(conv, factor, parts)(x).unbind(0), dim=1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (64, 60)])
@pytest.mark.parametrize("dims", [2, 3])
def test_winograd_convolution(dims, size):
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2](40, 24, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 40, *(3,) * (dims - 2), *size)
    expected = conv.double()(x.double())
    plain, ours = conv.float()(x), winograd.WinogradConv(conv)(x)
    assert difference(ours, expected) < max(4.0 * difference(plain, expected), 1e-5)


def test_winograd_takes_what_gains_by_it():
    wide, narrow, single = nn.Conv2d(512, 512, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(512, 512, 1)
    assert isinstance(winograd.quicker(wide), winograd.WinogradConv)
    assert winograd.quicker(narrow) is narrow and winograd.quicker(single) is single


def test_heatmaps_as_products():
    source, _ = keypoints(2)
    size = (4, 16, 16)
    grid = blocks.identity_grid(*size, device=source.device)
    heat = inference.separable_heatmaps(source, size)
    torch.testing.assert_close(heat, gaussian_heatmaps(grid, source), rtol=1e-5, atol=1e-7)
    tiny = torch.finfo(torch.float32).tiny
    assert not ((heat > 0) & (heat < tiny)).any()


def test_shifted_copies_are_samples_of_a_shifted_grid():
    volume = torch.randn(2, 3, 4, 8, 8)
    shift = torch.randn(2, 5, 3)
    grid = blocks.identity_grid(4, 8, 8, device=volume.device)
    moved = inference.shifted_copies(volume, shift)
    for number in range(5):
        expected = blocks.sample_volume(volume, grid + shift[:, number, None, None, None])
        torch.testing.assert_close(moved[:, number], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("normalised", [inference._normalised_one_by_one, inference._normalised_together])
def test_instance_normalisation_of_any_device(normalised):
    x = 3.0 + 2.0 * torch.randn(2, 5, 8, 8).contiguous(memory_format=torch.channels_last)
    ours = normalised(x)
    torch.testing.assert_close(ours, F.instance_norm(x), rtol=0, atol=5e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_appearance_inference_form():
    network, image = narrow_appearance(), torch.rand(2, 3, 64, 64)
    volume = network(image)
    assert volume.shape == (2, 6, 4, 16, 16)
    assert difference(inference.fused_appearance(network)(image), volume) < 1e-5


def test_motion_inference_form():
    network, image = narrow_motion(), torch.rand(2, 3, 64, 64)
    motion = network(image)
    assert [tuple(value.shape) for value in motion] == [(2, 21, 3), (2,), (2,), (2,), (2, 3), (2, 21, 3), (2,)]
    fused = inference.fused_motion(network)(image)
    for ours, expected in zip(fused, motion, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(params=[False, True], ids=["direct", "winograd"])
def by_winograd(request, monkeypatch) -> bool:
    """Whether inference forms are to use it; narrow networks then do so in every place that wide ones may."""
    monkeypatch.setattr(winograd, "WORTHWHILE", 0.0)
    return request.param


def test_warping_inference_form(by_winograd):
    network, volume = narrow_warping(), torch.randn(2, 6, 4, 16, 16)
    source, driving = keypoints(2)
    plain = network(volume, source, driving)
    fused = inference.fused_warping(network, winograd=by_winograd)(volume, source, driving)
    assert plain.feature.shape == (2, 16, 16, 16) and plain.deformation.shape == (2, 4, 16, 16, 3)
    for ours, expected in zip(fused, plain, strict=True):
        assert difference(ours, expected) < 5e-5


def test_one_volume_serves_every_frame():
    network, volume = inference.fused_warping(narrow_warping()), torch.randn(1, 6, 4, 16, 16)
    source, driving = keypoints(3)
    together = network(volume, source[:1], driving)
    repeated = network(volume.repeat(3, 1, 1, 1, 1), source[:1].repeat(3, 1, 1), driving)
    for ours, expected in zip(together, repeated, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_standing_still_leaves_the_grid():
    network, volume = narrow_warping(), torch.randn(1, 6, 4, 16, 16)
    source, _ = keypoints(1)
    deformation = inference.fused_warping(network)(volume, source, source).deformation
    torch.testing.assert_close(deformation[0], blocks.identity_grid(4, 16, 16, device=volume.device))


def test_generator_inference_form(by_winograd):
    network, feature = narrow_generator(), torch.randn(2, 16, 16, 16)
    picture = network(feature)
    assert picture.shape == (2, 3, 128, 128)
    assert picture.min() >= 0.0 and picture.max() <= 1.0
    assert difference(inference.fused_generator(network, winograd=by_winograd)(feature), picture) < 2e-4


def test_inference_forms_leave_the_network_alone():
    for network, fuse in (
        (narrow_appearance(), inference.fused_appearance),
        (narrow_warping(), inference.fused_warping),
        (narrow_generator(), inference.fused_generator),
    ):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with torch.no_grad():
            for parameter in fuse(network).parameters():
                parameter.zero_()
        after = network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_half_precision():
    volume, (source, driving) = torch.randn(1, 6, 4, 16, 16), keypoints(2)
    warping, generator = inference.fused_warping(narrow_warping()), inference.fused_generator(narrow_generator())
    picture = generator(warping(volume, source[:1], driving).feature)
    warping, generator = warping.bfloat16(), generator.bfloat16()
    for given in (volume, volume.bfloat16()):  # F may stay in float32
        half = generator(warping(given, source[:1], driving).feature)
        assert half.dtype == torch.bfloat16
        error = (half.float() - picture).square().mean()
        assert -10.0 * torch.log10(error) > 30.0  # dB


def test_stitching_moves_the_whole_face_in_the_plane_only():
    network = StitchingRetargeting().requires_grad_(False)
    source, driving = keypoints(2)
    last = network.retarget_shoulder_module.mlp[-1]
    last.weight.zero_()
    last.bias.copy_(torch.cat([torch.zeros(63), torch.tensor([0.1, -0.2])]))
    expected = driving + torch.tensor([0.1, -0.2, 0.0])
    torch.testing.assert_close(network.stitch(source, driving), expected)


# The renderer, with narrow random networks on a real photograph


@pytest.fixture(scope="module")
def portrait_image() -> torch.Tensor:
    return read_image(Path(__file__).parents[1] / "web" / "examples" / "portrait.jpg")


@pytest.fixture(scope="module")
def renderer() -> LivePortraitRenderer:
    return LivePortraitRenderer(
        FaceFinder.from_assets(),
        narrow_appearance(),
        narrow_motion(),
        narrow_warping(),
        narrow_generator(),
        built(StitchingRetargeting),
    )


@pytest.fixture(scope="module")
def extracted(renderer, portrait_image) -> tuple[Portrait, Keypoints]:
    return renderer.extract(portrait_image)


def moving(keypoints: Keypoints, frames: int) -> Keypoints:
    """The keypoints, swaying a little for some frames."""
    sway = torch.linspace(0.0, 0.3, frames)[:, None, None] * torch.randn(21, 3, generator=torch.Generator().manual_seed(2))
    return add_deformations(keypoints, [Deformation(sway)])


def test_extract_reads_what_the_networks_see(renderer, portrait_image, extracted):
    portrait, keypoints = extracted
    assert portrait.renderer == "liveportrait" and len(portrait.crops) == 1
    picture = portrait.features["pictures"]
    assert picture.shape == (1, 256, 256, 3) and picture.dtype == torch.uint8
    motion = renderer.motion(picture.permute(0, 3, 1, 2) / 255.0)
    rotation = rotation_matrix(motion.pitch, motion.yaw, motion.roll)
    expected = motion.scale[:, None, None] * (motion.canonical @ rotation + motion.expression)
    expected[..., :2] += motion.translation[:, None, :2]
    torch.testing.assert_close(keypoints.posed(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(portrait.features["keypoints"], keypoints.posed())


def test_extract_keeps_each_video_frame_exact(renderer, portrait_image):
    video = torch.cat([portrait_image, portrait_image.flip(2)])
    face = renderer.face_finder.find((portrait_image[0] * 255).byte())[0].landmarks[:, :2]
    mirrored = face * torch.tensor([-1.0, 1.0]) + torch.tensor([float(video.shape[2]), 0.0])
    portrait, keypoints = renderer.extract(video, landmarks=[face, mirrored])
    assert keypoints.frames == 2 and len(portrait.crops) == 2
    read = renderer.motion(portrait.features["pictures"].permute(0, 3, 1, 2) / 255.0)
    rotation = rotation_matrix(read.pitch, read.yaw, read.roll)
    expected = read.scale[:, None, None] * (read.canonical @ rotation + read.expression)
    expected[..., :2] += read.translation[:, None, :2]
    torch.testing.assert_close(keypoints.posed(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stitching", [False, True])
def test_render_is_the_plain_chain(renderer, extracted, stitching):
    portrait, keypoints = extracted
    driven = moving(keypoints, 2)
    source, driving = keypoints.posed(), driven.posed()
    if stitching:
        driving = built(StitchingRetargeting).stitch(source.expand_as(driving), driving)
    volume = narrow_appearance()(portrait.features["pictures"].permute(0, 3, 1, 2) / 255.0)
    feature = narrow_warping()(volume.expand(2, -1, -1, -1, -1), source.expand(2, -1, -1), driving).feature
    expected = narrow_generator()(feature).mul(255.0).permute(0, 2, 3, 1)
    chunks = list(renderer.render(portrait, driven, paste_back=False, stitching=stitching, batch=2))
    assert [tuple(chunk.frames.shape) for chunk in chunks] == [(2, 512, 512, 3)]
    assert chunks[0].frames.dtype == torch.uint8 and chunks[0].mask.shape == (2, 512, 512)
    assert (chunks[0].frames.float() - expected).abs().max() < 0.6  # half for rounding
    assert (chunks[0].frames[0].float() - chunks[0].frames[1].float()).abs().max() > 1.0


def test_chunks_hold_every_frame_in_order(renderer, extracted):
    portrait, keypoints = extracted
    driven = moving(keypoints, 3)
    single = torch.cat([chunk.frames for chunk in renderer.render(portrait, driven, paste_back=False, batch=1)])
    chunks = list(renderer.render(portrait, driven, paste_back=False, batch=2))
    assert [len(chunk.frames) for chunk in chunks] == [2, 1]
    together = torch.cat([chunk.frames for chunk in chunks])
    assert (together.int() - single.int()).abs().max() <= 1
    again = torch.cat([chunk.frames for chunk in renderer.render(portrait, driven, paste_back=False, batch=2)])
    assert torch.equal(again, together)


def test_pasted_back_only_the_crop_changes(renderer, extracted):
    portrait, keypoints = extracted
    (chunk,) = renderer.render(portrait, keypoints)
    source = portrait.frames[0]
    assert chunk.frames.shape == (1, *source.shape)
    mask = paste_mask(portrait.crops[0], *source.shape[:2])
    torch.testing.assert_close(chunk.mask[0], mask)
    assert torch.equal(chunk.frames[0][mask == 0], source[mask == 0])
    (crop,) = renderer.render(portrait, keypoints, paste_back=False)
    assert torch.equal(chunk.frames, paste_back(crop.frames, source, portrait.crops[0]))


def test_every_video_frame_is_its_own_source(renderer, portrait_image):
    darker = portrait_image * 0.5
    face = renderer.face_finder.find((portrait_image[0] * 255).byte())[0].landmarks[:, :2]
    portrait, keypoints = renderer.extract(torch.cat([portrait_image, darker]), landmarks=[face])
    chunks = list(renderer.render(portrait, moving(keypoints, 4), batch=3))
    frames, masks = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    outside = masks[0] == 0
    assert torch.equal(frames[0][outside], portrait.frames[0][outside])
    for held in (1, 2, 3):
        assert torch.equal(frames[held][outside], portrait.frames[1][outside])
    stills = [renderer.extract(image[None], landmarks=[face])[0] for image in (portrait_image[0], darker[0])]
    driven = moving(keypoints, 4)
    for frame, still in ((0, stills[0]), (3, stills[1])):
        own = replace(still, features={**still.features, "keypoints": portrait.features["keypoints"][min(frame, 1)][None]})
        (expected,) = renderer.render(own, replace_frame(driven, frame))
        assert (frames[frame].int() - expected.frames[0].int()).abs().max() <= 1


def replace_frame(track: Keypoints, frame: int) -> Keypoints:
    """One frame of a track as a still."""
    fields = ("rotation", "scale", "translation", "expression")
    return replace(track, **{name: getattr(track, name)[frame][None] for name in fields})


def test_a_still_is_looked_at_once(renderer, extracted):
    calls = []
    hook = renderer.appearance.register_forward_hook(lambda *_: calls.append(1))
    try:
        list(renderer.render(extracted[0], moving(extracted[1], 3), paste_back=False, batch=1))
    finally:
        hook.remove()
    assert len(calls) == 1


def test_precision_of_each_network(extracted):
    networks = narrow_appearance(), narrow_motion(), narrow_warping(), narrow_generator(), built(StitchingRetargeting)
    halved = LivePortraitRenderer(FaceFinder.from_assets(), *networks, dtype=torch.bfloat16)
    precisions = {name: next(network.parameters()).dtype for name, network in halved.networks.items()}
    low = {name for name, dtype in precisions.items() if dtype == torch.bfloat16}
    assert low == {"warping", "generator"} and set(precisions.values()) == {torch.float32, torch.bfloat16}
    (chunk,) = halved.render(*extracted, paste_back=False)
    whole = LivePortraitRenderer(FaceFinder.from_assets(), *networks, device="cuda")  # other forms, which run anywhere
    (expected,) = whole.render(*extracted, paste_back=False)
    error = (chunk.frames.float() - expected.frames.float()).square().mean()
    assert 10.0 * torch.log10(255.0**2 / error) > 30.0  # dB


def test_batches_shrink_when_memory_runs_out(renderer, extracted, monkeypatch, caplog):
    portrait, driven = extracted[0], moving(extracted[1], 5)
    expected = torch.cat([chunk.frames for chunk in renderer.render(portrait, driven, paste_back=False, batch=2)])
    forward = type(renderer.generator).forward

    def limited(self, feature):
        if len(feature) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(self, feature)

    monkeypatch.setattr(type(renderer.generator), "forward", limited)
    chunks = list(renderer.render(portrait, driven, paste_back=False, batch=5))
    assert [len(chunk.frames) for chunk in chunks] == [2, 2, 1]
    assert "2 frames at a time" in caplog.text
    assert (torch.cat([chunk.frames for chunk in chunks]).int() - expected.int()).abs().max() <= 1


def test_no_memory_for_one_frame_is_said(renderer, extracted, monkeypatch):
    def never(self, feature):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(type(renderer.generator), "forward", never)
    with pytest.raises(MemoryError, match="single frame"):
        list(renderer.render(*extracted, batch=4))


def test_other_errors_are_not_swallowed(renderer, extracted, monkeypatch):
    def broken(self, feature):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(type(renderer.generator), "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(renderer.render(*extracted))


def test_another_renderers_portrait_is_refused(renderer, extracted):
    with pytest.raises(ValueError, match="'mesh' renderer"):
        next(renderer.render(replace(extracted[0], renderer="mesh"), extracted[1]))


def test_landmarks_of_other_pictures_are_refused(renderer, portrait_image):
    with pytest.raises(ValueError, match="landmarks for 3 frames and 1 pictures"):
        renderer.extract(portrait_image, landmarks=[torch.rand(468, 2)] * 3)


@pytest.mark.parametrize("layout", ["flat", "original"])
def test_files_in_a_folder_draw_like_their_networks(renderer, extracted, tmp_path, layout):
    loaded = LivePortraitRenderer.from_folder(write_narrow(tmp_path, layout))
    assert {name: next(network.parameters()).dtype for name, network in loaded.networks.items()} == dict.fromkeys(
        renderer.networks, torch.float32
    )
    (ours,), (expected) = loaded.render(*extracted, paste_back=False), list(renderer.render(*extracted, paste_back=False))
    assert torch.equal(ours.frames, expected[0].frames)


def test_missing_files_are_listed_with_where_to_get_them(tmp_path):
    write_narrow(tmp_path)
    for name in ("motion_extractor", "spade_generator"):
        (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as refused:
        LivePortraitRenderer.from_folder(tmp_path)
    sentence = str(refused.value)
    assert sentence.startswith(f"{tmp_path} lacks ") and sentence.endswith(".")
    assert "motion_extractor" in sentence and "spade_generator" in sentence and "warping" not in sentence
    for words in ("Kijai/LivePortrait_safetensors", "KwaiVGI/LivePortrait", "pctalk convert"):
        assert words in sentence


def test_precision_that_each_device_gets():
    assert [chosen_dtype("auto", device) for device in ("cuda", "cpu", "mps")] == [torch.float16, *[torch.float32] * 2]
    assert [chosen_dtype(name, "cuda:1") for name in ("fp32", "fp16")] == [torch.float32, torch.float16]
    assert chosen_dtype("bf16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="choose auto, fp32 or bf16"):
        chosen_dtype("fp16", "cpu")


def test_memory_that_drawing_takes_grows_with_batch_and_precision(renderer):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert renderer.working_memory(cuda, 4) == 4 * renderer.working_memory(cpu)
    assert renderer.working_memory(cuda) > renderer.working_memory(cuda, 4)
    networks = narrow_appearance(), narrow_motion(), narrow_warping(), narrow_generator(), built(StitchingRetargeting)
    halved = LivePortraitRenderer(FaceFinder.from_assets(), *networks, dtype=torch.float16)
    assert 2 * halved.working_memory(cuda) == renderer.working_memory(cuda)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_networks_move_whole(device):
    """Whatever runs beside ComfyUI's model management must not leave a tensor behind; `device` chooses the forms."""
    networks = narrow_appearance(), narrow_motion(), narrow_warping(), narrow_generator(), built(StitchingRetargeting)
    moved = LivePortraitRenderer(FaceFinder.from_assets(), *networks, device=device).to("meta")
    volume = moved.appearance(torch.empty(1, 3, 256, 256, device="meta"))
    points = moved.motion(torch.empty(2, 3, 256, 256, device="meta")).canonical
    driving = moved.stitching.stitch(points, points)
    picture = moved.generator(moved.warping(volume, points[:1], driving).feature)
    assert picture.device.type == "meta" and picture.shape == (2, 3, 512, 512)
    left = [
        (name, key)
        for name, network in moved.networks.items()
        for part in network.modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    ]
    assert not left and moved.device.type == "meta"


def narrow_networks() -> Networks:
    return Networks(narrow_appearance(), narrow_motion(), narrow_warping(), narrow_generator())


def test_benchmark_of_the_networks(capsys, monkeypatch):
    monkeypatch.setattr(bench_liveportrait, "random_networks", narrow_networks)
    monkeypatch.setattr(bench_liveportrait, "matrix_throughput", partial(bench_liveportrait.matrix_throughput, size=128))
    assert main(["bench", "--renderer", "liveportrait", "--runs", "1"]) == 0
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    figures = {name: value for name, value, _ in cells}
    for precision in ("float32", "bfloat16"):
        for part in ("F, once a source frame", "M, once a source frame", "W", "G"):
            assert float(figures[f"{part}, {precision}"].removesuffix(" ms")) > 0
        assert "frames/s" in figures[f"W + G, {precision}, 1 at once"]
    assert float(figures["- bfloat16 against float32"].removeprefix("PSNR ").removesuffix(" dB")) > 30


def test_benchmark_does_the_same_work_in_both_forms():
    plain, (source, driving) = narrow_networks(), keypoints(1)
    ours = bench_liveportrait.inference_networks(plain, torch.device("cpu"), torch.float32)
    image = torch.rand(1, 3, 64, 64)
    expected = plain.draw(plain.appearance(image), source, driving)
    assert difference(ours.draw(ours.appearance(image), source, driving), expected) < 1e-3


@pytest.mark.parametrize("arguments", [["--renderer", "liveportrait", "--long"], ["--device", "meta"]])
def test_benchmark_options_that_do_not_fit(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert "leave it out" in capsys.readouterr().err
