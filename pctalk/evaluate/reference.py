"""The published decoding scheme, written plainly: what the fast one must equal, and what it is timed against.

At every step the whole window decoded so far runs through torch's own nn.TransformerDecoder again, cross-attention is
computed over all memory frames under a diagonal mask, windows run one after another, and so do emotions.
"""

from __future__ import annotations

import time
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints import MotionModel
from ..emc import emotion_motion
from ..keypoints import EMOTIONS, LIPS, NUM_KEYPOINTS
from ..lac import lip_offsets, style_embedding
from ..networks.audio_encoder import AudioEncoder
from ..networks.decoder import Decoder, flatten_keypoints, unflatten_keypoints
from ..networks.emotion import AudioEmotionFormer, EmotionPredictor
from ..networks.predictor import LipPredictor, Refiner


class MotionTimings(NamedTuple):
    """Median seconds that LAC and EMC take, the fast scheme and the published one."""

    fast: float
    published: float

    @property
    def speedup(self) -> float:
        return self.published / self.fast


def torch_decoder(decoder: Decoder) -> nn.TransformerDecoder:
    """torch's nn.TransformerDecoder with the weights of ours."""
    layer = decoder.layers[0]
    dim, ff_dim = layer.linear1.in_features, layer.linear1.out_features
    torch_layer = nn.TransformerDecoderLayer(dim, layer.self_attn.heads, ff_dim, batch_first=True)
    reference = nn.TransformerDecoder(torch_layer, len(decoder.layers))
    reference.load_state_dict(decoder.state_dict())
    return reference.to(layer.linear1.weight.device).eval()


