"""The audio encoder: 0.2 s of mel spectrogram to one 512-d audio-visual feature (Wav2Lip's convolutions)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

FEATURE_DIM = 512
MEL_BANDS = 80
MEL_WINDOW = 16  # mel frames of 12.5 ms that one video frame sees


class ConvBlock(nn.Module):
    """Convolution, batch norm, the input added when `residual`, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride=1, padding: int = 1, residual: bool = False) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, padding),
            nn.BatchNorm2d(outputs),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_block(x)
        if self.residual:
            out = out + x
        return out.relu_()


class AudioEncoder(nn.Module):
    """Mel windows to features; the key names are those of the published `audio_encoder` file."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_encoder = nn.Sequential(  # height is the mel axis, width is time
            ConvBlock(1, 32),  # 80 x 16
            ConvBlock(32, 32, residual=True),
            ConvBlock(32, 32, residual=True),
            ConvBlock(32, 64, stride=(3, 1)),  # 27 x 16
            ConvBlock(64, 64, residual=True),
            ConvBlock(64, 64, residual=True),
            ConvBlock(64, 128, stride=3),  # 9 x 6
            ConvBlock(128, 128, residual=True),
            ConvBlock(128, 128, residual=True),
            ConvBlock(128, 256, stride=(3, 2)),  # 3 x 3
            ConvBlock(256, 256, residual=True),
            ConvBlock(256, 512, padding=0),  # 1 x 1
            ConvBlock(512, 512, kernel=1, padding=0),
        )

    def forward(self, mel: Tensor) -> Tensor:
        """Args: mel [n, 1, 80, 16] in -4..4. Returns: features [n, 512]."""
        return self.audio_encoder(mel).flatten(1)

    def folded(self) -> AudioEncoder:
        """The same function for inference: batch norm folded into the convolutions, channels last (about 3x faster)."""
        encoder = copy.deepcopy(self).eval()
        for block in encoder.audio_encoder:
            convolution, norm = block.conv_block
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            block.conv_block = nn.Sequential(convolution)
        return encoder.to(memory_format=torch.channels_last)
