"""The nodes as a creator meets them: names, defaults, explanations."""

from __future__ import annotations

import re

import pytest
from workflow import PACK

DOCS = PACK / "web" / "docs"
NODES = {
    "PCTalk_LoadMotionModel": "Load PC-Talk Motion Model",
    "PCTalk_LoadRenderer": "Load Portrait Renderer",
    "PCTalk_KeypointExtract": "Extract Keypoints",
    "PCTalk_EncodeSpeech": "Encode Speech",
    "PCTalk_LACDeform": "Lip Alignment (LAC)",
    "PCTalk_EMCDeform": "Emotion (EMC)",
    "PCTalk_RegionEmotionMix": "Mix Emotions by Region",
    "PCTalk_AddDeformations": "Add Deformations",
    "PCTalk_WarpDecode": "Warp and Decode",
    "PCTalk_DrawKeypoints": "Draw Keypoints",
    "PCTalk_PlotDeformation": "Plot Deformation",
}
DEFAULTS = {
    "PCTalk_LoadMotionModel": {"model": "starter"},
    "PCTalk_LoadRenderer": {"renderer": "mesh", "precision": "auto"},
    "PCTalk_KeypointExtract": {"face_index": 0, "crop_scale": 2.3},
    "PCTalk_LACDeform": {
        **{"style_id": 0, "amplitude": 1.0, "follow_loudness": 0.0, "lips": "replace", "smoothing": True},
        **{"pursing": 1.0, "widening": 1.0, "opening": 1.0},
    },
    "PCTalk_EMCDeform": {"emotion": "happy", "intensity": 0.5, "region": "all"},
    "PCTalk_RegionEmotionMix": {"seam_softness": 0.0, "weight_1": 1.0, "region_1": "all"},
    "PCTalk_AddDeformations": {"gain_1": 1.0},
    "PCTalk_WarpDecode": {"fps": 25.0, "paste_back": True, "stitching": True, "batch": 0},
}
OUTPUTS = {
    "PCTalk_LoadMotionModel": ["PCTALK_MOTION_MODEL"],
    "PCTalk_LoadRenderer": ["PCTALK_RENDERER"],
    "PCTalk_KeypointExtract": ["PCTALK_PORTRAIT", "PCTALK_KEYPOINTS"],
    "PCTalk_EncodeSpeech": ["PCTALK_SPEECH"],
    "PCTalk_LACDeform": ["PCTALK_DEFORMATION"],
    "PCTalk_EMCDeform": ["PCTALK_DEFORMATION"],
    "PCTalk_RegionEmotionMix": ["PCTALK_DEFORMATION"],
    "PCTalk_AddDeformations": ["PCTALK_KEYPOINTS"],
    "PCTalk_WarpDecode": ["IMAGE", "MASK", "FLOAT"],
    "PCTalk_DrawKeypoints": ["IMAGE"],
    "PCTalk_PlotDeformation": ["IMAGE"],
}


def inputs_of(definition: dict) -> dict[str, dict]:
    """Every input's options by name, those of rows included."""
    found = {}
    for group in ("required", "optional"):
        for name, (_, options) in definition.get(group, {}).items():
            found[name] = options
            for option in options.get("options", []):
                if isinstance(option, dict):
                    found |= inputs_of(option["inputs"])
    return found


def test_all_nodes_are_there_and_core_loaded(object_info):
    assert {name: node["display_name"] for name, node in object_info.items() if name.startswith("PCTalk_")} == NODES
    assert len(object_info) > 550
    assert {"LoadImage", "LoadAudio", "CreateVideo", "SaveVideo", "GetVideoComponents"} <= object_info.keys()


@pytest.mark.parametrize("name", NODES)
def test_node_explains_itself(object_info, name):
    node = object_info[name]
    assert node["category"] == "PC-Talk"
    assert len(node["description"]) > 30
    assert "pctalk" in node["search_aliases"] and len(node["search_aliases"]) >= 4
    for input_name, options in inputs_of(node["input"]).items():
        assert len(options.get("tooltip", "")) > 10, f"{input_name} has no tooltip"
    assert node["output"] == OUTPUTS[name]
    assert all(node["output_tooltips"])


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(object_info, name):
    inputs = inputs_of(object_info[name]["input"])
    assert {key: inputs[key]["default"] for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("name", NODES)
def test_help_covers_every_input_and_output(server, object_info, name):
    text = server.view_text(f"/extensions/comfyui-pctalk/docs/{name}.md")
    assert text.startswith(f"# {NODES[name]}\n")
    bold = set(re.findall(r"\*\*([a-z_]+)\*\*", text))
    inputs = {re.sub(r"_\d$", "_n", key) for key in inputs_of(object_info[name]["input"])}
    assert inputs <= bold, f"{inputs - bold} not explained"


def test_no_help_for_nodes_that_are_not():
    assert {file.stem for file in DOCS.glob("*.md")} == set(NODES)


def test_regions_and_emotions_are_the_engines(object_info):
    from pctalk.keypoints import EMOTIONS, REGIONS

    inputs = inputs_of(object_info["PCTalk_EMCDeform"]["input"])
    assert inputs["emotion"]["options"] == list(EMOTIONS)
    assert inputs["region"]["options"] == list(REGIONS)


def test_import_takes_less_than_half_a_second(server):
    (seconds,) = re.findall(r"([\d.]+) seconds: \S*/custom_nodes/comfyui-pctalk", server.log.read_text())
    assert float(seconds) < 0.5


def test_examples_are_offered_as_templates(server):
    assert sorted(server.get("/api/workflow_templates")["comfyui-pctalk"]) == ["mixed_emotions", "talking_portrait"]
