"""EMC, the emotion control: audio features and an emotion to the deformation of all 21 keypoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .decoder import HEADS, Decoder, MotionDecoder, PeriodicPositions, one_thread

KEYPOINT_VALUES = 63
EMOTION_CODES = 8


class AudioEmotionFormer(nn.Module):
    """Conditions the audio on an emotion: a two-layer decoder whose tokens are its own last outputs."""

    def __init__(self, dim: int, ff_dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.audio_feature_map = nn.Linear(512, dim)
        self.emo_feature_map = nn.Linear(EMOTION_CODES, dim)
        self.PPE = PeriodicPositions(dim, window)
        self.transformer_decoder = Decoder(dim, heads, ff_dim, layers=2)
        self.map_output = nn.Linear(512, dim)
        self.audio_map_r = nn.Linear(dim, 512)
        for parameter in self.parameters():  # stored by columns, products with a few dozen rows run 1.5x faster on CPUs
            if parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()

    def forward(self, features: Tensor, emotion: Tensor) -> Tensor:
        """Condition windows on emotions, frame by frame; every window starts afresh, so all run as one batch.

        Args: features [windows, n, 512]; emotion [rows, 8] one-hot, rows a multiple of windows: row r hears window
        r % windows (pairs when there are as many rows as windows).
        Returns: [rows, n, dim].
        """
        rows, (windows, frames, _) = emotion.shape[0], features.shape
        cross = self.transformer_decoder.cross(self.audio_feature_map(features))
        cross = [term.repeat(rows // windows, 1, 1) for term in cross]
        caches = self.transformer_decoder.caches(frames)
        code = self.emo_feature_map(emotion)[:, None]
        # h_i becomes token i + 1 through two linear maps: composed once, they are one in the loop.
        recurrence = self.audio_feature_map.weight @ self.audio_map_r.weight
        bias = self.audio_feature_map(self.audio_map_r.bias)
        token, hidden = code, []
        with one_thread(code.numel()):
            for frame in range(frames):
                drawn = [term[:, frame : frame + 1] for term in cross]
                hidden.append(self.transformer_decoder(token + self.PPE(frame, 1), drawn, caches))
                token = F.linear(hidden[-1], recurrence, bias) + code
        return self.map_output(self.audio_map_r(torch.cat(hidden, dim=1)))


class EmotionPredictor(MotionDecoder):
    """Autoregressive motion of the whole face under an emotion; the key names are those of the published emc.pth."""

    def __init__(
        self, styles: int = 40, dim: int = 512, ff_dim: int = 1024, window: int = 25, heads: int = HEADS, style_bias=True
    ) -> None:
        super().__init__(KEYPOINT_VALUES, styles, style_bias, dim, ff_dim, window, heads)
        self.audio_emo_former = AudioEmotionFormer(dim, ff_dim, window, heads)

    def condition(self, features: Tensor, emotion: Tensor) -> Tensor:
        """The decoder's memory (see `AudioEmotionFormer.forward`): [windows, n, 512], [rows, 8] to [rows, n, dim]."""
        return self.audio_emo_former(features, emotion)

    def forward(self, features: Tensor, emotion: Tensor, style: Tensor, warm: Tensor | None = None) -> Tensor:
        """Decode one window (for several with one style, keep what `prepared` returns).

        Args: features [1 or rows, n, 512], n <= window; emotion [rows, 8] one-hot; style [rows, dim]; warm [rows, w, 63],
        w < n (see `PreparedDecoder`).
        Returns: CPred [rows, n - w, 63] in K space, flattened as `flatten_keypoints` does.
        """
        decoder = self.prepared(style)
        return decoder(decoder.cross(self.condition(features, emotion)), warm)

    def forward_teacher(self, features: Tensor, emotion: Tensor, previous: Tensor, style: Tensor) -> Tensor:
        """The same with true previous frames [rows, n, 63] (see `decode_teacher`), for training.

        The condition has no true previous frames: it is computed frame by frame, with gradients.
        """
        return self.decode_teacher(self.condition(features, emotion), previous, style)
