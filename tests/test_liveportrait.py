"""The LivePortrait networks: plain against inference forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pctalk.networks.liveportrait import blocks, inference
from pctalk.networks.liveportrait.appearance import AppearanceFeatureExtractor
from pctalk.networks.liveportrait.generator import SpadeGenerator
from pctalk.networks.liveportrait.inference import UpsampledConv
from pctalk.networks.liveportrait.motion import MotionExtractor
from pctalk.networks.liveportrait.retargeting import StitchingRetargeting
from pctalk.networks.liveportrait.warping import WarpingModule, gaussian_heatmaps


def seasoned(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with statistics, gains and shifts that are not the identity, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point() and "weight_" not in name and (value.dim() < 2 or "grn" in name):
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
    return network.eval().requires_grad_(False)


def narrow_appearance() -> AppearanceFeatureExtractor:
    return seasoned(AppearanceFeatureExtractor(width=8, channels=6, depth=4, blocks=2))


def narrow_warping() -> WarpingModule:
    return seasoned(WarpingModule(channels=6, depth=4, compressed=2, expansion=8, blocks=3, widest=32, outputs=16))


def narrow_generator() -> SpadeGenerator:
    return seasoned(SpadeGenerator(inputs=16, width=24, narrow=(16, 8), hidden=8))


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
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2](3, 5, 3, padding=1)
    x = torch.randn(2, 3, *(4,) * (dims - 2), 6, 7)
    upsampled = F.interpolate(x, scale_factor=(*(1,) * (dims - 2), factor, factor), mode="nearest")
    torch.testing.assert_close(UpsampledConv(conv, factor)(x), conv(upsampled), rtol=0, atol=2e-6)


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


def test_appearance_inference_form():
    network, image = narrow_appearance(), torch.rand(2, 3, 64, 64)
    volume = network(image)
    assert volume.shape == (2, 6, 4, 16, 16)
    assert difference(inference.fused_appearance(network)(image), volume) < 1e-5


def test_motion_inference_form():
    network, image = seasoned(MotionExtractor(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))), torch.rand(2, 3, 64, 64)
    motion = network(image)
    assert [tuple(value.shape) for value in motion] == [(2, 21, 3), (2,), (2,), (2,), (2, 3), (2, 21, 3), (2,)]
    fused = inference.fused_motion(network)(image)
    for ours, expected in zip(fused, motion, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_warping_inference_form():
    network, volume = narrow_warping(), torch.randn(2, 6, 4, 16, 16)
    source, driving = keypoints(2)
    plain, fused = network(volume, source, driving), inference.fused_warping(network)(volume, source, driving)
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


def test_generator_inference_form():
    network, feature = narrow_generator(), torch.randn(2, 16, 16, 16)
    picture = network(feature)
    assert picture.shape == (2, 3, 128, 128)
    assert picture.min() >= 0.0 and picture.max() <= 1.0
    assert difference(inference.fused_generator(network)(feature), picture) < 1e-4


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
    half = generator(warping(volume.bfloat16(), source[:1], driving).feature)
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
