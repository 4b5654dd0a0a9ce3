"""Published layouts, hostile files and `pctalk convert`."""

import argparse
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pctalk import convert as conversion
from pctalk.checkpoints import (
    LIVEPORTRAIT,
    MOTION_MODEL,
    RECOGNISED_BY,
    build_network,
    load_liveportrait,
    load_motion_model,
    missing_liveportrait,
    recognise,
    save_motion_model,
)
from pctalk.cli import main
from pctalk.convert import convert
from pctalk.evaluate.golden import filled, golden_model
from pctalk.evaluate.reference import random_motion_model
from pctalk.networks.liveportrait.appearance import AppearanceFeatureExtractor
from pctalk.networks.liveportrait.generator import SpadeGenerator
from pctalk.networks.liveportrait.motion import MotionExtractor
from pctalk.networks.liveportrait.retargeting import StitchingRetargeting
from pctalk.networks.liveportrait.warping import WarpingModule
from pctalk.networks.style_encoder import StyleEncoder
from pctalk.weights import read_weights

STYLES, WINDOW = 5, 10


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """The LivePortrait networks, narrow, with the golden recipe's weights."""
    plain = {
        "appearance": AppearanceFeatureExtractor(width=8, channels=6, depth=4, blocks=2),
        "motion": MotionExtractor(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20)),
        "warping": WarpingModule(channels=6, depth=4, compressed=2, expansion=8, blocks=3, widest=32, outputs=16),
        "generator": SpadeGenerator(inputs=16, width=24, narrow=(16, 8), hidden=8),
        "stitching": StitchingRetargeting(),
    }
    return {name: filled(network, seed=1) for name, network in plain.items()}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        style_encoder = StyleEncoder(STYLES, 32, 48)
    return replace(random_motion_model(dim=32, ff_dim=48, styles=STYLES, window=WINDOW), style_encoder=style_encoder)


def same(loaded: dict[str, nn.Module], expected: dict[str, nn.Module]) -> bool:
    """Whether networks have the same names, keys and numbers."""
    states = [{name: network.state_dict() for name, network in either.items()} for either in (loaded, expected)]
    assert {name: set(state) for name, state in states[0].items()} == {name: set(state) for name, state in states[1].items()}
    return all(torch.equal(value, states[1][name][key]) for name, state in states[0].items() for key, value in state.items())


def write_flat(folder: Path, networks: dict[str, nn.Module]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in networks.items():
        save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()},
            folder / f"{LIVEPORTRAIT[name]}.safetensors",
        )
    return folder


def write_original(folder: Path, networks: dict[str, nn.Module], *, zipped: bool = True) -> Path:
    """As LivePortrait's authors published them."""
    for part in ("base_models", "retargeting_models"):
        (folder / part).mkdir(parents=True)
    for name, network in networks.items():
        state, file = network.state_dict(), folder / "base_models" / f"{LIVEPORTRAIT[name]}.pth"
        if name == "stitching":
            nested: dict[str, dict] = {}
            for key, value in state.items():
                part, rest = key.split("_module.", 1)
                nested.setdefault(part, {})[f"module.{rest}"] = value
            state, file = nested, folder / "retargeting_models" / file.name
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return folder


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


def write_published(folder: Path, model, *, prefix: str = "", args=None) -> Path:
    """As PC-Talk's authors published them."""
    folder.mkdir(parents=True)
    args = argparse.Namespace(T=model.lac.window, person_num=model.styles, lr=1e-4) if args is None else args
    lac = {"model": prefixed(model.lac.state_dict(), prefix), "model_ft": prefixed(model.refiner.state_dict(), prefix)}
    torch.save({**lac, "args": args}, folder / "lac.pth")
    torch.save({"model": prefixed(model.emc.state_dict(), prefix), "args": args}, folder / "emc.pth")
    torch.save(prefixed(model.style_encoder.state_dict(), f"{prefix}obj_vector."), folder / "style_encoder.pth")
    torch.save(prefixed(model.audio_encoder.state_dict(), prefix), folder / "audio_encoder.pth")
    return folder


# LivePortrait


