"""Networks on disk: recognise, verify, load and save.

A motion model is a folder of flat .safetensors files with the published key names:

    audio_encoder.safetensors    AudioEncoder
    lac.safetensors              LipPredictor, with the Refiner under `out_fc.`
    emc.safetensors              EmotionPredictor
    style_encoder.safetensors    StyleEncoder (may be missing: style ids still work)

Each may carry a metadata entry `pctalk_config`, JSON; what it does not say is read off the tensors. The tables `PPE.pe`
are computed by the networks and need not be stored. Files may be half precision; in memory everything is float32.

The LivePortrait networks are a folder with the five files of `LIVEPORTRAIT`. Files are told apart by the keys they hold, not
by their names, and the layouts that were published load too: .pth files, keys under `module.`, `model.` and the like.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .networks.audio_encoder import AudioEncoder
from .networks.decoder import HEADS, LONGEST, MotionDecoder
from .networks.emotion import EmotionPredictor
from .networks.liveportrait.appearance import AppearanceFeatureExtractor
from .networks.liveportrait.generator import SpadeGenerator
from .networks.liveportrait.motion import MotionExtractor
from .networks.liveportrait.retargeting import StitchingRetargeting
from .networks.liveportrait.warping import WarpingModule
from .networks.predictor import LipPredictor, Refiner
from .networks.style_encoder import StyleEncoder
from .speech import mel_filters
from .weights import SUFFIXES, read_keys, read_weights

STARTER = Path(__file__).parent / "assets" / "starter"
PUBLISHED_WINDOW = 25
WIDEST = 4096  # the published networks have 512 features
MOTION_MODEL = ("audio_encoder", "lac", "emc", "style_encoder")
LIVEPORTRAIT = {  # what `LivePortraitRenderer` calls a network: what its file is called
    "appearance": "appearance_feature_extractor",
    "motion": "motion_extractor",
    "warping": "warping_module",
    "generator": "spade_generator",
    "stitching": "stitching_retargeting_module",
}
LIVEPORTRAIT_FOLDERS = (".", "base_models", "retargeting_models")  # the last two as in the original download
RECOGNISED_BY = {  # the end of a key that a network has and those below it have not
    "audio_encoder": "0.conv_block.0.weight",
    "emc": "audio_emo_former.emo_feature_map.weight",
    "style_encoder": "pooling.W.0.weight",
    "lac": "vertice_map_r.weight",
    "appearance_feature_extractor": "resblocks_3d.3dr0.conv1.weight",
    "motion_extractor": "detector.fc_exp.weight",
    "warping_module": "dense_motion_network.mask.weight",
    "spade_generator": "G_middle_0.conv_0.weight_orig",
    "stitching_retargeting_module": "retarget_shoulder_module.mlp.0.weight",
}


@dataclass(frozen=True)
class MotionModel:
    """The networks that turn speech into motion, in eval mode and float32 on one device.

    recommended_styles: ids of `lac.obj_vector` that its makers advise, best first.
    """

    name: str
    audio_encoder: AudioEncoder
    lac: LipPredictor
    refiner: Refiner
    emc: EmotionPredictor
    style_encoder: StyleEncoder | None = None
    recommended_styles: tuple[int, ...] = (0,)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name, for moving between devices and counting parameters."""
        networks = {
            "audio_encoder": self.audio_encoder,
            "lac": self.lac,
            "refiner": self.refiner,
            "emc": self.emc,
            "style_encoder": self.style_encoder,
        }
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def styles(self) -> int:
        """How many preset styles there are: ids 0 .. styles - 1."""
        return self.lac.obj_vector.in_features

    @property
    def device(self) -> torch.device:
        return self.lac.vertice_map.weight.device

    def to(self, device: torch.device | str) -> MotionModel:
        """The same model with its networks moved (in place, as nn.Module.to does)."""
        return replace(self, **{name: network.to(device) for name, network in self.networks.items()})


