"""Train LAC, the style encoder and EMC on the features of a finished audio encoder.

All decoders are trained as they run: frame by frame from their own predictions, over two windows of which the second
starts from the end of the first. Errors are measured on the face mesh (landmark displacements in inter-ocular distances), so
that what counts is what one sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import uniform_filter1d
from torch import Tensor, nn
from torch.nn import functional as F

from ..keypoints import EMOTIONS, FPS, LIPS, NUM_KEYPOINTS
from ..networks.audio_encoder import AudioEncoder
from ..networks.decoder import MotionDecoder, flatten_keypoints, windows
from ..networks.emotion import EmotionPredictor
from ..networks.predictor import LipPredictor
from ..networks.style_encoder import STYLE_FRAMES, StyleEncoder
from ..speech import mel_windows
from .augment import REVERB_FRAMES, augment, cut
from .corpus import Corpus
from .expressions import LIP_VALUES, VALUES, Expressions, FacePrior
from .styles import STYLES, apply_style

WINDOW, OVERLAP = 25, 5
STRIDE = WINDOW - OVERLAP
LAC_DIM, LAC_FF = 192, 384
EMC_DIM, EMC_FF = 128, 256
SCALE = 1.39  # mean scale s of real keypoints: the predictors work at it
UNIT = 0.02  # motion is trained in this unit of K space, which is folded into the weights afterwards
SCALES = (1.15, 1.65)
FACEGOOD_SHARE = 0.08  # of the frames; its controls hardly cover widening and press
EMOTION_OPENING = {"sad": 0.85, "angry": 1.1, "surprised": 1.1, "fear": 0.95, "disgusted": 0.9}


@dataclass(frozen=True)
class Take:
    """One clip as one speaker says it, at 25 frames a second: features [T, 512], curves [T, 4], level [T] in 0..1."""

    features: Tensor
    curves: np.ndarray
    level: np.ndarray
    voice: str


@torch.no_grad()
def encode_corpus(
    encoder: AudioEncoder, corpus: Corpus, *, frames: int, seed: int, report: Callable[[str], None] = print
) -> list[Take]:
    """Features of randomly chosen, augmented clips, about `frames` video frames in all.

    Every clip starts and ends with silence (with the room's noise in it), one in eight is left as clean as it was made.
    """
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    folded = encoder.folded()
    takes, done, started = [], 0, time.monotonic()
    engines = np.array([voice.split(":")[0] for voice in corpus.voices])
    order = [index for _ in range(8) for index in random.permutation(corpus.clips)]
    facegood = 0
    for index in order:
        if done >= frames:
            break
        mel, curves, _ = (torch.from_numpy(array) for array in corpus.clip(index))
        first, count = 0, len(mel)
        if engines[index] == "facegood":  # long clips, a small share: 20 s at a time
            if facegood > FACEGOOD_SHARE * done:
                continue
            count = 1600
            first = int(random.integers(0, max(1, len(mel) - count)))
        rate = random.uniform(0.85, 1.2)
        length = int(min(count, len(mel) - first) / rate)
        heard = F.pad(cut(mel, first, length, rate).t(), (240 // 5 * 2 + REVERB_FRAMES, 96), value=-4.0).t()
        strength = 0.0 if random.random() < 0.125 else 1.0
        heard = augment(heard[None], generator, strength)[0]
        video = int(len(heard) / 3.2)
        instants = torch.arange(video) * 3.2 - 96  # mel frames of the cut clip at which the video frames stand
        track = cut_at(curves, first + rate * instants, first, first + count)
        level = torch.from_numpy(speech_level(mel.numpy()))
        level = cut_at(level[:, None], first + rate * instants, first, first + count)[:, 0]
        features = torch.cat([folded(mel_windows(heard, min(64, video - i), i)) for i in range(0, video, 64)])
        takes.append(Take(features, track.numpy(), level.numpy(), corpus.voices[index]))
        done += video
        facegood += video if engines[index] == "facegood" else 0
        if len(takes) % 100 == 0:
            report(f"encoded {done}/{frames} frames ({time.monotonic() - started:.0f} s)")
    return takes


def cut_at(track: Tensor, instants: Tensor, first: int, last: int) -> Tensor:
    """Values at fractional positions; before `first` and from `last` on, silence: zero, and the lips lightly together."""
    last = min(last, len(track))
    at = instants.clamp(first, last - 1)
    lower = at.floor().long()
    values = torch.lerp(track[lower], track[(lower + 1).clamp(max=len(track) - 1)], (at - lower)[:, None].float())
    silent = ((instants < first) | (instants > last - 1))[:, None]
    rest = torch.tensor([0.0, 0.05, 0.0, 0.15]) if track.shape[1] == 4 else torch.zeros(1)
    return torch.where(silent, rest, values)


def speech_level(mel: np.ndarray) -> np.ndarray:
    """How loud the speech is, 0 (30 dB below the loud passages) to 1, over 0.25 s: mel [n, 80] to [n] float32."""
    power = (10 ** ((mel + 4) * 1.25 - 10)).mean(axis=1)
    level = 10 * np.log10(uniform_filter1d(power, 20, mode="nearest") + 1e-9)
    return np.clip(1 + (level - np.percentile(level, 90)) / 30, 0, 1).astype(np.float32)


class Targets:
    """What the keypoints should do: expression relative to K_und, times the scale, as the networks are to put it out."""

    def __init__(self, prior: FacePrior) -> None:
        self.prior = prior
        self.expressions = Expressions.design(prior)
        self.closing = self.expressions.mouth[0] / float(self.expressions.mouth[0] @ prior.measure("gap"))

    def lips(self, curves: np.ndarray) -> np.ndarray:
        """Mouth curves [T, 4] to delta on all keypoints, only the lips not zero: [T, 63]."""
        resting = np.zeros(VALUES)
        resting[LIP_VALUES] = self.prior.neutral_exp[LIP_VALUES]
        return resting + self.expressions.articulate(curves)

    def emotional(self, curves: np.ndarray, level: np.ndarray, emotion: int) -> np.ndarray:
        """The whole face speaking under an emotion: [T, 4], [T] to [T, 63].

        The emotion grows with the voice (0.85 in silence to 1.15). What it opens the mouth gives way where speech closes
        the lips or opens them itself.
        """
        gain = EMOTION_OPENING.get(EMOTIONS[emotion], 1.0)
        face = self.lips(curves * np.array([gain, 1.0, 1.0, 1.0]))
        shape = self.expressions.emotions[emotion]
        gap = float(shape @ self.prior.measure("gap"))
        yielding = np.maximum(np.clip((curves[:, 3] - 0.4) / 0.5, 0, 1), 0.7 * np.clip(curves[:, 0], 0, 1))
        strength = 0.85 + 0.3 * level
        return face + strength[:, None] * (shape - max(gap, 0.0) * yielding[:, None] * self.closing)


def to_tensor(motion: np.ndarray, keypoints: tuple[int, ...]) -> Tensor:
    """Expression [T, 63] to the networks' layout for some keypoints, in K space at SCALE: [T, 3 K]."""
    points = torch.from_numpy(motion.reshape(-1, NUM_KEYPOINTS, 3)[:, list(keypoints)]).float() * SCALE
    return flatten_keypoints(points)


class MeshError(nn.Module):
    """Squared error of motion on the face mesh and of its speed: landmarks in units of 0.02 inter-ocular distances.

    Lips that should touch but don't count more than any other error: a missed closure is what one notices first.
    """

    def __init__(self, prior: FacePrior, keypoints: tuple[int, ...]) -> None:
        super().__init__()
        rows = [3 * k + axis for axis in range(3) for k in keypoints]  # the networks' layout
        moving = prior.basis[rows][:, :, :2].reshape(len(rows), -1) * (UNIT / 0.02 / SCALE)
        visible = moving @ moving.T / 60  # about as many landmarks as the lips have
        unseen = np.eye(len(rows)) * (UNIT / 0.01 / SCALE) ** 2 / len(rows)
        gap = prior.measure("gap")
        resting = np.zeros(VALUES)
        resting[LIP_VALUES] = prior.neutral_exp[LIP_VALUES]
        self.register_buffer("metric", torch.from_numpy(np.linalg.cholesky(visible + unseen)).float())
        self.register_buffer("gap", torch.from_numpy(gap[rows] * (UNIT / SCALE)).float())
        self.still_gap = float(prior.neutral[14, 1] - prior.neutral[13, 1] - resting @ gap)

    def forward(self, predicted: Tensor, true: Tensor, closed: Tensor) -> Tensor:
        """Args: motion [rows, n, d] each, in UNIT; closed [rows, n] in 0..1, where the lips have to meet."""
        wanted, got = (self.still_gap + motion @ self.gap for motion in (true, predicted))  # inter-ocular distances
        gap = ((got - wanted) / 0.012).square() * (0.15 + 0.6 * closed)
        apart = F.relu(got - wanted.clamp(min=0.005)) / 0.012 * (wanted < 0.02)
        return self.shape(predicted, true) + gap.mean() + 1.5 * apart.square().mean()

    def shape(self, predicted: Tensor, true: Tensor) -> Tensor:
        """The part that is the same whatever the lips should do."""
        error = predicted - true
        speed = (error.diff(dim=1) @ self.metric).square().mean()
        return (error @ self.metric).square().mean() + 1.5 * speed


class Draws:
    """Random stretches of two windows, in a random style or emotion."""

    def __init__(self, takes: list[Take], targets: Targets, seed: int) -> None:
        self.takes = [take for take in takes if len(take.curves) > OVERLAP + 2 * WINDOW]
        self.targets = targets
        self.random = np.random.default_rng(seed)
        lengths = np.array([len(take.curves) for take in self.takes], dtype=float)
        self.weights = lengths / lengths.sum()
        self.styled = [[None] * len(STYLES) for _ in self.takes]

    def curves(self, take: int, style: int) -> np.ndarray:
        if self.styled[take][style] is None:
            self.styled[take][style] = apply_style(self.takes[take].curves, STYLES[style], FPS).astype(np.float32)
        return self.styled[take][style]

    def stretch(self) -> tuple[int, int]:
        take = int(self.random.choice(len(self.takes), p=self.weights))
        return take, int(self.random.integers(OVERLAP, len(self.takes[take].curves) - WINDOW - STRIDE))

    def lips(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features [rows, 45, 512], motion [rows, 45, 18] in UNIT, closed [rows, 45], style ids [rows]."""
        parts = []
        for _ in range(rows):
            take, first = self.stretch()
            style = int(self.random.integers(len(STYLES)))
            span = slice(first, first + WINDOW + STRIDE)
            curves = self.curves(take, style)[span]
            moving = to_tensor(self.targets.lips(curves), LIPS) / UNIT
            parts.append((self.takes[take].features[span], moving, _closed(curves), style))
        features, motion, closed, styles = zip(*parts, strict=True)
        return torch.stack(features), torch.stack(motion), torch.stack(closed), torch.tensor(styles)

    def emotions(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features [rows, 45, 512]; by emotion, motion [8 rows, 45, 63] in UNIT, closed [8 rows, 45]; codes [8 rows, 8]."""
        features, motion, closed = [], [[] for _ in EMOTIONS], []
        everywhere = tuple(range(NUM_KEYPOINTS))
        for _ in range(rows):
            take, first = self.stretch()
            span = slice(first, first + WINDOW + STRIDE)
            chosen = self.takes[take]
            features.append(chosen.features[span])
            closed.append(_closed(chosen.curves[span]))
            for emotion in range(len(EMOTIONS)):
                moving = self.targets.emotional(chosen.curves[span], chosen.level[span], emotion)
                motion[emotion].append(to_tensor(moving, everywhere) / UNIT)
        codes = torch.eye(len(EMOTIONS)).repeat_interleave(rows, dim=0)
        stacked = torch.cat([torch.stack(rows_of_emotion) for rows_of_emotion in motion])
        return torch.stack(features), stacked, torch.stack(closed).repeat(len(EMOTIONS), 1), codes


def _closed(curves: np.ndarray) -> Tensor:
    return torch.from_numpy(np.clip((curves[:, 3] - 0.5) / 0.4, 0, 1)).float()


def rollout(network: MotionDecoder, memory: Tensor, style: Tensor, warm: Tensor | None = None) -> Tensor:
    """Decode a window from its own predictions, with gradients through all of them.

    Args: memory [rows, n, dim]; style [rows, dim]; warm [rows, w, d], fed as the first w predictions.
    Returns: [rows, n - w, d], the frames after the warm ones (the same as `PreparedDecoder` gives without gradients).
    """
    given = 0 if warm is None else warm.shape[1]
    cross = network.transformer_decoder.cross(memory)
    caches = network.transformer_decoder.caches(memory.shape[1])
    token, outputs = style, []
    for frame in range(memory.shape[1]):
        positioned = token[:, None] + network.PPE(frame, 1)
        hidden = network.transformer_decoder(positioned, [term[:, frame : frame + 1] for term in cross], caches)
        if frame >= given:
            outputs.append(network.vertice_map_r(hidden[:, 0]))
        previous = warm[:, frame] if frame < given else outputs[-1]
        token = network.vertice_map(previous) + style
    return torch.stack(outputs, dim=1)


def free_running_loss(decode, motion: Tensor, closed: Tensor, error, random: np.random.Generator) -> Tensor:
    """Loss of two windows decoded from their own predictions.

    Args: decode(window number, warm or None) -> [rows, 25 - w, d]; motion [rows, 45, d]; closed [rows, 45];
    error(predicted, true, closed) -> loss. The first window starts cold or from true frames with noise and a wrong size,
    as the refiner or another face may leave them.
    """
    warm = None
    if random.random() < 0.5:
        size = torch.from_numpy(random.uniform(0.8, 1.25, (len(motion), 1, 1))).float()
        warm = motion[:, :OVERLAP] * size + 0.3 * torch.randn(len(motion), 1, motion.shape[2])
    first = decode(0, warm)
    begin = 0 if warm is None else OVERLAP
    loss = error(first, motion[:, begin:WINDOW], closed[:, begin:WINDOW])
    second = decode(1, first[:, -OVERLAP:].detach())
    return loss + error(second, motion[:, WINDOW:], closed[:, WINDOW:])


def train_lips(
    takes: list[Take], targets: Targets, *, steps: int, rows: int = 64, rate: float = 2e-3, seed: int = 0,
    report: Callable[[str], None] = print,
) -> tuple[LipPredictor, list[float]]:
    """The lip predictor: `rows` stretches a step."""
    torch.manual_seed(seed)
    predictor = LipPredictor(styles=len(STYLES), dim=LAC_DIM, ff_dim=LAC_FF, window=WINDOW)
    draws, error = Draws(takes, targets, seed), MeshError(targets.prior, LIPS)

    def loss_of() -> Tensor:
        features, motion, closed, ids = draws.lips(rows)
        style = predictor.style(ids)
        memory = predictor.audio_feature_map(features)
        heard = (memory[:, :WINDOW], memory[:, STRIDE:])

        def decode(window: int, warm: Tensor | None) -> Tensor:
            return rollout(predictor, heard[window], style, warm)

        return free_running_loss(decode, motion, closed, error, draws.random)

    spoken = np.concatenate([take.curves for take in draws.takes[:20]])
    mean = to_tensor(targets.lips(spoken), LIPS).mean(0)
    return predictor, _optimise("LAC", predictor, mean, loss_of, steps, rate, report)


def train_emotions(
    takes: list[Take], targets: Targets, *, steps: int, rows: int = 8, rate: float = 2e-3, seed: int = 0,
    report: Callable[[str], None] = print,
) -> tuple[EmotionPredictor, list[float]]:
    """The emotion predictor.

    A step sees all eight emotions of its stretches, which differ by emotion alone; what they differ by from neutral is EMC's
    output and counts most.
    """
    torch.manual_seed(seed)
    predictor = EmotionPredictor(styles=1, dim=EMC_DIM, ff_dim=EMC_FF, window=WINDOW)
    everywhere = tuple(range(NUM_KEYPOINTS))
    draws, error = Draws(takes, targets, seed), MeshError(targets.prior, everywhere)

    def loss_of() -> Tensor:
        memory, style, motion, closed = _emotional_windows(predictor, draws, rows)
        memory = (memory[:, :WINDOW], memory[:, WINDOW:])

        def decode(window: int, warm: Tensor | None) -> Tensor:
            return rollout(predictor, memory[window], style, warm)

        def with_difference(predicted: Tensor, true: Tensor, closed: Tensor) -> Tensor:
            differences = (moving - moving[:rows].repeat(len(EMOTIONS), 1, 1) for moving in (predicted, true))
            return 0.1 * error(predicted, true, closed) + error.shape(predicted, true) + 8.0 * error.shape(*differences)

        return free_running_loss(decode, motion, closed, with_difference, draws.random)

    mean = to_tensor(targets.lips(np.concatenate([take.curves for take in draws.takes[:20]])), everywhere).mean(0)
    return predictor, _optimise("EMC", predictor, mean, loss_of, steps, rate, report)


def _emotional_windows(predictor: EmotionPredictor, draws: Draws, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """memory [8 rows, 50, dim] of two windows, style [8 rows, dim], motion [8 rows, 45, 63] and closed [8 rows, 45]."""
    features, motion, closed, codes = draws.emotions(rows)
    both = torch.cat([features[:, :WINDOW], features[:, STRIDE:]])
    memory = predictor.condition(both, codes.unflatten(0, (len(EMOTIONS), rows)).repeat(1, 2, 1).flatten(0, 1))
    memory = memory.unflatten(0, (len(EMOTIONS), 2, rows))  # emotion, window, stretch
    memory = torch.cat([memory[:, 0], memory[:, 1]], dim=2).flatten(0, 1)
    return memory, predictor.style(torch.zeros(len(codes), dtype=torch.long)), motion, closed


def _optimise(name: str, network: MotionDecoder, mean: Tensor, loss_of, steps: int, rate: float, report) -> list[float]:
    """Adam with a one-cycle schedule, in UNIT; the output layer starts at the mean motion [d], near zero weights."""
    _change_unit(network, UNIT)
    network.train()
    with torch.no_grad():
        network.vertice_map_r.bias.copy_(mean / UNIT)
        nn.init.normal_(network.vertice_map_r.weight, std=0.02)
        network.vertice_map.reset_parameters()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.005, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    losses = _descend(name, network, optimizer, schedule, loss_of, steps, report)
    _change_unit(network, 1 / UNIT)
    network.eval()
    return losses


def _descend(name: str, network: nn.Module, optimizer, schedule, loss_of, steps: int, report) -> list[float]:
    """Follow the gradients of loss_of() for some steps; returns the loss of every step."""
    losses, shown, started = [], 0.0, time.monotonic()
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        shown = losses[-1] if step == 0 else 0.95 * shown + 0.05 * losses[-1]
        if step % 50 == 0 or step == steps - 1:
            report(f"{name} {step + 1}/{steps} loss {shown:.3f} ({time.monotonic() - started:.0f} s)")
    return losses


@torch.no_grad()
def _change_unit(network: MotionDecoder, unit: float) -> None:
    """Let the network read and write motion in another unit, the same otherwise."""
    network.vertice_map.weight.mul_(unit)
    network.vertice_map_r.weight.div_(unit)
    network.vertice_map_r.bias.div_(unit)


def train_style_encoder(
    predictor: LipPredictor, takes: list[Take], targets: Targets, *, steps: int, rows: int = 32, seed: int = 2,
    report: Callable[[str], None] = print,
) -> tuple[StyleEncoder, list[float]]:
    """The style encoder: 100 frames of somebody's lips to the embedding of the style that moves most like them."""
    torch.manual_seed(seed)
    encoder = StyleEncoder(styles=len(STYLES), dim=LAC_DIM, ff_dim=LAC_FF).train()
    draws = Draws([take for take in takes if len(take.curves) > STYLE_FRAMES + OVERLAP], targets, seed)
    embeddings = predictor.obj_vector.weight.detach().t()
    spread = embeddings.std()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=6e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=steps + 1)
    with torch.no_grad():
        encoder.vertice_map.weight.mul_(0.3 / UNIT)  # lips move by a few hundredths

    def loss_of() -> Tensor:
        motion, heard, ids = [], [], draws.random.integers(len(STYLES), size=rows)
        for style in ids:
            take = int(draws.random.choice(len(draws.takes), p=draws.weights))
            first = int(draws.random.integers(0, len(draws.takes[take].curves) - STYLE_FRAMES))
            curves = draws.curves(take, int(style))[first : first + STYLE_FRAMES]
            motion.append(to_tensor(targets.lips(curves), LIPS))
            heard.append(draws.takes[take].features[first : first + STYLE_FRAMES])
        motion = torch.stack(motion)
        half = rows // 2  # these move as the predictor moves them: its own styles must be read back, too
        motion[:half] = _speak(predictor, torch.stack(heard[:half]), torch.from_numpy(ids[:half]))
        scale = torch.from_numpy(draws.random.uniform(*SCALES, (rows, 1, 1))).float() / SCALE
        person = 0.002 * torch.randn(rows, 1, 18)  # a face's own resting expression
        motion = scale * motion + person + 0.001 * torch.randn(rows, STYLE_FRAMES, 18)
        truth = torch.from_numpy(ids)
        embedding = encoder(motion)
        distance = F.mse_loss(embedding / spread, embeddings[truth] / spread)
        return distance + 0.5 * F.cross_entropy(encoder.cls(embedding), truth)

    losses = _descend("style encoder", encoder, optimizer, schedule, loss_of, steps, report)
    return encoder.eval(), losses


@torch.no_grad()
def _speak(predictor: LipPredictor, features: Tensor, ids: Tensor) -> Tensor:
    """The predictor over several windows: features [rows, n, 512], style ids [rows] to lips in K space [rows, n, 18]."""
    memory, style = predictor.audio_feature_map(features), predictor.style(ids)
    pieces: list[Tensor] = []
    for start, end, warm in windows(features.shape[1], WINDOW):
        pieces.append(rollout(predictor, memory[:, start:end], style, pieces[-1][:, -warm:] if warm else None))
    return torch.cat(pieces, dim=1)
