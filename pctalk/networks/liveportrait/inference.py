"""The same networks in the form that runs fastest, derived once from the loaded weights.

Everything here is exact algebra, equal to the plain forms up to floating-point rounding:

- spectral norm and BatchNorm become part of the convolution before or after them;
- a convolution over a nearest-upsampled map equals small convolutions on the map itself, one per output phase;
- a sparse motion shifts the whole grid, so sampling it is a product with one interpolation matrix per axis;
- a Gaussian heatmap is a product of one factor per axis, and the mix of shifted grids is the grid plus the mixed shifts;
- the learned shortcut of a SPADE block is linear in its shift, so both fold into one convolution;
- instance statistics of an upsampled map are those of the map;
- on a CPU in float32, wide 3x3 convolutions take a quarter of the multiplications (see `winograd`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .appearance import AppearanceFeatureExtractor
from .blocks import ConvNorm, ResBlock3d, identity_grid, sample_volume
from .generator import SLOPE, Spade, SpadeBlock, SpadeGenerator, SpectralConv2d
from .motion import MotionExtractor
from .warping import HEATMAP_VARIANCE, MOTIONS, Warp, WarpingModule
from .winograd import quicker


@torch.no_grad()
def fused_appearance(network: AppearanceFeatureExtractor) -> AppearanceFeatureExtractor:
    """F with every BatchNorm that follows a convolution folded into it."""
    network = copy.deepcopy(network).eval()
    for block in network.modules():
        if isinstance(block, ConvNorm):
            block.conv, block.norm = fuse_conv_bn_eval(block.conv, block.norm), nn.Identity()
        elif isinstance(block, ResBlock3d):
            block.conv1, block.norm2 = fuse_conv_bn_eval(block.conv1, block.norm2), nn.Identity()
    return _ready(network)


@torch.no_grad()
def fused_motion(network: MotionExtractor) -> MotionExtractor:
    """M in channels-last, the layout its LayerNorms and linear layers work in."""
    return _ready(copy.deepcopy(network))


@torch.no_grad()
def fused_warping(network: WarpingModule, *, winograd: bool = False) -> FusedWarping:
    """W, in eval mode, for inference, see `FusedWarping`. winograd: for a CPU in float32; takes more memory."""
    fused = _ready(FusedWarping(network))
    if winograd:
        fused.third, fused.merge = quicker(fused.third), quicker(fused.merge)
        # The innermost maps are so small that reading the larger kernels takes longer than what they save.
        fused.encoder = nn.ModuleList([*map(quicker, fused.encoder[:-1]), fused.encoder[-1]])
    return fused


@torch.no_grad()
def fused_generator(network: SpadeGenerator, *, winograd: bool = False) -> FusedGenerator:
    """G for inference, see `FusedGenerator`. winograd: for a CPU in float32; takes more memory."""
    fused = _ready(FusedGenerator(network))
    if winograd:
        fused.fc = quicker(fused.fc)
        for block in (*fused.middle, *fused.up):
            for name, conv in block.named_children():
                setattr(block, name, quicker(conv))
    return fused


def _ready(module: nn.Module) -> nn.Module:
    """In eval mode, without gradients, weights in channels-last, which carries over to every map."""
    for parameter in module.parameters():
        if parameter.dim() in (4, 5):
            layout = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return module.eval().requires_grad_(False)


class UpsampledConv(nn.Module):
    """A 3x3 or 3x3x3 convolution of a nearest-upsampled map, and ReLU, computed on the map itself.

    Of the `factor` output rows that a row of the map becomes, the first sees the row above, the last the row below, and
    those between see that row alone. Per axis this leaves two or three different kernels of one or two taps.
    [B, C, (D,) H, W] to [parts, B, C' / parts, (D,) factor H, factor W], the outputs split so that each part is dense.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, factor: int, parts: int = 1):
        super().__init__()
        first = (range(1), 0, [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        between = (range(1, factor - 1), 1, [[1.0, 1.0, 1.0]])
        last = (range(factor - 1, factor), 1, [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        kinds = [first, between, last] if factor > 2 else [first, last]
        self.factor, self.parts = factor, parts
        self.phases = []  # (output rows, output columns, first row, first column) of each kernel
        self.kernels = nn.ParameterList()
        self.bias = conv.bias
        for (rows, top, vertical), (columns, left, horizontal) in product(kinds, kinds):
            vertical, horizontal = (conv.weight.new_tensor(taps) for taps in (vertical, horizontal))
            kernel = torch.einsum("oi...yx,ay,bx->oi...ab", conv.weight, vertical, horizontal)
            self.kernels.append(nn.Parameter(kernel))
            self.phases.append((rows, columns, top, left))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        convolve, depth_padding = (F.conv2d, ()) if x.dim() == 4 else (F.conv3d, (1,))
        padded = F.pad(x, (1, 1, 1, 1))
        batch, outputs = self.parts * x.shape[0], self.kernels[0].shape[0] // self.parts
        shape = (batch, outputs, *x.shape[2:-2], height * self.factor, width * self.factor)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout).unflatten(0, (self.parts, -1))
        for kernel, (rows, columns, top, left) in zip(self.kernels, self.phases, strict=True):
            window = padded[..., top : top + height + kernel.shape[-2] - 1, left : left + width + kernel.shape[-1] - 1]
            phase = F.relu_(convolve(window, kernel, self.bias, padding=(*depth_padding, 0, 0)))
            phase = phase.unflatten(1, (self.parts, outputs)).transpose(0, 1)
            for row, column in product(rows, columns):
                out[..., row :: self.factor, column :: self.factor] = phase
        return out


class FusedSpadeBlock(nn.Module):
    """A SPADE block whose maps are drawn at `factor` times the feature's size, from an input of half that size if it grows.

    The norms share the statistics of their input, and one convolution each draws what they share, their gains and shifts.
    """

    def __init__(self, block: SpadeBlock, factor: int):
        super().__init__()
        norms = [block.norm_0, block.norm_1] + ([block.norm_s] if block.learned_shortcut else [])
        shared = _stacked([norm.mlp_shared[0] for norm in norms])
        self.shared = UpsampledConv(shared, factor, len(norms)) if factor > 1 else shared
        self.norms = len(norms)
        self.modulation_0 = _gain_and_shift(block.norm_0)
        self.modulation_1 = _gain_and_shift(block.norm_1)
        self.conv_0, self.conv_1 = _normalised(block.conv_0), _normalised(block.conv_1)
        self.learned_shortcut = block.learned_shortcut
        if self.learned_shortcut:
            self.conv_s = _normalised(block.conv_s)
            self.modulation_s = _gain_and_shift(block.norm_s, after=self.conv_s)

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        hidden = self.shared_maps(feature)
        normalised = instance_normalised(x)
        y = self.conv_0(modulated(normalised, *self.modulation_0(hidden[0]).chunk(2, dim=1)))
        y = self.conv_1(modulated(instance_normalised(y), *self.modulation_1(hidden[1]).chunk(2, dim=1)))
        if not self.learned_shortcut:
            return y.add_(x)
        gain, shift = self.modulation_s(hidden[2]).split([x.shape[1], y.shape[1]], dim=1)
        return y.add_(shift).add_(self.conv_s(scaled(normalised, gain)))

    def shared_maps(self, feature: Tensor) -> Sequence[Tensor]:
        """What each norm draws its gain and shift from: [B, 128, h, w] each."""
        if isinstance(self.shared, UpsampledConv):
            return self.shared(feature).unbind(0)
        maps = F.relu_(self.shared(feature)).chunk(self.norms, dim=1)
        return [part.contiguous(memory_format=torch.channels_last) for part in maps]


class FusedGenerator(nn.Module):
    """`SpadeGenerator` from `FusedSpadeBlock`s; the maps it grows by are never upsampled."""

    def __init__(self, network: SpadeGenerator):
        super().__init__()
        self.fc = copy.deepcopy(network.fc)
        self.middle = nn.ModuleList(FusedSpadeBlock(block, 1) for block in network.middle)
        self.up = nn.ModuleList([FusedSpadeBlock(network.up_0, 2), FusedSpadeBlock(network.up_1, 4)])
        self.conv_img = copy.deepcopy(network.conv_img)

    def forward(self, feature: Tensor) -> Tensor:
        """Warped feature [B, 256, 64, 64] to the picture [B, 3, 512, 512], RGB 0..1."""
        feature = feature.contiguous(memory_format=torch.channels_last)
        x = self.fc(feature)
        for block in (*self.middle, *self.up):
            x = block(x, feature)
        return self.conv_img(F.leaky_relu_(x, SLOPE)).sigmoid_()


class FusedWarping(nn.Module):
    """`WarpingModule` with one small picture of the volume moved 22 times by interpolation matrices.

    Channels of the hourglass' input are ordered heatmaps first, and the background's heatmap, always 0, is left out.
    """

    def __init__(self, network: WarpingModule):
        super().__init__()
        motion = network.dense_motion_network
        compressed = motion.compress.out_channels
        self.compress = fuse_conv_bn_eval(motion.compress, motion.norm)
        self.encoder = nn.ModuleList(fuse_conv_bn_eval(b.conv, b.norm) for b in motion.hourglass.encoder.down_blocks)
        decoder = motion.hourglass.decoder
        self.decoder = nn.ModuleList(UpsampledConv(fuse_conv_bn_eval(b.conv, b.norm), 2) for b in decoder.up_blocks)
        self.merge = fuse_conv_bn_eval(decoder.conv, decoder.norm)
        published = torch.arange(MOTIONS * (1 + compressed)).unflatten(0, (MOTIONS, 1 + compressed))
        order = _padded(torch.cat([published[1:, 0], published[:, 1:].flatten()]))
        self.inputs = len(order)
        self.encoder[0] = _with_inputs(self.encoder[0], order)
        below = self.merge.in_channels - published.numel()  # channels that come before the hourglass' input
        self.merge = _with_inputs(self.merge, torch.cat([torch.arange(below), torch.where(order < 0, -1, below + order)]))
        merged = _padded(torch.arange(self.merge.out_channels))
        self.merge = _with_outputs(self.merge, merged)
        self.mask = SliceConv3d(_with_inputs(motion.mask, merged))
        self.occlusion = OneMapConv(motion.occlusion, merged)
        self.third = fuse_conv_bn_eval(network.third.conv, network.third.norm)
        self.fourth = copy.deepcopy(network.fourth)

    def forward(self, volume: Tensor, source: Tensor, driving: Tensor) -> Warp:
        """Args: volume [1 or B, 32, 16, 64, 64] of F, which may be more precise than these networks; source [1 or B, 21, 3]
        and driving [B, 21, 3]: K, float32."""
        batch, dtype = driving.shape[0], self.fourth.weight.dtype
        shift = F.pad(source - driving, (0, 0, 1, 0))  # [B, 22, 3], the background stands still
        size = volume.shape[2:]
        heat = separable_heatmaps(driving, size) - separable_heatmaps(source, size)
        small = F.relu(self.compress(volume.to(dtype))).float()
        moved = shifted_copies(small, shift).flatten(1, 2)
        unused = moved.new_zeros(batch, self.inputs - heat.shape[1] - moved.shape[1], *size)
        x = torch.cat([heat, moved, unused], dim=1).to(dtype, memory_format=torch.channels_last_3d)

        levels = [x]
        for conv in self.encoder:
            levels.append(halve_plane_channels_last(F.relu_(conv(levels[-1]))))
        x = levels.pop()
        for conv in self.decoder:
            x = torch.cat([conv(x)[0], levels.pop()], dim=1)
        x = F.relu_(self.merge(x))

        shares = self.mask(x).softmax(dim=1)  # [B, 22, D, H, W]
        mixed = torch.einsum("bkdhw,bkx->bdhwx", shares, shift)
        deformation = identity_grid(*size, device=volume.device) + mixed
        occlusion = self.occlusion(x).sigmoid_()
        sampled = sample_volume(volume.expand(batch, -1, -1, -1, -1), deformation).flatten(1, 2)
        sampled = sampled.to(dtype, memory_format=torch.channels_last)
        feature = F.leaky_relu_(self.third(sampled), 0.01)
        return Warp(self.fourth(feature) * occlusion, occlusion, deformation)


class SliceConv3d(nn.Module):
    """A 3-D convolution with few outputs as one 2-D convolution over the slices, whose outputs for each depth tap are added.

    [B, C, D, H, W] to [B, C', D, H, W] in float32; the wider 2-D convolution keeps matrix units busy.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.outputs, _, self.taps = conv.weight.shape[:3]
        self.weight = nn.Parameter(conv.weight.permute(2, 0, 1, 3, 4).flatten(0, 1))
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        depth = x.shape[2]
        parts = F.conv2d(x.transpose(1, 2).flatten(0, 1), self.weight, padding=self.taps // 2)
        parts = parts.unflatten(1, (self.taps, self.outputs)).unflatten(0, (-1, depth))  # [B, D, taps, C', H, W]
        out = torch.zeros_like(parts[:, :, 0], dtype=torch.float32).add_(self.bias[:, None, None])
        for tap in range(self.taps):
            offset = tap - self.taps // 2
            low, high = max(0, -offset), min(depth, depth - offset)
            if low < high:
                out[:, low:high] += parts[:, low + offset : high + offset, tap]
        return out.transpose(1, 2)


class OneMapConv(nn.Module):
    """A 2-D convolution of all slices of a volume to one map: a matrix product for all taps, then shifted adds.

    [B, C, D, H, W] to [B, 1, H, W]; `channels` are the published channel of each of the C (-1: none).
    """

    def __init__(self, conv: nn.Conv2d, channels: Tensor):
        super().__init__()
        self.kernel = conv.kernel_size[0]
        depth = conv.in_channels // (int(channels.max()) + 1)
        taps = conv.weight[0].flip(1, 2).flatten(1).unflatten(0, (-1, depth))  # [C, D, taps]: fold adds where conv looks up
        self.taps = nn.Parameter(_gathered(taps, channels).transpose(0, 1).contiguous())  # [D, C, taps]
        self.bias = nn.Parameter(conv.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        columns = (x.permute(0, 2, 3, 4, 1).flatten(2, 3) @ self.taps).sum(dim=1)  # [B, H * W, taps]
        return F.fold(columns.mT, x.shape[3:], self.kernel, padding=self.kernel // 2) + self.bias


def separable_heatmaps(keypoints: Tensor, size: torch.Size) -> Tensor:
    """`gaussian_heatmaps` over the identity grid of a size (D, H, W): keypoints [B, 21, 3] to [B, 21, D, H, W].

    Factors below 1e-8, less than what rounding leaves of 1, are 0: their products would be denormal numbers, which slow
    the convolutions of a CPU down tenfold.
    """
    x, y, z = (_gaussian(length, place) for length, place in zip(reversed(size), keypoints.unbind(2), strict=True))
    return z[..., :, None, None] * (y[..., :, None] * x[..., None, :])[:, :, None]


def _gaussian(length: int, place: Tensor) -> Tensor:
    distance = torch.linspace(-1.0, 1.0, length, device=place.device) - place[..., None]
    return F.threshold(torch.exp(-0.5 / HEATMAP_VARIANCE * distance.square()), 1e-8, 0.0)


def shifted_copies(volume: Tensor, shift: Tensor) -> Tensor:
    """`sample_volume` on the identity grid moved by each shift, as products with interpolation matrices.

    Args: volume [1 or B, C, D, H, W] float32; shift [B, K, 3] (x, y, z). Returns: [B, K, C, D, H, W].
    """
    volume = volume.expand(shift.shape[0], -1, -1, -1, -1)
    x, y, z = (
        interpolation(length, offset) for length, offset in zip(reversed(volume.shape[2:]), shift.unbind(2), strict=True)
    )
    moved = torch.einsum("bkzd,bcdhw->bkczhw", z, volume)
    return y[:, :, None, None] @ (moved @ x[:, :, None, None].mT)


def interpolation(length: int, shift: Tensor) -> Tensor:
    """Matrices that sample an axis linearly at linspace(-1, 1) + shift, zeros outside: shift [...] to [..., L, L]."""
    places = torch.arange(length, dtype=shift.dtype, device=shift.device)
    grid = torch.linspace(-1.0, 1.0, length, device=shift.device)
    position = ((grid + shift[..., None] + 1.0) * length - 1.0) / 2.0
    return (1.0 - (position[..., None] - places).abs()).clamp(min=0.0)


def halve_plane_channels_last(x: Tensor) -> Tensor:
    """`halve_plane` for channels-last volumes, by slices, so that the layout stays: [B, C, D, H, W]."""
    slices = x.transpose(1, 2).flatten(0, 1)
    return F.avg_pool2d(slices, 2).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def instance_normalised(x: Tensor) -> Tensor:
    """Instance normalisation without affine, in channels-last: [B, C, H, W]."""
    return _normalised_one_by_one(x) if x.device.type == "cpu" else _normalised_together(x)


def _normalised_one_by_one(x: Tensor) -> Tensor:
    """The only channels-last statistics that CPUs take in one pass are those of a batch."""
    samples = [F.batch_norm(sample, None, None, training=True) for sample in x.split(1)]
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def _normalised_together(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    gain = (variance + 1e-5).rsqrt()
    return torch.addcmul(-mean * gain, x, gain)


def scaled(x: Tensor, gain: Tensor) -> Tensor:
    """Nearest-upsampled x times gain: x [B, C, H, W], gain [B, C, f H, f W]."""
    factor = gain.shape[2] // x.shape[2]
    if factor == 1:
        return x * gain
    out = torch.empty_like(gain, memory_format=torch.channels_last)
    gain_phases, out_phases = (t.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)) for t in (gain, out))
    torch.mul(x[:, :, :, None, :, None], gain_phases, out=out_phases)
    return out


def modulated(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """leaky_relu(nearest-upsampled x times gain plus shift): x [B, C, H, W], gain and shift [B, C, f H, f W]."""
    return F.leaky_relu_(scaled(x, gain).add_(shift), SLOPE)


def _normalised(conv: SpectralConv2d) -> nn.Conv2d:
    """A plain convolution with the spectrally normalised weight."""
    return _conv2d(conv.weight(), conv.bias)


def _stacked(convs: list[nn.Conv2d]) -> nn.Conv2d:
    """Convolutions of the same input as one, outputs one after another."""
    return _conv2d(torch.cat([conv.weight for conv in convs]), torch.cat([conv.bias for conv in convs]))


def _gain_and_shift(norm: Spade, after: nn.Conv2d | None = None) -> nn.Conv2d:
    """The convolution that draws 1 + gamma and beta; with `after`, beta as that 1x1 convolution sees it."""
    gamma, beta = norm.mlp_gamma, norm.mlp_beta
    weight, bias = beta.weight, beta.bias
    if after is not None:
        matrix = after.weight[:, :, 0, 0]
        weight, bias = torch.einsum("om,mihw->oihw", matrix, weight), matrix @ bias
    return _conv2d(torch.cat([gamma.weight, weight]), torch.cat([gamma.bias + 1.0, bias]))


def _conv2d(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    outputs, inputs, kernel, _ = weight.shape
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias is not None, device=weight.device)
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv


def _padded(channels: Tensor) -> Tensor:
    """Channel indices with -1, an unused channel, up to a multiple of 16, which matrix units want."""
    return F.pad(channels, (0, -len(channels) % 16), value=-1)


def _gathered(weight: Tensor, channels: Tensor) -> Tensor:
    """Rows of a weight [C, ...] in the order of `channels`, zeros where that is -1."""
    used = (channels >= 0).to(weight.dtype)
    return weight[channels.clamp(min=0)] * used.reshape(-1, *[1] * (weight.dim() - 1))


def _with_inputs(conv: nn.Conv3d, channels: Tensor) -> nn.Conv3d:
    """The convolution for an input whose channel i is the old input's channels[i]; what is left out was always 0."""
    return _conv3d(_gathered(conv.weight.transpose(0, 1), channels).transpose(0, 1), conv.bias)


def _with_outputs(conv: nn.Conv3d, channels: Tensor) -> nn.Conv3d:
    """The convolution whose output i is the old output channels[i]."""
    return _conv3d(_gathered(conv.weight, channels), _gathered(conv.bias, channels))


def _conv3d(weight: Tensor, bias: Tensor) -> nn.Conv3d:
    outputs, inputs, kernel = weight.shape[:3]
    conv = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, device=weight.device)
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
    return conv
