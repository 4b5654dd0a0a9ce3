"""The transformer decoder that predicts motion one frame after another, shared by LAC and EMC.

FaceFormer's scheme (Fan et al., CVPR 2022) with the key names of torch's nn.TransformerDecoder. Inside one window of
T frames FaceFormer's attention bias is zero, so self-attention is plainly causal. Cross-attention is masked to the
diagonal: frame i sees memory frame i alone, its softmax is 1 and the block is out_proj(V(memory_i)), which does not
depend on what was predicted before. It is therefore computed for all frames at once, ahead of the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

LONGEST = 600  # FaceFormer's sequence limit; it sets the length of the published `PPE.pe` buffers
HEADS = 4
WORTH_SHARING = 2**14  # values a step carries (rows x dim) from which threads pay: 32 rows at the published width


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
        with torch.device("cpu"):  # the table is no weight: it is there even where a network is built on the meta device
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

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next frame's [rows, heads, 1, head_dim]; returns the keys and values of all frames so far."""
        if torch.is_grad_enabled():
            self.keys = key if self.keys is None else torch.cat([self.keys, key], dim=2)
            self.values = value if self.values is None else torch.cat([self.values, value], dim=2)
            return self.keys, self.values
        if self.keys is None:
            rows, heads, _, head_dim = key.shape
            self.keys = key.new_empty(rows, heads, self.window, head_dim)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, self.length : self.length + 1] = key
        self.values[:, :, self.length : self.length + 1] = value
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


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
        """Causal self-attention over a whole sequence x [rows, n, dim], or of one new frame (n = 1) over those in the cache."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [rows, heads, n, head_dim]
        if cache is not None:
            key, value = cache.append(key, value)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=x.shape[1] > 1)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

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
        """Args: x [rows, n, dim] (see `Attention`); cross: what these frames draw from the memory, of the same shape."""
        x = self.norm1(x + self.self_attn(x, cache))
        x = self.norm2(x + cross)
        return self.norm3(x + self.linear2(self.linear1(x).relu_()))


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
        """Args: tokens [rows, n, dim], a whole sequence, or with caches the one frame (n = 1) after those in them; cross:
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

    def prepared(self, style: Tensor) -> PreparedDecoder:
        """The network ready to decode windows in these styles [rows, dim], one per sequence."""
        return PreparedDecoder(self, style)

    def decode_teacher(self, memory: Tensor, previous: Tensor, style: Tensor) -> Tensor:
        """Predict every frame of a window at once from the true frames before it (teacher forcing, for training).

        Args: memory [rows, n, dim], n <= window; previous [rows, n, outputs], the true motion of these frames: frame i
        is predicted from frames 0..i-1, the last one is not used; style [rows, dim].
        Returns: [rows, n, outputs].
        """
        frames = memory.shape[1]
        self.check_window(frames)
        tokens = F.pad(self.vertice_map(previous[:, :-1]), (0, 0, 1, 0)) + style[:, None] + self.PPE(0, frames)
        return self.vertice_map_r(self.transformer_decoder(tokens, self.transformer_decoder.cross(memory)))

    def check_window(self, frames: int) -> None:
        """Raises ValueError when a window is empty or longer than the network was trained for."""
        if not 0 < frames <= self.window:
            raise ValueError(f"A window of {frames} frames was given, expected 1 to {self.window}: split longer sequences.")


