"""Golden numbers: hold the networks to what the authors' own code computed, without anybody's weights.

A golden file (.safetensors) holds inputs and outputs of a network whose weights were drawn by a recipe: every floating
tensor from its own generator, seeded by (seed, crc32 of its key). A network with the same keys and shapes, filled by
the same recipe, must give the same outputs. The metadata entry `golden` is JSON with the configuration.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import MotionModel
from ..emc import emotion_motion, mix_regions
from ..keypoints import EMOTIONS, LIPS, NUM_KEYPOINTS, Deformation, Keypoints, add_deformations, rotation_matrix
from ..lac import edit_articulation, kalman_smooth, lip_offsets, style_embedding
from ..networks.audio_encoder import AudioEncoder
from ..networks.decoder import flatten_keypoints
from ..networks.emotion import EmotionPredictor
from ..networks.liveportrait.appearance import AppearanceFeatureExtractor
from ..networks.liveportrait.generator import SpadeGenerator, SpectralConv2d
from ..networks.liveportrait.inference import fused_appearance, fused_generator, fused_motion, fused_warping
from ..networks.liveportrait.motion import MotionExtractor
from ..networks.liveportrait.retargeting import StitchingRetargeting
from ..networks.liveportrait.warping import WarpingModule
from ..networks.predictor import LipPredictor, Refiner
from ..networks.style_encoder import StyleEncoder
from ..speech import encode_speech, mel_spectrogram

# The largest difference allowed, relative to the tensor's own standard deviation, in float32.
NETWORK_TOLERANCE = 2e-4
SEQUENCE_TOLERANCE = 1e-3

Network = TypeVar("Network", bound=nn.Module)


class Row(NamedTuple):
    """One comparison. difference: the largest, relative to the standard deviation of the expected tensor (None: not
    compared, `note` says why)."""

    file: str
    tensor: str
    difference: float | None
    tolerance: float
    ok: bool
    note: str = ""


def verify(folder: str | Path, device: torch.device | str = "cpu") -> list[Row]:
    """Recompute every golden file in a folder on a device, printing a line per tensor.

    Returns the lines; all is well when every row is `ok`. Raises FileNotFoundError when the folder has no golden file,
    ValueError when a file can't be read.
    """
    folder, device = Path(folder), torch.device(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give the one that holds the golden .safetensors files.")
    rows = []
    for file in sorted(folder.glob("*.safetensors")):
        golden = read_golden(file)
        if golden is None:
            continue
        compare = COMPARISONS.get(file.stem)
        if compare is None:
            rows.append(Row(file.name, "-", None, 0.0, True, "not covered by this version"))
            _print(rows[-1])
            continue
        tensors, config = golden
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        try:
            with torch.no_grad():
                for tensor, actual, tolerance in compare(tensors, config, device):
                    difference = relative_difference(actual, tensors[tensor])
                    rows.append(Row(file.name, tensor, difference, tolerance, difference <= tolerance))
                    _print(rows[-1])
        except KeyError as error:
            raise ValueError(f"{file} has no {error}, expected a golden file of {file.stem}: copy it again.") from None
    if not rows:
        raise FileNotFoundError(
            f"There is no golden file in {folder}: give the folder that holds audio_encoder.safetensors etc."
        )
    return rows


def _print(row: Row) -> None:
    if row.difference is None:
        print(f"{row.file:36} {row.note}")
    else:
        verdict = "ok" if row.ok else "TOO LARGE"
        print(f"{row.file:36} {row.tensor:18} {row.difference:9.1e}  (at most {row.tolerance:.0e})  {verdict}")


def read_golden(file: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The tensors and the configuration of a golden file; None when it is some other .safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            if "golden" not in metadata:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(metadata["golden"])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is not a complete golden file ({error}): copy it again.") from None


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| over the standard deviation of expected; infinite when shapes differ or a value is NaN."""
    if actual.shape != expected.shape:
        return math.inf
    difference = ((actual.double() - expected.double()).abs().max() / expected.double().std()).item()
    return math.inf if math.isnan(difference) else difference


