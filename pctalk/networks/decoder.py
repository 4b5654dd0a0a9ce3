"""The transformer decoder that predicts motion one frame after another, shared by LAC and EMC.

FaceFormer's scheme (Fan et al., CVPR 2022) with the key names of torch's nn.TransformerDecoder. Inside one window of
T frames FaceFormer's attention bias is zero, so self-attention is plainly causal. Cross-attention is masked to the
diagonal: frame i sees memory frame i alone, its softmax is 1 and the block is out_proj(V(memory_i)), which does not
depend on what was predicted before. It is therefore computed for all frames at once, ahead of the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

LONGEST = 600  # FaceFormer's sequence limit; it sets the length of the published `PPE.pe` buffers
HEADS = 4


def flatten_keypoints(motion: Tensor) -> Tensor:
    """Keypoint motion [..., K, 3] in the networks' layout, all x, then all y, then all z: [..., 3 K]."""
    return rearrange(motion, "... k c -> ... (c k)")


def unflatten_keypoints(motion: Tensor) -> Tensor:
    """The inverse of `flatten_keypoints`: [..., 3 K] to [..., K, 3]."""
    return rearrange(motion, "... (c k) -> ... k c", c=3)


def windows(frames: int, window: int) -> Iterator[tuple[int, int, int]]:
    """How a sequence is cut: (start, end, warm) per window; its first `warm` frames repeat the last ones before it.

    Windows of `window` frames overlap by a fifth; the last may be shorter, but always brings a frame that is new.
    """
    overlap = window // 5
    for start in range(0, max(1, frames - overlap), window - overlap):
        yield start, min(start + window, frames), overlap if start else 0


class PeriodicPositions(nn.Module):
    """A sinusoidal table that repeats every `period` frames; buffer `pe` [1, period * (600 // period + 1), dim]."""

    def __init__(self, dim: int, period: int) -> None:
        super().__init__()
        self.period = period
        position = torch.arange(period, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
        table = torch.zeros(1, period, dim)
        table[0, :, 0::2] = torch.sin(position * rate)
        table[0, :, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", table.repeat(1, LONGEST // period + 1, 1))

    def forward(self, first: int, count: int) -> Tensor:
        """Rows first .. first + count - 1: [count, dim]."""
        return self.pe[0, first : first + count]


class KeyValues:
    """Keys and values of the frames decoded so far, [rows, heads, frames, head_dim] each.

    Without gradients they are written into memory reserved for the whole window; with gradients, where a tensor that
    autograd has saved must not change, they are concatenated.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next frames; returns those of all frames so far."""
        if torch.is_grad_enabled():
            self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
            self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
            return self.keys, self.values
        if self.keys is None:
            rows, heads, _, head_dim = keys.shape
            self.keys = keys.new_empty(rows, heads, self.window, head_dim)
            self.values = torch.empty_like(self.keys)
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head attention with the parameters of nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, cache: KeyValues | None = None) -> Tensor:
        """Causal self-attention of new frames x [rows, n, dim] over themselves and the frames in the cache."""
        query, key, value = rearrange(
            F.linear(x, self.in_proj_weight, self.in_proj_bias), "r n (s h d) -> s r h n d", s=3, h=self.heads
        )
        if cache is not None:
            key, value = cache.append(key, value)
        new, seen = query.shape[2], key.shape[2]
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if new > 1:
            future = torch.ones(new, seen, dtype=torch.bool, device=x.device).triu(seen - new + 1)
            scores = scores.masked_fill(future, -math.inf)
        attended = scores.softmax(dim=-1) @ value
        return self.out_proj(rearrange(attended, "r h n d -> r n (h d)"))

    def diagonal(self, memory: Tensor) -> Tensor:
        """Attention of every frame to its own memory frame alone, [..., dim] to [..., dim]: out_proj(V(memory))."""
        dim = memory.shape[-1]
        return self.out_proj(F.linear(memory, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :]))


