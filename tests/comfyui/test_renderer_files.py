"""LivePortrait's files in models/liveportrait, through the nodes: narrow random networks in the published layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from comfyui_server import NodeError
from test_liveportrait import write_narrow


@pytest.fixture(scope="module")
def models(server) -> Path:
    """models/liveportrait with two layouts of the same networks, and one that lacks a file."""
    folder = server.base / "models" / "liveportrait"
    write_narrow(folder / "narrow")
    write_narrow(folder / "original", "original")
    write_narrow(folder / "incomplete")
    (folder / "incomplete" / "warping_module.safetensors").unlink()
    return folder


@pytest.fixture
def short(models, chain) -> Callable[..., dict]:
    """The graph of `chain` with another renderer and five frames."""
    return lambda renderer, **parts: chain(**parts, renderer={"renderer": renderer}, audio={"seconds": 0.2})


def test_complete_folders_are_offered(server, models):
    definition = server.get("/object_info/PCTalk_LoadRenderer")["PCTalk_LoadRenderer"]
    assert definition["input"]["required"]["renderer"][1]["options"] == ["mesh", "narrow", "original"]


def test_both_layouts_draw_the_same_clip(short, kept):
    frames, original, mesh = (kept(short(renderer))["value"] for renderer in ("narrow", "original", "mesh"))
    assert frames.shape == (5, 320, 320, 3)
    assert frames.min() >= 0 and frames.max() <= 1
    assert np.abs(frames - frames[:1]).max() > 0.005
    assert np.array_equal(original, frames)
    assert np.abs(mesh - frames).max() > 0.1


def test_every_network_is_in_memory_once(short, kept):
    """Extract Keypoints and Warp and Decode use the tensors of their loader, and so does a second graph."""
    links = {"motion_model": ["model", 0], "renderer": ["renderer", 0], "after": ["frames", 0], "name": "parameters"}
    count = {"class_type": "ProbeParameters", "inputs": links}
    for fps in (25.0, 12.5):
        counts = kept(short("narrow", frames={"fps": fps}, keep=count), "parameters")
        assert counts["alive"] == counts["held"] > 1_000_000


def test_a_replaced_file_is_loaded_again(server, models, short):
    prompt = short("narrow", frames={"fps": 5.0})
    server.run(prompt)
    assert "renderer" in server.run(prompt).cached
    (models / "narrow" / "spade_generator.safetensors").touch()
    assert "renderer" not in server.run(prompt).cached


@pytest.mark.parametrize("name", ["incomplete", "never there", "liveportrait"])
def test_what_is_missing_is_said(server, models, chain, name):
    with pytest.raises(NodeError, match=r"warping_module.*Kijai/LivePortrait_safetensors.*pctalk convert") as refused:
        server.run(chain(renderer={"renderer": name}))
    assert str(models if name == "liveportrait" else models / name) in refused.value.message
    assert ("motion_extractor" in refused.value.message) == (name != "incomplete")


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"renderer": "narrow", "precision": "fp16"}, "choose auto, fp32 or bf16"),
        ({"renderer": "mesh", "precision": "bf16"}, "choose auto or fp32"),
        ({"renderer": "narrow", "precision": "fp8"}, "choose auto, fp32, fp16, bf16"),
    ],
)
def test_precision_that_this_device_has_not(server, models, chain, choices, words):
    with pytest.raises(NodeError, match=words) as refused:
        server.run(chain(renderer=choices))
    assert refused.value.kind == "validation" and refused.value.node_type == "PCTalk_LoadRenderer"