def masks(frames: int, window: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """FaceFormer's masks: the causal one with its per-head bias [heads, n, n], and the diagonal one [n, n], for memories.

    The bias is -slope * (frames between // window), slopes 2^-2, 2^-4, ...: zero inside one window.
    """
    distance = torch.arange(frames, device=device)[:, None] - torch.arange(frames, device=device)
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))
    bias = -slopes[:, None, None] * (distance.clamp(min=0) // window)
    causal = bias.masked_fill(distance < 0, -torch.inf)
    diagonal = torch.zeros(frames, frames, device=device).masked_fill(distance != 0, -torch.inf)
    return causal, diagonal


def decode_window(
    predictor: LipPredictor | EmotionPredictor, decoder: nn.TransformerDecoder, memory: Tensor, style: Tensor, warm: Tensor
) -> Tensor:
    """One window of one sequence: memory [n, dim], style [dim], warm [w, outputs] to [n, outputs]."""
    frames = memory.shape[0]
    heads = predictor.transformer_decoder.layers[0].self_attn.heads
    causal, diagonal = masks(frames, predictor.window, heads, memory.device)
    tokens = torch.cat([style[None], predictor.vertice_map(warm) + style])
    while True:
        n = tokens.shape[0]
        hidden = decoder((tokens + predictor.PPE(0, n))[None], memory[None], causal[:, :n, :n], diagonal[:n])
        outputs = predictor.vertice_map_r(hidden[0])
        if n == frames:
            return outputs
        tokens = torch.cat([tokens, predictor.vertice_map(outputs[-1:]) + style])


def condition_window(former: AudioEmotionFormer, decoder: nn.TransformerDecoder, features: Tensor, emotion: Tensor) -> Tensor:
    """The audio of one window under one emotion: features [n, 512], emotion [8] one-hot to [n, dim]."""
    frames = features.shape[0]
    heads = former.transformer_decoder.layers[0].self_attn.heads
    causal, diagonal = masks(frames, former.PPE.period, heads, features.device)
    memory = former.audio_feature_map(features)
    code = former.emo_feature_map(emotion)[None]
    tokens = code
    while True:
        n = tokens.shape[0]
        hidden = decoder((tokens + former.PPE(0, n))[None], memory[None], causal[:, :n, :n], diagonal[:n])
        heard = former.audio_map_r(hidden[0])
        if n == frames:
            return former.map_output(heard)
        tokens = torch.cat([tokens, former.audio_feature_map(heard[-1:]) + code])


def cut(frames: int, window: int) -> list[tuple[int, int]]:
    """Windows (start, end) that overlap by a fifth, until the end is reached."""
    cuts = [(0, min(window, frames))]
    while cuts[-1][1] < frames:
        start = cuts[-1][1] - window // 5
        cuts.append((start, min(start + window, frames)))
    return cuts


@torch.no_grad()
def reference_lips(
    predictor: LipPredictor, refiner: Refiner | None, features: Tensor, undeformed: Tensor, style: Tensor
) -> Tensor:
    """What `lac.lip_offsets` computes, by the published scheme; the same arguments and result."""
    decoder = torch_decoder(predictor.transformer_decoder)
    reference = flatten_keypoints(undeformed)
    pieces = []
    warm = reference.new_zeros(0, reference.shape[1])
    for start, end in cut(features.shape[0], predictor.window):
        heard, still = features[start:end], reference[start:end]
        offsets = decode_window(predictor, decoder, predictor.audio_feature_map(heard), style[0], warm)
        if refiner is not None:
            offsets = refiner(still + offsets, heard) - still
        pieces.append(offsets[warm.shape[0] :])
        warm = offsets[len(offsets) - predictor.window // 5 :]
    return unflatten_keypoints(torch.cat(pieces))


@torch.no_grad()
def reference_emotions(predictor: EmotionPredictor, features: Tensor, emotions: Tensor, style: int = 0) -> Tensor:
    """What `emc.emotion_motion` computes, by the published scheme, one emotion after another."""
    decoder = torch_decoder(predictor.transformer_decoder)
    former_decoder = torch_decoder(predictor.audio_emo_former.transformer_decoder)
    embedding = predictor.style(torch.tensor(style, device=features.device))
    predicted = []
    for emotion in emotions:
        pieces = []
        warm = features.new_zeros(0, 3 * NUM_KEYPOINTS)
        for start, end in cut(features.shape[0], predictor.window):
            memory = condition_window(predictor.audio_emo_former, former_decoder, features[start:end], emotion)
            motion = decode_window(predictor, decoder, memory, embedding, warm)
            pieces.append(motion[warm.shape[0] :])
            warm = motion[len(motion) - predictor.window // 5 :]
        predicted.append(unflatten_keypoints(torch.cat(pieces)))
    return torch.stack(predicted)


def random_motion_model(dim: int = 512, ff_dim: int = 1024, styles: int = 210, window: int = 25, seed: int = 0) -> MotionModel:
    """A motion model with random weights that let motion through (a new predictor's output layer is zero)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lac = LipPredictor(styles, dim, ff_dim, window)
        emc = EmotionPredictor(40, dim, ff_dim, window)
        refiner = Refiner()
        for layer in (lac.vertice_map_r, emc.vertice_map_r, refiner.out_fc):
            layer.reset_parameters()
        model = MotionModel("random", AudioEncoder(), lac, refiner, emc)
    for network in model.networks.values():
        network.eval()
    return model


def benchmark_motion(seconds: float = 10.0, emotions: tuple[str, ...] = ("happy", "sad"), repeats: int = 5) -> MotionTimings:
    """Time LAC and EMC at the published width on the CPU, both schemes in turn on the same input.

    Args: seconds of speech at 25 frames a second; emotions beside neutral; repeats of the fast scheme (the published one
    at most three times, and no more once it has taken half a minute).
    """
    model = random_motion_model()
    generator = torch.Generator().manual_seed(0)
    frames = round(seconds * 25)
    features = torch.randn(frames, 512, generator=generator)
    undeformed = torch.randn(1, len(LIPS), 3, generator=generator).expand(frames, -1, -1)
    codes = torch.eye(len(EMOTIONS))[[0, *(EMOTIONS.index(emotion) for emotion in emotions)]]
    style = style_embedding(model, 0)

    def fast() -> None:
        lip_offsets(model.lac, model.refiner, features, undeformed, style)
        emotion_motion(model.emc, features, codes)

    def published() -> None:
        reference_lips(model.lac, model.refiner, features, undeformed, style)
        reference_emotions(model.emc, features, codes)

    def timed(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    timed(fast)  # warm up
    fast_times, published_times = [], []
    for repeat in range(repeats):
        fast_times.append(timed(fast))
        if repeat < 3 and sum(published_times) < 30.0:
            published_times.append(timed(published))
    return MotionTimings(median(fast_times), median(published_times))