def recipe(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Recipe v1: the float32 values of one tensor of a state dict."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    if key.endswith("running_var"):
        return (1.0 + 0.2 * generator.random(shape)).astype(np.float32)
    if key.endswith("running_mean"):
        return (0.1 * generator.standard_normal(shape)).astype(np.float32)
    if len(shape) <= 1:
        base = 1.0 if key.endswith("weight") else 0.0
        return (base + 0.05 * generator.standard_normal(shape)).astype(np.float32)
    return (generator.standard_normal(shape) / np.sqrt(int(np.prod(shape[1:])))).astype(np.float32)


def filled(network: Network, seed: int) -> Network:
    """The network with weights by the recipe, in eval mode; tables of positions and counters stay as built.

    The vectors of a spectral norm follow from its weight, by five rounds of power iteration.
    """
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not key.endswith("pe"):
            value.copy_(torch.from_numpy(recipe(key, tuple(value.shape), seed)))
    for module in network.modules():
        if isinstance(module, SpectralConv2d):
            module.power_iteration(5)
    return network.eval()


def golden_model(seed: int = 1, device: torch.device | str = "cpu") -> MotionModel:
    """The motion model of the golden files: the published sizes, weights by the recipe."""
    networks = AudioEncoder(), LipPredictor(), Refiner(), EmotionPredictor(), StyleEncoder()
    return MotionModel("golden", *(filled(network, seed).to(device) for network in networks))


Comparison = Iterator[tuple[str, Tensor, float]]  # name of the expected tensor, what we compute, tolerance


def compare_audio_encoder(tensors: dict[str, Tensor], config: dict, device: torch.device) -> Comparison:
    encoder = filled(AudioEncoder(), config["seed"]).to(device)
    yield "mel", mel_spectrogram(tensors["waveform"]), NETWORK_TOLERANCE
    speech = encode_speech(encoder, tensors["waveform"], config["sample_rate"])
    # Ours lasts as long as the sound; the published frames are its beginning.
    yield "features", speech.features[: len(tensors["features"])], NETWORK_TOLERANCE


def compare_lac(tensors: dict[str, Tensor], config: dict, device: torch.device) -> Comparison:
    model = golden_model(config["seed"], device)
    features = tensors["features"]
    still = tensors["reference"][list(LIPS)].expand(len(features), -1, -1)
    preset = style_embedding(model, config["person_id"])
    style = model.style_encoder(flatten_keypoints(tensors["lip_sequence"])[None])
    yield "style_embedding", style, NETWORK_TOLERANCE
    yield "raw", lip_offsets(model.lac, None, features, still, preset), SEQUENCE_TOLERANCE
    refined = lip_offsets(model.lac, model.refiner, features, still, preset)
    yield "refined", refined, SEQUENCE_TOLERANCE
    yield "reference_style", lip_offsets(model.lac, model.refiner, features, still, style), SEQUENCE_TOLERANCE
    smoothed = kalman_smooth(refined.flatten(1)).view_as(refined)
    yield "smoothed", smoothed, SEQUENCE_TOLERANCE
    motion = features.new_zeros(len(features), NUM_KEYPOINTS, 3)
    motion[:, LIPS] = config["lip_scale"] * smoothed
    yield "edited", edit_articulation(motion, **dict(config["edits"]))[:, LIPS], SEQUENCE_TOLERANCE


def compare_emc(tensors: dict[str, Tensor], config: dict, device: torch.device) -> Comparison:
    predictor = filled(EmotionPredictor(), config["seed"]).to(device)
    emotions = ["neutral", *(emotion for emotion, _, _ in config["conditions"])]
    codes = torch.eye(len(EMOTIONS), device=device)[[config["order"].index(emotion) for emotion in emotions]]
    motion = emotion_motion(predictor, tensors["features"], codes, style=config["person_id"])
    for emotion, predicted in zip(emotions, motion, strict=True):
        yield emotion, predicted, SEQUENCE_TOLERANCE
    rows = [
        (Deformation(predicted - motion[0]), region, intensity)
        for predicted, (_, region, intensity) in zip(motion[1:], config["conditions"], strict=True)
    ]
    frames = len(tensors["exp_in"])
    still = Keypoints(
        canonical=torch.zeros(NUM_KEYPOINTS, 3, device=device),
        rotation=torch.eye(3, device=device).expand(frames, 3, 3),
        scale=torch.full((frames,), config["scale"], device=device),
        translation=torch.zeros(frames, 3, device=device),
        expression=tensors["exp_in"],
    )
    yield "exp_out", add_deformations(still, [mix_regions(rows)]).expression, SEQUENCE_TOLERANCE


def compare_liveportrait(tensors: dict[str, Tensor], config: dict, device: torch.device) -> Comparison:
    """In the inference forms that draw; the file holds every so many values of the larger tensors."""
    seed, winograd = config["seed"], device.type == "cpu"
    volume = fused_appearance(filled(AppearanceFeatureExtractor(), seed)).to(device)(tensors["image"])
    yield "feature", volume[:, ::4, ::2, ::4, ::4], NETWORK_TOLERANCE

    motion = fused_motion(filled(MotionExtractor(), seed)).to(device)(tensors["image"])
    rotation = rotation_matrix(motion.pitch, motion.yaw, motion.roll)
    keypoints = Keypoints(motion.canonical[0], rotation, motion.scale, motion.translation, motion.expression)
    yield "kp", motion.canonical, NETWORK_TOLERANCE
    yield "exp", motion.expression, NETWORK_TOLERANCE
    yield "t", motion.translation, NETWORK_TOLERANCE
    yield "rotation", rotation, NETWORK_TOLERANCE
    yield "k_ori", keypoints.posed(), NETWORK_TOLERANCE

    warping = fused_warping(filled(WarpingModule(), seed), winograd=winograd).to(device)
    warp = warping(volume, tensors["kp_source"], tensors["kp_driving"])
    yield "occlusion", warp.occlusion, NETWORK_TOLERANCE
    yield "deformation", warp.deformation[:, ::4, ::4, ::4], NETWORK_TOLERANCE
    yield "warped", warp.feature[:, ::8, ::2, ::2], NETWORK_TOLERANCE

    generator = fused_generator(filled(SpadeGenerator(), seed), winograd=winograd).to(device)
    yield "rendered", generator(warp.feature)[:, :, ::4, ::4], NETWORK_TOLERANCE


def compare_stitching_retargeting(tensors: dict[str, Tensor], config: dict, device: torch.device) -> Comparison:
    networks = StitchingRetargeting().to(device)
    for network in networks.children():  # the recipe knows each by its own keys
        filled(network, config["seed"])
    source, driving = tensors["kp_source"], tensors["kp_driving"]
    pair = torch.cat([source.flatten(1), driving.flatten(1)], dim=1)
    yield "stitching", networks.retarget_shoulder_module(pair), NETWORK_TOLERANCE
    lip, eye = (torch.tensor([config[name]], device=device) for name in ("lip_ratio", "eye_ratio"))
    yield "lip", networks.lip_offsets(source, lip).flatten(1), NETWORK_TOLERANCE
    yield "eyes", networks.eye_offsets(source, eye).flatten(1), NETWORK_TOLERANCE


COMPARISONS: dict[str, Callable[[dict[str, Tensor], dict, torch.device], Comparison]] = {
    "audio_encoder": compare_audio_encoder,
    "lac": compare_lac,
    "emc": compare_emc,
    "liveportrait": compare_liveportrait,
    "stitching_retargeting": compare_stitching_retargeting,
}
