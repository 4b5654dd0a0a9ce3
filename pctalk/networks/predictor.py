"""LAC, the lip-audio alignment control: audio features and a speaking style to lip deformations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decoder import HEADS, MotionDecoder

LIP_VALUES = 18  # six lip keypoints, three coordinates each


class LipPredictor(MotionDecoder):
    """Autoregressive lip motion; the key names are those of `model` in the published lac.pth."""

    def __init__(self, styles: int = 210, dim: int = 512, ff_dim: int = 1024, window: int = 25, heads: int = HEADS) -> None:
        super().__init__(LIP_VALUES, styles, False, dim, ff_dim, window, heads)

    def forward(self, features: Tensor, style: Tensor, warm: Tensor | None = None) -> Tensor:
        """Decode one window (for several with one style, keep what `prepared` returns).

        Args: features [rows, n, 512], n <= window; style [rows, dim]; warm [rows, w, 18], w < n (see `PreparedDecoder`).
        Returns: D_l [rows, n - w, 18] in K space, flattened as `flatten_keypoints` does.
        """
        decoder = self.prepared(style)
        return decoder(decoder.cross(self.audio_feature_map(features)), warm)

    def forward_teacher(self, features: Tensor, previous: Tensor, style: Tensor) -> Tensor:
        """The same with true previous frames [rows, n, 18], all frames at once (see `decode_teacher`)."""
        return self.decode_teacher(self.audio_feature_map(features), previous, style)


class Refiner(nn.Module):
    """Corrects lip keypoints by what they are and what is heard: K' = K + out_fc([K, audio])."""

    def __init__(self) -> None:
        super().__init__()
        self.out_fc = nn.Linear(LIP_VALUES + 512, LIP_VALUES)
        nn.init.zeros_(self.out_fc.weight)
        nn.init.zeros_(self.out_fc.bias)

    def forward(self, lips: Tensor, features: Tensor) -> Tensor:
        """Args: lips [..., 18], keypoints K_und + D_l (not offsets); features [..., 512]. Returns: [..., 18]."""
        return lips + self.out_fc(torch.cat([lips, features], dim=-1))