def test_liveportrait_flat(networks, tmp_path):
    loaded = load_liveportrait(write_flat(tmp_path, networks))
    assert same(loaded, networks)
    for network in loaded.values():
        assert not any(module.training for module in network.modules())
        assert {value.dtype for value in network.parameters()} == {torch.float32}
        assert {value.device.type for value in network.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("zipped", [True, False])
def test_liveportrait_as_first_published(networks, tmp_path, zipped):
    assert same(load_liveportrait(write_original(tmp_path, networks, zipped=zipped)), networks)


def test_liveportrait_in_half_precision_under_any_name(networks, tmp_path):
    for name, network in networks.items():
        state = {
            f"module.{key}": value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()
        }
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"my {name}.safetensors")
    loaded = load_liveportrait(tmp_path)
    weight = networks["generator"].fc.weight
    assert torch.equal(loaded["generator"].fc.weight, weight.half().float())


@pytest.mark.parametrize("kind", [kind for kind in RECOGNISED_BY if kind != "stitching_retargeting_module"])
def test_published_sizes_are_read_off(kind):
    published = json.loads((Path(__file__).parent / "golden" / "state_dict_shapes.json").read_text())
    shapes = {**published[kind], **(published["refinement"] if kind == "lac" else {})}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert recognise(tensors) == (kind, {key: key for key in tensors})
    with torch.device("meta"):
        network = build_network(kind, tensors, {"window": 25})
    parts = network.values() if kind == "lac" else [network]
    assert {key: list(value.shape) for part in parts for key, value in part.state_dict().items()} == shapes


def test_what_can_not_be_opened_is_passed_over(networks, tmp_path):
    write_flat(tmp_path, networks)
    (tmp_path / "a folder.safetensors").mkdir()
    assert same(load_liveportrait(tmp_path), networks)


def test_loading_keeps_nothing_of_the_file(networks, tmp_path):
    loaded = load_liveportrait(write_flat(tmp_path, networks))
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    assert same(loaded, networks)


