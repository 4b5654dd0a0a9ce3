"""The style encoder: how somebody speaks, read from 100 frames of their lip motion."""

from __future__ import annotations

from torch import Tensor, nn

from .decoder import HEADS, PeriodicPositions
from .predictor import LIP_VALUES

STYLE_FRAMES = 100


class SelfAttentionPooling(nn.Module):
    """A weighted mean over time; the weights are read from the frames themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.W = nn.Sequential(nn.Linear(dim, dim), nn.Mish(), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, n, dim] to [rows, dim]."""
        return (self.W(x).softmax(dim=1) * x).sum(dim=1)


class StyleClassifier(nn.Module):
    """The head that the style encoder was trained with, kept so that published files load completely."""

    def __init__(self, dim: int, styles: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, styles)

    def forward(self, embedding: Tensor) -> Tensor:
        """[rows, dim] to the logits of the training speakers [rows, styles]."""
        return self.out_proj(self.dense(embedding).tanh())


class StyleEncoder(nn.Module):
    """Lip motion to a style embedding for `LipPredictor`; the key names are those of the published style_encoder.pth."""

    def __init__(self, styles: int = 210, dim: int = 512, ff_dim: int = 1024, heads: int = HEADS) -> None:
        super().__init__()
        self.vertice_map = nn.Linear(LIP_VALUES, dim)
        self.PPE = PeriodicPositions(dim, STYLE_FRAMES)
        layer = nn.TransformerEncoderLayer(dim, heads, ff_dim, dropout=0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.vertice_map_r = nn.Linear(dim, dim)
        self.cls = StyleClassifier(dim, styles)
        self.pooling = SelfAttentionPooling(dim)

    def forward(self, lips: Tensor) -> Tensor:
        """Args: lips [rows, 100, 18], K - K_und on the lip keypoints, flattened as `flatten_keypoints` does; shorter clips
        are ping-ponged to length by the caller. Returns: [rows, dim]."""
        frames = self.vertice_map(lips) + self.PPE(0, lips.shape[1])
        return self.pooling(self.vertice_map_r(self.transformer_encoder(frames)))