def load_motion_model(path: str | Path | None = None, name: str | None = None) -> MotionModel:
    """Load a folder of files (see the module's docstring; None: the starter that ships) onto the CPU.

    Args: name: what to call the model (default: `starter`, or the folder's name).
    Raises FileNotFoundError when the folder or a file is missing, ValueError when a file is damaged, hostile, of the wrong
    kind, or its values are not finite.
    """
    mel_filters()  # imports librosa, which is slow: loading pays for it rather than the first frame
    folder = STARTER if path is None else Path(path)
    if name is None:
        name = "starter" if path is None else folder.name
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no motion model at {folder}: give the folder that holds lac.safetensors.")
    files = _find([folder], MOTION_MODEL)
    for kind in MOTION_MODEL[:3]:
        if kind not in files:
            raise FileNotFoundError(
                f"The motion model in {folder} has no {kind}.safetensors: put the file there or load another model."
            )
    audio_encoder, _ = load_network(files["audio_encoder"], "audio_encoder")
    lac, config = load_network(files["lac"], "lac")
    emc, _ = load_network(files["emc"], "emc")
    style_encoder = None
    if "style_encoder" in files:
        style_encoder, _ = load_network(files["style_encoder"], "style_encoder")
        if style_encoder.vertice_map.out_features != lac["predictor"].vertice_map.out_features:
            raise ValueError(f"The style encoder in {folder} does not fit its {files['lac'].name}: remove or replace it.")
    ids, advised = range(lac["predictor"].obj_vector.in_features), config.get("recommended_styles")
    recommended = tuple(style for style in advised if style in ids) if isinstance(advised, list) else ()
    return MotionModel(name, audio_encoder, lac["predictor"], lac["refiner"], emc, style_encoder, recommended or (0,))


def load_liveportrait(folder: str | Path) -> dict[str, nn.Module]:
    """The plain LivePortrait networks, in eval mode and float32 on the CPU, under the names that `LivePortraitRenderer` takes.

    Args: folder: holds the five files of `LIVEPORTRAIT`, .safetensors or .pth, flat or as in the original download
    (base_models, retargeting_models).
    Raises FileNotFoundError that lists what is missing, ValueError when a file is damaged, hostile or of the wrong kind.
    """
    folder = Path(folder)
    files = liveportrait_files(folder)
    if len(files) < len(LIVEPORTRAIT):
        raise FileNotFoundError(missing_sentence(folder))
    return {name: load_network(files[kind], kind)[0] for name, kind in LIVEPORTRAIT.items()}


def liveportrait_files(folder: str | Path) -> dict[str, Path]:
    """Which file of a folder (that need not exist) holds which of the networks, by the values of `LIVEPORTRAIT`."""
    return _find([Path(folder, part) for part in LIVEPORTRAIT_FOLDERS], tuple(LIVEPORTRAIT.values()))


def missing_liveportrait(folder: str | Path) -> list[str]:
    """The values of `LIVEPORTRAIT` of which a folder has no file; empty when it is complete."""
    found = liveportrait_files(folder)
    return [kind for kind in LIVEPORTRAIT.values() if kind not in found]


def missing_sentence(folder: str | Path) -> str:
    """What a folder lacks of LivePortrait, and how to get it."""
    return (
        f"{folder} lacks {', '.join(f'{file}.safetensors' for file in missing_liveportrait(folder))}: put there the files of "
        "https://huggingface.co/Kijai/LivePortrait_safetensors, or the .pth files of "
        "https://huggingface.co/KwaiVGI/LivePortrait, which `pctalk convert` turns into .safetensors."
    )