def test_loading_leaves_the_random_numbers_alone(networks, tmp_path):
    write_flat(tmp_path, networks)
    before = torch.random.get_rng_state()
    load_liveportrait(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_liveportrait_lacks_is_listed(networks, tmp_path):
    assert missing_liveportrait(tmp_path / "nowhere") == list(LIVEPORTRAIT.values())
    write_flat(tmp_path, networks)
    for name in ("warping_module", "motion_extractor"):
        (tmp_path / f"{name}.safetensors").unlink()
    (tmp_path / "notes.safetensors").write_bytes(b"none")
    assert missing_liveportrait(tmp_path) == ["motion_extractor", "warping_module"]
    with pytest.raises(FileNotFoundError, match=r"lacks motion_extractor.safetensors, warping_module.safetensors: put"):
        load_liveportrait(tmp_path)


def test_liveportrait_files_mixed_up_by_name(networks, tmp_path):
    write_flat(tmp_path, networks)
    (tmp_path / "motion_extractor.safetensors").rename(tmp_path / "m")
    (tmp_path / "warping_module.safetensors").rename(tmp_path / "motion_extractor.safetensors")
    (tmp_path / "m").rename(tmp_path / "warping_module.safetensors")
    assert same(load_liveportrait(tmp_path), networks)
    (tmp_path / "motion_extractor.safetensors").write_bytes((tmp_path / "spade_generator.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds a LivePortrait spade_generator network, expected") as error:
        (tmp_path / "warping_module.safetensors").unlink()
        write_flat(tmp_path, {"warping": networks["warping"]})
        load_liveportrait(tmp_path)
    assert "motion_extractor.safetensors" in str(error.value)


# PC-Talk


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("as_dict", [True, False])
def test_motion_model_as_published(model, tmp_path, prefix, as_dict):
    args = {"T": WINDOW, "person_num": STYLES} if as_dict else None
    loaded = load_motion_model(write_published(tmp_path / "mine", model, prefix=prefix, args=args))
    assert same(loaded.networks, model.networks)
    assert (loaded.name, loaded.styles, loaded.lac.window, loaded.emc.window) == ("mine", STYLES, WINDOW, WINDOW)


def test_window_without_options(model, tmp_path):
    """Then the table of positions says it."""
    loaded = load_motion_model(write_published(tmp_path / "mine", model, args={}))
    assert (loaded.lac.window, loaded.emc.window) == (WINDOW, WINDOW)


@pytest.mark.parametrize("bare", [True, False])
def test_audio_encoder_without_its_prefix(model, tmp_path, bare):
    folder = write_published(tmp_path / "mine", model)
    state = {key.removeprefix("audio_encoder."): value for key, value in model.audio_encoder.state_dict().items()}
    torch.save({"state_dict": prefixed(state, "" if bare else "module.")}, folder / "audio_encoder.pth")
    assert same(load_motion_model(folder).networks, model.networks)


def test_training_state_beside_the_network_is_left_out(model, tmp_path):
    folder = write_published(tmp_path / "mine", model)
    optimizer = torch.optim.Adam(model.emc.parameters())
    content = {"model": model.emc.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "extra": {"a": torch.ones(1)}}
    torch.save({**content, "args": {"T": WINDOW}}, folder / "emc.pth")
    assert same(load_motion_model(folder).networks, model.networks)


def test_published_widths(tmp_path):
    model = golden_model()
    loaded = load_motion_model(write_published(tmp_path / "mine", model))
    assert (loaded.styles, loaded.lac.window) == (210, 25)
    assert same(loaded.networks, model.networks)


def test_safetensors_and_pth_mixed_under_any_name(model, tmp_path):
    folder = write_published(tmp_path / "mine", model)
    save_motion_model(model, tmp_path / "flat", torch.float32)
    (folder / "lac.pth").unlink()
    (tmp_path / "flat" / "lac.safetensors").rename(folder / "lips.safetensors")
    (folder / "emc.pth").rename(folder / "emotions.pth")
    assert same(load_motion_model(folder).networks, model.networks)


# Hostile and broken files


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_not_run(model, tmp_path, zipped):
    folder, marker = write_published(tmp_path / "mine", model), tmp_path / "marker"
    torch.save({"model": Hostile(marker)}, folder / "lac.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"lac.pth asks to load \w+.system, expected tensors only: it may be hostile"):
        load_motion_model(folder)
    (folder / "lac.pth").write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(ValueError, match=r"lac.pth is not a complete .pth file|lac.pth asks to load \w+.system"):
        load_motion_model(folder)
    assert not marker.exists()


def test_only_a_sound_torch_reads_pth(model, tmp_path, monkeypatch):
    folder = write_published(tmp_path / "mine", model)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cu121"))
    with pytest.raises(ValueError, match=r"can't read safely: convert it with `pctalk convert` where torch 2.6 or newer"):
        load_motion_model(folder)


def bomb_by_compression(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(50_000_000))


def bomb_by_overlap(file: Path) -> None:
    """Many entries of the directory that name the same stored bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data/0", bytes(1_000_000))
        archive.filelist *= 100


@pytest.mark.parametrize("write", [bomb_by_compression, bomb_by_overlap])
def test_zip_bombs_are_refused_unopened(model, tmp_path, write, monkeypatch):
    write(tmp_path / "lac.pth")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was opened"))
    with pytest.raises(ValueError, match=r"MB archive that unpacks to \d+\.\d MB, expected an uncompressed .pth"):
        read_weights(tmp_path / "lac.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.empty(10**6, 10**6, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, 2, dtype=torch.complex64),
    ],
    ids=["stretched", "meta", "sparse", "complex"],
)
def test_tensors_without_their_numbers_are_refused(tmp_path, tensor):
    torch.save({"model": {"vertice_map_r.weight": tensor}}, tmp_path / "lac.pth")
    with pytest.raises(ValueError, match=r"model.vertice_map_r.weight in a form no checkpoint has"):
        read_weights(tmp_path / "lac.pth")


def test_shared_dictionaries_do_not_multiply(tmp_path):
    branch: dict = {"a": torch.zeros(1)}
    for _ in range(5):
        branch = {str(i): branch for i in range(20)}
    torch.save(branch, tmp_path / "lac.pth")
    with pytest.raises(ValueError, match="nests dictionaries as no checkpoint does"):
        read_weights(tmp_path / "lac.pth")


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3), "text"])
def test_something_else_in_a_pth(tmp_path, content):
    torch.save(content, tmp_path / "lac.pth")
    with pytest.raises(ValueError, match=f"holds a {type(content).__name__}, expected a dictionary of tensors"):
        read_weights(tmp_path / "lac.pth")


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_pth(model, tmp_path, length):
    folder = write_published(tmp_path / "mine", model)
    (folder / "emc.pth").write_bytes((folder / "emc.pth").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"emc.pth is not a complete .pth file \(.*\): copy or download it again") as error:
        load_motion_model(folder)
    assert "\n" not in str(error.value)


def misshape(state):
    state["fc.weight"] = torch.zeros(24, 17, 3, 3)


def spoil(state):
    state["fc.bias"] = torch.full_like(state["fc.bias"], float("nan"))


def shorten(state):
    del state["up_0.conv_0.weight_u"]


def hollow(state):
    del state["fc.weight"]


def extend(state):
    state["extra.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misshape, r"shape \[.*\], expected \[.*\]"),
        (spoil, "NaN or infinite values in fc.bias"),
        (shorten, "up_0.conv_0.weight_u is missing"),
        (hollow, "no usable spade_generator network"),
        (extend, "extra.weight is unknown"),
    ],
)
def test_broken_liveportrait_files(networks, tmp_path, change, message):
    write_original(tmp_path, networks)
    state = networks["generator"].state_dict()
    change(state)
    torch.save(state, tmp_path / "base_models" / "spade_generator.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_liveportrait(tmp_path)
    assert "spade_generator.pth" in str(error.value) and "\n" not in str(error.value)


def test_a_small_file_can_not_ask_for_much_memory(model, tmp_path):
    """Sizes read off single tensors would make a network of terabytes."""
    folder = write_published(tmp_path / "mine", model)
    state = {**model.lac.state_dict(), **model.refiner.state_dict(), "obj_vector.weight": torch.zeros(4096, 1)}
    state["transformer_decoder.layers.0.linear1.weight"] = torch.zeros(10**6, 1)
    torch.save(state, folder / "lac.pth")
    with pytest.raises(ValueError, match="does not fit the lac network"):
        load_motion_model(folder)
    torch.save({**state, "obj_vector.weight": torch.zeros(10**6, 1)}, folder / "lac.pth")
    with pytest.raises(ValueError, match="1000000 features make no sense"):
        load_motion_model(folder)


# pctalk convert


def test_convert_liveportrait(networks, tmp_path, capsys, monkeypatch):
    folder = write_original(tmp_path / "original", networks)
    known = folder / "base_models" / "motion_extractor.pth"
    monkeypatch.setitem(conversion.ORIGINALS, "motion_extractor", conversion.sha256(known))
    files = sorted(folder.glob("*/*.pth"))
    assert main(["convert", *map(str, files), "--to", str(tmp_path / "flat")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files) == 5
    for file, line in zip(files, lines, strict=True):
        origin = "known: LivePortrait's original" if file == known else "unknown: not LivePortrait's original"
        target = tmp_path / "flat" / f"{file.stem}.safetensors"
        assert line == f"{file}: a LivePortrait {file.stem} network -> {target} (sha256 {conversion.sha256(file)}, {origin})"
    assert {file.name for file in (tmp_path / "flat").iterdir()} == {f"{kind}.safetensors" for kind in LIVEPORTRAIT.values()}
    assert same(load_liveportrait(tmp_path / "flat"), networks)


def test_convert_motion_model(model, tmp_path):
    folder = write_published(tmp_path / "mine", model, prefix="module.")
    for file in sorted(folder.iterdir()):
        converted = convert(file)
        assert converted.target == folder / f"{file.stem}.safetensors" and converted.kind == file.stem
        assert str(converted).endswith(", unknown)")
        file.unlink()
    assert {file.stem for file in folder.iterdir()} == set(MOTION_MODEL)
    loaded = load_motion_model(folder)
    assert same(loaded.networks, model.networks) and loaded.lac.window == WINDOW
    with safe_open(str(folder / "lac.safetensors"), framework="pt") as opened:
        config = opened.metadata()["pctalk_config"]
    assert f'"window": {WINDOW}' in config and '"source": "lac.pth"' in config and f'"person_num": {STYLES}' in config


def test_convert_refuses(model, tmp_path, capsys):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_motion_model(model, tmp_path)
    torch.save({"model": Hostile(tmp_path / "marker")}, tmp_path / "hostile.pth")
    for file, message in (
        ("other.safetensors", "holds no PC-Talk network and none of LivePortrait: expected one of audio_encoder, emc"),
        ("lac.safetensors", "would be overwritten: name another folder with --to"),
        ("hostile.pth", "it may be hostile"),
        ("nothing.pth", "There is no file"),
    ):
        before = sorted(tmp_path.iterdir())
        assert main(["convert", str(tmp_path / file)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