@contextmanager
def one_thread(values: int) -> Iterator[None]:
    """Run a recurrence on one processor core when the tensor it carries has too few values for its products to be shared.

    Threads gain little there, and where another program is busy each of the many products waits for the slower thread,
    which makes decoding 30 times slower.
    """
    if values >= WORTH_SHARING:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PreparedDecoder:
    """A MotionDecoder made ready to decode, frame by frame, with everything computed that no prediction changes.

    Only the previous output D (18 or 63 numbers) is new at a step, and up to the softmax all is affine in it: the token
    x_i = M D + c_i, its query, its key, and, as attention is a weighted sum, each head's value already brought through
    the output projection. These maps of D and their constants for every position are composed once. No gradients flow.
    """

    @torch.inference_mode()
    def __init__(self, network: MotionDecoder, style: Tensor) -> None:
        self.network = network
        self.layer = network.transformer_decoder.layers[0]
        attention = self.layer.self_attn
        self.heads = attention.heads
        dim = style.shape[1]
        self.sizes = (dim, dim, dim, self.heads * dim)  # token, query, key, values brought out
        constant = style + network.PPE(0, network.window)[:, None]  # c_i [window, rows, dim]
        constant[1:] += network.vertice_map.bias
        tokens = torch.cat([constant.flatten(0, 1), network.vertice_map.weight.t()])  # all c_i, and the columns of M
        maps = self._mapped(tokens, F.linear(tokens, attention.in_proj_weight))
        bias = self._mapped(attention.out_proj.bias, attention.in_proj_bias)
        constants, self.weight = maps.tensor_split([-network.vertice_map.in_features])
        self.constants = (constants + bias).unflatten(0, constant.shape[:2])  # [window, rows, sum(sizes)]; weight [outputs, ..]

    def _mapped(self, tokens: Tensor, projected: Tensor) -> Tensor:
        """Tokens [..., dim] and their projection [..., 3 dim] to what a step needs of them, [..., sum(sizes)]."""
        query, key, value = projected.chunk(3, dim=-1)
        out = self.layer.self_attn.out_proj.weight.unflatten(1, (self.heads, -1))  # [dim, heads, head_dim]
        brought_out = torch.einsum("...hi,dhi->...hd", value.unflatten(-1, (self.heads, -1)), out).flatten(-2)
        return torch.cat([tokens, query * out.shape[2] ** -0.5, key, brought_out], dim=-1)

    @torch.inference_mode()
    def cross(self, memory: Tensor) -> Tensor:
        """What the frames draw from the memory, [..., dim] to [..., dim], as many at once as there are."""
        return self.layer.multihead_attn.diagonal(memory)

    def __call__(self, cross: Tensor, warm: Tensor | None = None) -> Tensor:
        """Predict a window frame by frame from its own predictions.

        Args: cross [rows, n, dim], of the window's n <= window frames (see `cross`); warm [rows, w, outputs], w < n: the
        last predictions of the window before, which are the first w frames of this one.
        Returns: [rows, n - w, outputs], the frames after those.
        """
        self.network.check_window(cross.shape[1])
        with torch.inference_mode(), one_thread(cross[:, 0].numel()):
            outputs = self._decode(cross, warm)
        return outputs.clone()  # outside inference mode, so that it may take part in training

    def _decode(self, cross: Tensor, warm: Tensor | None) -> Tensor:
        rows, frames, dim = cross.shape
        heads, layer, out = self.heads, self.layer, self.network.vertice_map_r
        drawn, constants = cross.unbind(1), self.constants.unbind()  # n times [rows, dim], [rows, sum(sizes)]
        keys = cross.new_empty(frames, rows * heads, dim // heads)
        values = cross.new_empty(frames, rows * heads, dim)
        new_keys, new_values = keys.view(frames, rows, -1).unbind(), values.view(frames, rows, -1).unbind()

        # The tokens known beforehand: the style alone, then the warm frames.
        known = 1 if warm is None else 1 + warm.shape[1]
        tokens = self.constants[:known].clone()
        if warm is not None:
            tokens[1:] += warm.transpose(0, 1) @ self.weight
        x, query, key, value = tokens.split(self.sizes, dim=-1)
        keys[:known] = key.reshape(known, rows * heads, -1)
        values[:known] = value.reshape(known, rows * heads, -1)
        x, query = x[-1], query[-1]

        # Every operation costs some microseconds here, so the layers' own functions are called on their weights.
        norms = [((dim,), norm.weight, norm.bias, norm.eps) for norm in (layer.norm1, layer.norm2, layer.norm3)]
        up, down, back = (linear.weight.t() for linear in (layer.linear1, layer.linear2, out))
        outputs = []
        for frame in range(known - 1, frames):
            if outputs:
                token = torch.addmm(constants[frame], outputs[-1], self.weight)
                x, query, key, value = token.split(self.sizes, dim=-1)
                new_keys[frame].copy_(key)
                new_values[frame].copy_(value)
            seen = frame + 1
            scores = torch.bmm(query.reshape(rows * heads, 1, -1), keys[:seen].permute(1, 2, 0))
            attended = torch.bmm(scores.softmax(dim=-1), values[:seen].transpose(0, 1))
            x = torch.layer_norm(attended.view(rows, heads, dim).sum(dim=1) + x, *norms[0])
            x = torch.layer_norm(x + drawn[frame], *norms[1])
            hidden = torch.addmm(layer.linear1.bias, x, up).relu_()
            x = torch.layer_norm(torch.addmm(layer.linear2.bias, hidden, down) + x, *norms[2])
            outputs.append(torch.addmm(out.bias, x, back))
        return torch.stack(outputs, dim=1)