class DecoderLayer(nn.Module):
    """One post-norm decoder layer: causal self-attention, diagonal cross-attention, ReLU feed-forward."""

    def __init__(self, dim: int, heads: int, ff_dim: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.multihead_attn = Attention(dim, heads)
        self.linear1 = nn.Linear(dim, ff_dim)
        self.linear2 = nn.Linear(ff_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, cross: Tensor, cache: KeyValues | None = None) -> Tensor:
        """Args: x [rows, n, dim] new frames; cross: what they draw from the memory, of the same shape."""
        x = self.norm1(x + self.self_attn(x, cache))
        x = self.norm2(x + cross)
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class Decoder(nn.Module):
    """A stack of decoder layers, run in parallel over given tokens or frame by frame with cached keys and values."""

    def __init__(self, dim: int, heads: int, ff_dim: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ff_dim) for _ in range(layers))

    def cross(self, memory: Tensor) -> list[Tensor]:
        """What each layer draws from the memory, for all frames at once: one [rows, T, dim] per layer."""
        return [layer.multihead_attn.diagonal(memory) for layer in self.layers]

    def caches(self, window: int) -> list[KeyValues]:
        """Empty caches for a window of frames, one per layer."""
        return [KeyValues(window) for _ in self.layers]

    def forward(self, tokens: Tensor, cross: list[Tensor], caches: list[KeyValues] | None = None) -> Tensor:
        """Args: tokens [rows, n, dim], new frames after those in the caches (none: the sequence starts here); cross:
        per layer [rows, n, dim], the same frames. Returns: [rows, n, dim]."""
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens, cross[index], caches[index] if caches else None)
        return tokens


class MotionDecoder(nn.Module):
    """Predicts keypoint motion from a memory (one vector per frame) and a style; LAC and EMC differ in the memory.

    Token 0 is the style embedding, token i is vertice_map(D_{i-1}) plus that embedding; all get the positions. D is
    flattened as `flatten_keypoints` does.
    """

    def __init__(self, outputs: int, styles: int, style_bias: bool, dim: int, ff_dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.window = window
        self.audio_feature_map = nn.Linear(512, dim)
        self.vertice_map = nn.Linear(outputs, dim)
        self.PPE = PeriodicPositions(dim, window)
        self.transformer_decoder = Decoder(dim, heads, ff_dim, layers=1)
        self.vertice_map_r = nn.Linear(dim, outputs)
        self.obj_vector = nn.Linear(styles, dim, bias=style_bias)
        nn.init.zeros_(self.vertice_map_r.weight)
        nn.init.zeros_(self.vertice_map_r.bias)

    def style(self, ids: Tensor) -> Tensor:
        """The embeddings of preset styles: ids [rows] (whole numbers below `obj_vector.in_features`) to [rows, dim]."""
        embedding = self.obj_vector.weight.t()[ids]
        return embedding if self.obj_vector.bias is None else embedding + self.obj_vector.bias

    def decode(self, memory: Tensor, style: Tensor, warm: Tensor | None = None) -> Tensor:
        """Predict a window frame by frame from its own predictions.

        Args: memory [rows, n, dim], n <= window; style [rows, dim]; warm [rows, w, outputs], the last predictions of the
        window before, w < n, fed as the first predictions of this one.
        Returns: [rows, n, outputs]; the first w frames are the window's own view of the warm frames.
        """
        frames = memory.shape[1]
        self._check(frames)
        cross = self.transformer_decoder.cross(memory)
        caches = self.transformer_decoder.caches(frames)
        token = style[:, None]
        if warm is not None:
            token = torch.cat([token, self.vertice_map(warm) + style[:, None]], dim=1)
        outputs = []
        start = 0
        while True:
            end = start + token.shape[1]
            hidden = self.transformer_decoder(
                token + self.PPE(start, end - start), [term[:, start:end] for term in cross], caches
            )
            outputs.append(self.vertice_map_r(hidden))
            if end == frames:
                return torch.cat(outputs, dim=1)
            token = self.vertice_map(outputs[-1][:, -1:]) + style[:, None]
            start = end

    def decode_teacher(self, memory: Tensor, previous: Tensor, style: Tensor) -> Tensor:
        """Predict every frame of a window at once from the true frames before it (teacher forcing, for training).

        Args: memory [rows, n, dim], n <= window; previous [rows, n, outputs], the true motion of these frames: frame i
        is predicted from frames 0..i-1, the last one is not used; style [rows, dim].
        Returns: [rows, n, outputs].
        """
        frames = memory.shape[1]
        self._check(frames)
        tokens = F.pad(self.vertice_map(previous[:, :-1]), (0, 0, 1, 0)) + style[:, None] + self.PPE(0, frames)
        return self.vertice_map_r(self.transformer_decoder(tokens, self.transformer_decoder.cross(memory)))

    def _check(self, frames: int) -> None:
        if not 0 < frames <= self.window:
            raise ValueError(f"A window of {frames} frames was given, expected 1 to {self.window}: split longer sequences.")
