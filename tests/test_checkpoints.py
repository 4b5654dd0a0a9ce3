import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pctalk.checkpoints import MotionModel, load_motion_model, save_motion_model
from pctalk.evaluate.golden import golden_model
from pctalk.evaluate.reference import random_motion_model
from pctalk.networks.style_encoder import StyleEncoder


@pytest.fixture(scope="module")
def model() -> MotionModel:
    model = random_motion_model(dim=32, ff_dim=48, styles=5, window=10)
    return replace(model, style_encoder=StyleEncoder(5, 32, 48), recommended_styles=(3, 1))


@pytest.fixture
def folder(model, tmp_path):
    save_motion_model(model, tmp_path / "mine", torch.float32)
    return tmp_path / "mine"


def tensors_of(file):
    with safe_open(str(file), framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()


def rewrite(file, change) -> None:
    tensors, metadata = tensors_of(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata=metadata)


def test_round_trip(model, folder):
    loaded = load_motion_model(folder)
    assert (loaded.name, loaded.styles, loaded.recommended_styles) == ("mine", 5, (3, 1))
    assert loaded.device == torch.device("cpu")
    assert set(loaded.networks) == {"audio_encoder", "lac", "refiner", "emc", "style_encoder"}
    assert (loaded.lac.window, loaded.emc.window) == (10, 10)
    for name, network in loaded.networks.items():
        assert not network.training
        for key, value in network.state_dict().items():
            assert torch.equal(value, model.networks[name].state_dict()[key]), (name, key)


def test_files_hold_half_precision_and_memory_single(model, tmp_path):
    save_motion_model(model, tmp_path)
    for file in tmp_path.iterdir():
        tensors, metadata = tensors_of(file)
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.float16, torch.int64}
        assert not any(key.endswith("PPE.pe") for key in tensors)
        assert "pctalk_config" in metadata
    loaded = load_motion_model(tmp_path, name="half")
    assert loaded.name == "half"
    for network in loaded.networks.values():
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert torch.equal(loaded.lac.vertice_map.weight, model.lac.vertice_map.weight.half().float())


