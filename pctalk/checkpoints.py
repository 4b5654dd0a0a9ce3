"""Motion models on disk: recognise, verify, load and save.

A motion model is a folder of flat .safetensors files with the published key names:

    audio_encoder.safetensors    AudioEncoder
    lac.safetensors              LipPredictor, with the Refiner under `out_fc.`
    emc.safetensors              EmotionPredictor
    style_encoder.safetensors    StyleEncoder (may be missing: style ids still work)

Each may carry a metadata entry `pctalk_config`, JSON; what it does not say is read off the tensors. The tables `PPE.pe`
are computed by the networks and need not be stored. Files may be half precision; in memory everything is float32.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .networks.audio_encoder import AudioEncoder
from .networks.decoder import HEADS, LONGEST
from .networks.emotion import EmotionPredictor
from .networks.predictor import LipPredictor, Refiner
from .networks.style_encoder import StyleEncoder
from .speech import mel_filters

STARTER = Path(__file__).parent / "assets" / "starter"
PUBLISHED_WINDOW = 25
RECOGNISED_BY = {  # a key that a network has and those below it have not
    "audio_encoder": "audio_encoder.0.conv_block.0.weight",
    "emc": "audio_emo_former.emo_feature_map.weight",
    "style_encoder": "pooling.W.0.weight",
    "lac": "vertice_map_r.weight",
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
    Raises FileNotFoundError when the folder or a file is missing, ValueError when a file is truncated, of the wrong kind,
    or its values are not finite.
    """
    mel_filters()  # imports librosa, which is slow: loading pays for it rather than the first frame
    folder = STARTER if path is None else Path(path)
    if name is None:
        name = "starter" if path is None else folder.name
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no motion model at {folder}: give the folder that holds lac.safetensors.")
    audio_encoder, _ = _load(folder, "audio_encoder")
    lac, config = _load(folder, "lac")
    emc, _ = _load(folder, "emc")
    style_encoder = None
    if (folder / "style_encoder.safetensors").exists():
        style_encoder, _ = _load(folder, "style_encoder")
        if style_encoder.vertice_map.out_features != lac["predictor"].vertice_map.out_features:
            raise ValueError(f"The style encoder in {folder} does not fit its lac.safetensors: remove or replace it.")
    ids, advised = range(lac["predictor"].obj_vector.in_features), config.get("recommended_styles")
    recommended = tuple(style for style in advised if style in ids) if isinstance(advised, list) else ()
    return MotionModel(name, audio_encoder, lac["predictor"], lac["refiner"], emc, style_encoder, recommended or (0,))


def save_motion_model(model: MotionModel, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write what `load_motion_model` reads, each file complete or not at all.

    Args: dtype: how numbers are stored. Raises OSError when the folder can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "audio_encoder.safetensors", model.audio_encoder.state_dict(), {}, dtype)
    lac = {**model.lac.state_dict(), **model.refiner.state_dict()}
    config = {**_decoder_config(model.lac), "recommended_styles": list(model.recommended_styles)}
    _write(folder / "lac.safetensors", lac, config, dtype)
    _write(folder / "emc.safetensors", model.emc.state_dict(), _decoder_config(model.emc), dtype)
    if model.style_encoder is not None:
        heads = model.style_encoder.transformer_encoder.layers[0].self_attn.num_heads
        _write(folder / "style_encoder.safetensors", model.style_encoder.state_dict(), {"heads": heads}, dtype)


def _decoder_config(network: LipPredictor | EmotionPredictor) -> dict:
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
    window, heads = config.get("window") or _period(tensors.get("PPE.pe")), config.get("heads", HEADS)
    if not 1 <= window <= LONGEST or dim % heads:
        raise ValueError(f"windows of {window} frames or {heads} heads of {dim} features make no sense")
    return {"styles": styles, "dim": dim, "ff_dim": ff_dim, "window": window, "heads": heads}


def _build(kind: str, tensors: dict[str, Tensor], config: dict) -> nn.Module:
    """An empty network of the right sizes."""
    if kind == "audio_encoder":
        return AudioEncoder()
    if kind == "lac":
        return nn.ModuleDict({"predictor": LipPredictor(**_decoder_sizes(tensors, config)), "refiner": Refiner()})
    if kind == "emc":
        return EmotionPredictor(**_decoder_sizes(tensors, config), style_bias="obj_vector.bias" in tensors)
    dim = tensors["vertice_map.weight"].shape[0]
    ff_dim = tensors["transformer_encoder.layers.0.linear1.weight"].shape[0]
    return StyleEncoder(tensors["cls.out_proj.weight"].shape[0], dim, ff_dim, config.get("heads", HEADS))


def _period(table: Tensor | None) -> int:
    """After how many frames a stored table of positions [1, n, dim] repeats: the window it was trained for."""
    if table is None:
        return PUBLISHED_WINDOW
    repeats = (table[0, 1:] == table[0, :1]).all(dim=-1).nonzero()
    return int(repeats[0]) + 1 if len(repeats) else table.shape[1]


def _load(folder: Path, kind: str) -> tuple[nn.Module, dict]:
    """One network in eval mode and the configuration in its file; LAC's is {"predictor", "refiner"}."""
    from safetensors import SafetensorError, safe_open

    file = folder / f"{kind}.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"The motion model in {folder} has no {file.name}: put the file there or load another model.")
    try:
        with safe_open(str(file), framework="pt") as opened:
            config = dict(json.loads((opened.metadata() or {}).get("pctalk_config", "{}")))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a complete .safetensors file ({error}): copy or download it again.") from None
    found = next((name for name, key in RECOGNISED_BY.items() if key in tensors), None)
    if found != kind:
        holds = f"a PC-Talk {found} network" if found else "no PC-Talk network"
        raise ValueError(f"{file} holds {holds}, expected {kind}: put the right file in its place.")
    try:
        network = _build(kind, tensors, config)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no usable {kind} network ({error}): copy or download it again.") from None
    parts = [network["predictor"], network["refiner"]] if kind == "lac" else [network]
    given = {key: value for key, value in tensors.items() if not key.endswith("PPE.pe")}
    for part in parts:
        expected = {key: value for key, value in part.state_dict().items() if not key.endswith("PPE.pe")}
        for key, value in expected.items():
            if key not in given or given[key].shape != value.shape:
                state = "is missing" if key not in given else f"has shape {list(given[key].shape)}"
                raise ValueError(
                    f"{file} does not fit the {kind} network: {key} {state}, expected {list(value.shape)}; use another file."
                )
            if not torch.isfinite(given[key]).all():
                raise ValueError(f"{file} holds NaN or infinite values in {key}: copy or download it again.")
        part.load_state_dict({key: given.pop(key).to(value.dtype) for key, value in expected.items()}, strict=False)
    if given:
        raise ValueError(f"{file} does not fit the {kind} network: {min(given)} is unknown to it; use another file.")
    return network.eval(), config


def _write(file: Path, tensors: dict[str, Tensor], config: dict, dtype: torch.dtype) -> None:
    from safetensors.torch import save

    stored = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in tensors.items()
        if not key.endswith("PPE.pe")
    }
    temporary = file.with_name(f"{file.name}.part")
    try:
        # save_file would make it unreadable to other users.
        temporary.write_bytes(save(stored, {"pctalk_config": json.dumps(config)}))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