def recognise(keys: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Which network these keys belong to (a key of `RECOGNISED_BY`, or None), and its keys: published name to the one given.

    What lies beside the network in the same file, such as an optimizer's state, is left out.
    """
    published = {}
    for given in keys:
        key = ".".join(part for part in given.split(".") if part != "module")  # written by DataParallel
        for part in ("shoulder", "mouth", "eye"):
            key = key.replace(f"retarget_{part}.", f"retarget_{part}_module.")
        published[key] = given
    for kind, mark in RECOGNISED_BY.items():
        own = _below(published, mark)
        if own and kind == "lac":
            own |= _below(published, "out_fc.weight")
        if own and kind == "audio_encoder":
            own = {f"audio_encoder.{key}": given for key, given in own.items()}
        if own:
            return kind, own
    return None, {}


def _below(published: dict[str, str], mark: str) -> dict[str, str]:
    """The keys that share the prefix of the one that ends in `mark`, without it."""
    prefix = next((key.removesuffix(mark) for key in published if key == mark or key.endswith(f".{mark}")), None)
    if prefix is None:
        return {}
    return {key.removeprefix(prefix): given for key, given in published.items() if key.startswith(prefix)}


def _find(folders: list[Path], kinds: tuple[str, ...]) -> dict[str, Path]:
    """The file of each kind: one that holds the network, else one that should by its name, so that loading says what is wrong.

    Of several the one with the right name is taken, and .safetensors before .pth.
    """
    files = [file for suffix in SUFFIXES for folder in folders for file in sorted(folder.glob(f"*{suffix}"))]
    holders: dict[str, list[Path]] = {}
    for file in files:
        try:
            kind, _ = recognise(read_keys(file))
        except (OSError, ValueError):
            continue
        holders.setdefault(kind, []).append(file)
    found = {}
    for kind in kinds:
        named = [file for file in files if file.stem == kind]
        candidates = holders.get(kind) or named
        if candidates:
            found[kind] = next((file for file in candidates if file in named), candidates[0])
    return found


def save_motion_model(model: MotionModel, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write what `load_motion_model` reads, each file complete or not at all.

    Args: dtype: how numbers are stored. Raises OSError when the folder can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lac = nn.ModuleDict({"predictor": model.lac, "refiner": model.refiner})
    advised = {"recommended_styles": list(model.recommended_styles)}
    write_network(folder / "audio_encoder.safetensors", model.audio_encoder, {}, dtype)
    write_network(folder / "lac.safetensors", lac, {**configuration(lac), **advised}, dtype)
    write_network(folder / "emc.safetensors", model.emc, configuration(model.emc), dtype)
    if model.style_encoder is not None:
        write_network(folder / "style_encoder.safetensors", model.style_encoder, configuration(model.style_encoder), dtype)


def write_network(file: Path, network: nn.Module, config: dict, dtype: torch.dtype = torch.float32) -> None:
    """Write one network under its published keys, complete or not at all.

    Args: network: as `load_network` returns it; config: what the metadata entry `pctalk_config` is to hold; dtype: how
    numbers are stored. Raises OSError when the file can't be written.
    """
    from safetensors.torch import save

    stored = {}
    for part in _parts(network):
        for key, value in part.state_dict().items():
            if not key.endswith("PPE.pe"):
                stored[key] = (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
    temporary = file.with_name(f"{file.name}.part")
    try:
        # save_file would make it unreadable to other users.
        temporary.write_bytes(save(stored, {"pctalk_config": json.dumps(config)}))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _parts(network: nn.Module) -> list[nn.Module]:
    """The networks of one file: two for `lac`, otherwise the one itself."""
    return list(network.values()) if isinstance(network, nn.ModuleDict) else [network]


def configuration(network: nn.Module) -> dict:
    """The sizes of a network as its file states them; those of LivePortrait and the audio encoder are read off the tensors."""
    network = _parts(network)[0]
    if isinstance(network, StyleEncoder):
        return {"heads": network.transformer_encoder.layers[0].self_attn.num_heads}
    if not isinstance(network, MotionDecoder):
        return {}
    layer = network.transformer_decoder.layers[0]
    return {
        "feature_dim": network.vertice_map.out_features,
        "ff_dim": layer.linear1.out_features,
        "window": network.window,
        "person_num": network.obj_vector.in_features,
        "heads": layer.self_attn.heads,
    }


def _decoder_sizes(tensors: dict[str, Tensor], config: dict) -> dict[str, int]:
    """The constructor arguments of a LipPredictor or EmotionPredictor, from its tensors and configuration."""
    dim, styles = tensors["obj_vector.weight"].shape
    ff_dim = tensors["transformer_decoder.layers.0.linear1.weight"].shape[0]
    window = config.get("window") or _period(tensors.get("PPE.pe"))
    heads = config.get("heads", HEADS)
    if not 1 <= window <= LONGEST or dim > WIDEST or heads < 1 or dim % heads:
        raise ValueError(f"windows of {window} frames or {heads} heads of {dim} features make no sense")
    return {"styles": styles, "dim": dim, "ff_dim": ff_dim, "window": window, "heads": heads}


def build_network(kind: str, tensors: dict[str, Tensor], config: dict) -> nn.Module:
    """A new network of the sizes that its tensors and its file's configuration say.

    Args: kind: a key of `RECOGNISED_BY`; a `lac` file's network is a ModuleDict {"predictor", "refiner"}.
    Raises KeyError, ValueError and the like when they make no network.
    """
    if kind == "audio_encoder":
        return AudioEncoder()
    if kind == "lac":
        return nn.ModuleDict({"predictor": LipPredictor(**_decoder_sizes(tensors, config)), "refiner": Refiner()})
    if kind == "emc":
        return EmotionPredictor(**_decoder_sizes(tensors, config), style_bias="obj_vector.bias" in tensors)
    if kind == "style_encoder":
        dim = tensors["vertice_map.weight"].shape[0]
        if dim > WIDEST:
            raise ValueError(f"{dim} features make no sense")
        ff_dim = tensors["transformer_encoder.layers.0.linear1.weight"].shape[0]
        return StyleEncoder(tensors["cls.out_proj.weight"].shape[0], dim, ff_dim, config.get("heads", HEADS))
    if kind == "appearance_feature_extractor":
        return _appearance(tensors)
    if kind == "motion_extractor":
        return _motion(tensors)
    if kind == "warping_module":
        return _warping(tensors)
    if kind == "spade_generator":
        return _generator(tensors)
    return StitchingRetargeting()


def _appearance(tensors: dict[str, Tensor]) -> AppearanceFeatureExtractor:
    channels = tensors["resblocks_3d.3dr0.conv1.weight"].shape[0]
    return AppearanceFeatureExtractor(
        width=tensors["first.conv.weight"].shape[0],
        channels=channels,
        depth=tensors["second.weight"].shape[0] // channels,
        blocks=_count(tensors, "resblocks_3d.3dr{}.conv1.weight"),
    )


def _motion(tensors: dict[str, Tensor]) -> MotionExtractor:
    stages = _count(tensors, "detector.stages.{}.0.dwconv.weight")
    return MotionExtractor(
        depths=[_count(tensors, f"detector.stages.{stage}.{{}}.dwconv.weight") for stage in range(stages)],
        dims=[tensors[f"detector.stages.{stage}.0.dwconv.weight"].shape[0] for stage in range(stages)],
    )


def _warping(tensors: dict[str, Tensor]) -> WarpingModule:
    compressed, channels = tensors["dense_motion_network.compress.weight"].shape[:2]
    hourglass = "dense_motion_network.hourglass"
    blocks = _count(tensors, hourglass + ".encoder.down_blocks.{}.conv.weight")
    outputs, flattened = tensors["third.conv.weight"].shape[:2]
    return WarpingModule(
        channels=channels,
        depth=flattened // channels,
        compressed=compressed,
        expansion=tensors[f"{hourglass}.decoder.up_blocks.{blocks - 1}.conv.weight"].shape[0],
        blocks=blocks,
        widest=tensors[f"{hourglass}.encoder.down_blocks.{blocks - 1}.conv.weight"].shape[0],
        outputs=outputs,
    )


def _generator(tensors: dict[str, Tensor]) -> SpadeGenerator:
    width, inputs = tensors["fc.weight"].shape[:2]
    return SpadeGenerator(
        inputs=inputs,
        width=width,
        narrow=(tensors["up_0.conv_1.weight_orig"].shape[0], tensors["up_1.conv_1.weight_orig"].shape[0]),
        hidden=tensors["G_middle_0.norm_0.mlp_shared.0.weight"].shape[0],
    )


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many of the keys that `pattern` gives for 0, 1, 2 ... are there."""
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number


def _period(table: Tensor | None) -> int:
    """After how many frames a stored table of positions [1, n, dim] repeats: the window it was trained for."""
    if table is None:
        return PUBLISHED_WINDOW
    repeats = (table[0, 1:] == table[0, :1]).all(dim=-1).nonzero()
    return int(repeats[0]) + 1 if len(repeats) else table.shape[1]


def load_network(file: Path, kind: str) -> tuple[nn.Module, dict]:
    """One network in eval mode and float32 on the CPU, and the configuration in its file.

    Args: kind: see `build_network`.
    Raises ValueError when the file is damaged, hostile, of another kind, or its values are not finite, OSError when it can't
    be opened.

    The network is built without memory and takes over the file's tensors once they are known to fit, so that a file can't
    ask for more than it holds.
    """
    tensors, config = read_weights(file)
    found, keys = recognise(tensors)
    if found != kind:
        raise ValueError(f"{file} holds {described(found)}, expected {kind}: put the right file in its place.")
    given = {key: tensors[original] for key, original in keys.items() if not key.endswith("PPE.pe")}
    try:
        with torch.device("meta"):
            network = build_network(kind, {key: tensors[original] for key, original in keys.items()}, config)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no usable {kind} network ({error}): copy or download it again.") from None
    for part in _parts(network):
        expected = {key: value for key, value in part.state_dict().items() if not key.endswith("PPE.pe")}
        own = {}
        for key, value in expected.items():
            if key.endswith("num_batches_tracked"):  # of no use but for training
                given.setdefault(key, torch.zeros((), dtype=value.dtype))
            if key not in given or given[key].shape != value.shape:
                state = "is missing" if key not in given else f"has shape {list(given[key].shape)}"
                raise ValueError(
                    f"{file} does not fit the {kind} network: {key} {state}, expected {list(value.shape)}; use another file."
                )
            own[key] = given.pop(key).to(value.dtype, copy=True).contiguous()
            if not torch.isfinite(own[key]).all():
                raise ValueError(f"{file} holds NaN or infinite values in {key}: copy or download it again.")
        part.load_state_dict(own, strict=False, assign=True)
    if given:
        raise ValueError(f"{file} does not fit the {kind} network: {min(given)} is unknown to it; use another file.")
    return network.eval(), config


def described(kind: str | None) -> str:
    """What `recognise` found, in words."""
    if kind is None:
        return "no PC-Talk network and none of LivePortrait"
    return f"a {'PC-Talk' if kind in MOTION_MODEL else 'LivePortrait'} {kind} network"