def test_nothing_half_written_is_left(model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pctalk.checkpoints.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_motion_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_style_encoder_may_be_missing(folder):
    (folder / "style_encoder.safetensors").unlink()
    loaded = load_motion_model(folder)
    assert loaded.style_encoder is None and "style_encoder" not in loaded.networks


def test_published_sizes_without_configuration(tmp_path):
    """As somebody converts the published files: all keys, the tables of positions among them, no metadata."""
    model = golden_model()
    lac = {**model.lac.state_dict(), **model.refiner.state_dict()}
    for name, tensors in (
        ("audio_encoder", model.audio_encoder.state_dict()),
        ("lac", lac),
        ("emc", model.emc.state_dict()),
        ("style_encoder", model.style_encoder.state_dict()),
    ):
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    loaded = load_motion_model(tmp_path)
    assert (loaded.styles, loaded.lac.window, loaded.emc.window, loaded.recommended_styles) == (210, 25, 25, (0,))
    assert torch.equal(loaded.emc.vertice_map.weight, model.emc.vertice_map.weight)
    for file in ("lac", "emc"):
        rewrite(tmp_path / f"{file}.safetensors", lambda tensors, _: [tensors.pop(k) for k in list(tensors) if "PPE" in k])
    assert load_motion_model(tmp_path).lac.window == 25


def test_the_window_is_read_off_the_table_of_positions(folder):
    table = load_motion_model(folder).lac.PPE.pe
    rewrite(folder / "lac.safetensors", lambda tensors, config: (tensors.update({"PPE.pe": table}), config.clear()))
    assert load_motion_model(folder).lac.window == 10


@pytest.mark.parametrize("missing", ["audio_encoder", "lac", "emc"])
def test_missing_files(folder, missing):
    (folder / f"{missing}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}.safetensors: put the file there"):
        load_motion_model(folder)
    with pytest.raises(FileNotFoundError, match="no motion model at"):
        load_motion_model(folder / "deeper")


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_files(folder, length):
    file = folder / "emc.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="not a complete") as error:
        load_motion_model(folder)
    assert "copy or download it again" in str(error.value)


@pytest.mark.parametrize(
    ("file", "other", "message"),
    [
        ("lac", "emc", "holds a PC-Talk emc network, expected lac"),
        ("emc", "lac", "holds a PC-Talk lac network, expected emc"),
        ("audio_encoder", "style_encoder", "holds a PC-Talk style_encoder network, expected audio_encoder"),
        ("style_encoder", "audio_encoder", "holds a PC-Talk audio_encoder network, expected style_encoder"),
    ],
)
def test_swapped_files(folder, file, other, message):
    (folder / f"{file}.safetensors").write_bytes((folder / f"{other}.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        load_motion_model(folder)


def test_something_else_entirely(folder):
    save_file({"weight": torch.zeros(3)}, folder / "lac.safetensors")
    with pytest.raises(ValueError, match="no PC-Talk network and none of LivePortrait, expected lac"):
        load_motion_model(folder)


def misshape(tensors, _):
    tensors["vertice_map.weight"] = torch.zeros(32, 21)


def spoil(tensors, _):
    tensors["out_fc.bias"][3] = float("nan")


def shorten(tensors, _):
    del tensors["transformer_decoder.layers.0.norm2.weight"]


def hollow(tensors, _):
    del tensors["obj_vector.weight"]


def extend(tensors, _):
    tensors["extra.weight"] = torch.zeros(1)


def scribble(_, metadata):
    metadata["pctalk_config"] = "{not JSON"


def stretch(_, metadata):
    metadata["pctalk_config"] = json.dumps({"window": 10**9})


def splice(_, metadata):
    metadata["pctalk_config"] = json.dumps({"heads": 7})


def behead(_, metadata):
    metadata["pctalk_config"] = json.dumps({"heads": 0})


def enlist(_, metadata):
    metadata["pctalk_config"] = "[1, 2]"


def flatten(tensors, _):
    tensors["obj_vector.weight"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misshape, r"vertice_map.weight has shape \[32, 21\], expected \[32, 18\]"),
        (spoil, "NaN or infinite values in out_fc.bias"),
        (shorten, "norm2.weight is missing"),
        (hollow, "no usable lac network"),
        (extend, "extra.weight is unknown"),
        (scribble, "not a complete .safetensors file"),
        (stretch, "windows of 1000000000 frames"),
        (splice, "7 heads of 32 features"),
        (behead, "no usable lac network"),
        (enlist, "not a complete .safetensors file"),
        (flatten, "no usable lac network"),
    ],
)
def test_broken_files(folder, change, message):
    rewrite(folder / "lac.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        load_motion_model(folder)
    assert "lac.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_style_encoder_of_another_model(folder, tmp_path):
    save_motion_model(replace(random_motion_model(16, 16, 5, 10), style_encoder=StyleEncoder(5, 16, 16)), tmp_path / "other")
    (folder / "style_encoder.safetensors").write_bytes((tmp_path / "other" / "style_encoder.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not fit its lac"):
        load_motion_model(folder)


def test_recommended_styles_exist(folder):
    def recommend(_, metadata):
        config = json.loads(metadata["pctalk_config"])
        metadata["pctalk_config"] = json.dumps({**config, "recommended_styles": [192, 4, "x", -1]})

    rewrite(folder / "lac.safetensors", recommend)
    assert load_motion_model(folder).recommended_styles == (4,)


def test_moving_a_model(folder):
    moved = load_motion_model(folder).to("meta")
    assert moved.device.type == "meta"
    assert {p.device.type for network in moved.networks.values() for p in network.parameters()} == {"meta"}
