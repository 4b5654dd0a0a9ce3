"""What people connect: unusual input works, wrong input says so on the node in one sentence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from comfyui_server import NodeError
from PIL import Image
from safetensors.torch import load_file, save_file
from workflow import PACK

from pctalk.checkpoints import STARTER
from pctalk.faces import FaceFinder


def probe_image(width: int, height: int, channels: int = 3) -> dict:
    return {"class_type": "ProbeImage", "inputs": {"width": width, "height": height, "channels": channels}}


def probe_audio(kind: str, seconds: float = 1.0, sample_rate: int = 16000, channels: int = 1) -> dict:
    inputs = {"kind": kind, "seconds": seconds, "sample_rate": sample_rate, "channels": channels}
    return {"class_type": "ProbeAudio", "inputs": inputs}


def reshaped(shape: str) -> dict:
    return {"class_type": "ProbeReshape", "inputs": {"image": ["image", 0], "shape": shape}}


WRONG = {
    "no face": ({"image": probe_image(200, 200)}, "PCTalk_KeypointExtract", "No face found in frame 0"),
    "16 pixels": ({"image": probe_image(16, 16)}, "PCTalk_KeypointExtract", "at least 64 x 64"),
    "two channels": ({"image": probe_image(200, 200, 2)}, "PCTalk_KeypointExtract", "1, 3 or 4 channels"),
    "no second face": ({"portrait": {"face_index": 1}}, "PCTalk_KeypointExtract", "choose one from 0"),
    "silence": ({"audio": probe_audio("silence")}, "PCTalk_EncodeSpeech", "silent"),
    "NaN": ({"audio": probe_audio("nan")}, "PCTalk_EncodeSpeech", "NaN"),
    "0.05 s": ({"audio": probe_audio("tone", 0.05)}, "PCTalk_EncodeSpeech", "at least 0.1 s"),
    "empty": ({"audio": probe_audio("tone", 0.0)}, "PCTalk_EncodeSpeech", "empty"),
    "no sound track": ({"audio": probe_audio("none")}, "PCTalk_EncodeSpeech", "no sound track"),
    "style out of range": ({"lips": {"style_id": 9000}}, "PCTalk_LACDeform", "out of range"),
    "style below range": ({"lips": {"style_id": -1}}, "PCTalk_LACDeform", "min"),
    "unknown emotion": ({"emotion": {"emotion": "bored"}}, "PCTalk_EMCDeform", "not in list"),
    "half precision mesh": ({"renderer": {"precision": "fp16"}}, "PCTalk_LoadRenderer", "choose auto or fp32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_readable_node_error(server, chain, case):
    parts, node_type, sentence = WRONG[case]
    with pytest.raises(NodeError, match=sentence) as refused:
        server.run(chain(**parts))
    assert refused.value.node_type == node_type
    if refused.value.kind != "validation":
        message = refused.value.message
        assert refused.value.kind == "ValueError" and message.endswith(".") and "\n" not in message


def test_after_an_error_the_server_goes_on(server, chain, kept):
    with pytest.raises(NodeError):
        server.run(chain(audio=probe_audio("silence")))
    assert kept(chain())["value"].shape == (10, 320, 320, 3)


@pytest.mark.parametrize("name", ["missing", "truncated", "wrong kind", "nan"])
def test_unsuited_motion_models_are_refused(server, chain, name):
    folder = server.base / "models" / "pctalk" / name
    shutil.copytree(STARTER, folder)
    damaged = folder / "emc.safetensors"
    if name == "missing":
        damaged.unlink()
    elif name == "truncated":
        damaged.write_bytes(damaged.read_bytes()[:-1000])
    elif name == "wrong kind":
        shutil.copy(folder / "lac.safetensors", damaged)
    else:
        tensors = load_file(damaged)
        tensors["obj_vector.weight"][0] = torch.nan
        save_file(tensors, damaged)
    with pytest.raises(NodeError, match="emc") as refused:
        server.run(chain(model={"model": name}))
    assert refused.value.node_type == "PCTalk_LoadMotionModel"
    assert refused.value.message.endswith(".")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_motion_model_of_ones_own_is_listed_loaded_and_reloaded_when_replaced(server, chain, suffix):
    folder = server.base / "models" / "pctalk" / f"mine{suffix}"
    shutil.copytree(STARTER, folder)
    if suffix == ".pth":
        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), file.with_suffix(suffix))
            file.unlink()
    prompt = chain(model={"model": folder.name})
    server.run(prompt)
    assert "model" in server.run(prompt).cached
    (folder / f"lac{suffix}").touch()
    assert "model" not in server.run(prompt).cached


def test_frames_that_do_not_fit_in_memory_are_refused_before_rendering(server, chain):
    enlarged = {"shaped": reshaped("enlarged"), "portrait": {"image": ["shaped", 0]}}
    prompt = chain(**enlarged, audio=probe_audio("tone", 5.0), frames={"fps": 120.0})
    with pytest.raises(NodeError, match="GiB are free: shorten the audio") as refused:
        server.run(prompt)
    assert refused.value.node_type == "PCTalk_WarpDecode"


@pytest.mark.parametrize("shape", ["grey", "rgba", "odd", "pair"])
def test_pictures_of_other_shapes_work(chain, kept, shape):
    prompt = chain(shaped=reshaped(shape), portrait={"image": ["shaped", 0]})
    frames = kept(prompt)["value"]
    assert frames.shape == (10, *{"odd": (318, 318), "pair": (320, 640)}.get(shape, (320, 320)), 3)
    assert frames.min() >= 0 and frames.max() <= 1


def test_face_index_chooses_the_face(server, chain, kept):
    """Two equal faces side by side: each index animates one of them, and only that one."""
    changed = []
    for index in (0, 1):
        prompt = chain(shaped=reshaped("pair"), portrait={"image": ["shaped", 0], "face_index": index})
        frames = kept(prompt)["value"]
        motion = np.abs(frames - frames[:1]).sum((0, 1, 3))
        changed.append(int(motion[320:].sum() > motion[:320].sum()))
        assert min(motion[:320].sum(), motion[320:].sum()) == 0
    assert sorted(changed) == [0, 1]


def test_a_picture_with_odd_sides_becomes_a_video(server, chain):
    prompt = chain(shaped=reshaped("odd"), portrait={"image": ["shaped", 0]})
    prompt["video"] = {"class_type": "CreateVideo", "inputs": {"images": ["frames", 0], "fps": ["frames", 2]}}
    save = {"video": ["video", 0], "filename_prefix": "odd", "format": "auto", "codec": "auto"}
    prompt["save"] = {"class_type": "SaveVideo", "inputs": save}
    assert server.file(server.run(prompt).outputs["save"]["images"][0]).stat().st_size > 1000


@pytest.mark.parametrize(("sample_rate", "channels"), [(8000, 1), (44100, 2), (192000, 2)])
def test_sound_of_any_rate_works(chain, kept, sample_rate, channels):
    prompt = chain(audio=probe_audio("tone", 0.4, sample_rate, channels))
    assert len(kept(prompt)["value"]) == 10


def test_a_16_bit_portrait_works(server, chain, kept, media):
    with Image.open(PACK / "web" / "examples" / "portrait.jpg") as portrait:
        Image.fromarray(np.asarray(portrait.convert("L")).astype(np.uint16) * 257).save(media / "deep.png")
    assert kept(chain(image={"image": "deep.png"}))["value"].shape == (10, 320, 320, 3)


@pytest.mark.parametrize(("fps", "frames"), [(60.0, 60), (23.976, 24), (12.5, 13)])
def test_length_is_the_same_at_any_frame_rate(chain, kept, fps, frames):
    prompt = chain(audio=probe_audio("tone", 1.0), frames={"fps": fps, "paste_back": False})
    kept_frames = kept(prompt)["value"]
    assert len(kept_frames) == frames
    assert kept_frames.shape[1:] == (512, 512, 3)


def test_zero_is_exactly_zero(chain, kept):
    """Intensity 0, gain 0 and no deformation at all give the portrait's own keypoints, bit for bit."""
    keep = {"value": ["sum", 0], "name": "keypoints"}
    own = kept(chain(keep={"value": ["portrait", 1], "name": "own"}), "own")
    silenced = {"sum": {"rows.gain_1": 0.0, "rows.gain_2": 0.0}}
    for parts in (silenced, {"emotion": {"intensity": 0.0}, "sum": {"rows.gain_1": 0.0}}):
        track = kept(chain(**parts, keep=keep), "keypoints")
        assert len(track["expression"]) == 10
        assert np.array_equal(track["expression"], np.broadcast_to(own["expression"], track["expression"].shape))
    alone = chain(keep=keep)
    for link in ("rows.deformation_1", "rows.deformation_2"):
        del alone["sum"]["inputs"][link]
    assert np.array_equal(kept(alone, "keypoints")["expression"], own["expression"])


def test_order_of_rows_never_matters(chain, kept):
    keep = {"value": ["sum", 0], "name": "keypoints"}
    swapped = {"rows.deformation_1": ["emotion", 0], "rows.deformation_2": ["lips", 0]}
    one, other = (kept(chain(sum=links, keep=keep), "keypoints") for links in ({}, swapped))
    assert np.array_equal(one["expression"], other["expression"])


def test_mix_takes_each_region_from_its_row_and_skips_empty_rows(chain, kept):
    from pctalk.keypoints import REGIONS

    speaking = {"motion_model": ["model", 0], "speech": ["speech", 0], "keypoints": ["portrait", 1]}
    sad = {"class_type": "PCTalk_EMCDeform", "inputs": {**speaking, "emotion": "sad", "intensity": 0.5, "region": "all"}}
    rows = {"rows": "3", "seam_softness": 0.0, "rows.deformation_1": ["emotion", 0], "rows.deformation_3": ["sad", 0]}
    for number, region in ((1, "lips"), (2, "all"), (3, "brows")):
        rows |= {f"rows.region_{number}": region, f"rows.weight_{number}": 1.0}
    mix = {"class_type": "PCTalk_RegionEmotionMix", "inputs": rows}
    result = {}
    for name in ("mix", "emotion", "sad"):
        result[name] = kept(chain(sad=sad, mix=mix, keep={"value": [name, 0], "name": name}), name)["offsets"]
    lips, brows = list(REGIONS["lips"]), list(REGIONS["brows"])
    rest = [k for k in range(21) if k not in lips + brows]
    assert np.array_equal(result["mix"][:, lips], result["emotion"][:, lips])
    assert np.array_equal(result["mix"][:, brows], result["sad"][:, brows])
    assert not result["mix"][:, rest].any()


def test_mix_of_nothing_is_refused(server, chain):
    rows = {"rows": "2", "seam_softness": 0.0}
    for number in (1, 2):
        rows |= {f"rows.region_{number}": "all", f"rows.weight_{number}": 1.0}
    prompt = chain(mix={"class_type": "PCTalk_RegionEmotionMix", "inputs": rows}, keep={"value": ["mix", 0], "name": "mix"})
    with pytest.raises(NodeError, match="connect at least one deformation"):
        server.run(prompt)


@pytest.fixture(scope="module")
def portrait_landmarks() -> torch.Tensor:
    """[468, 2] pixels of the example portrait."""
    with Image.open(PACK / "web" / "examples" / "portrait.jpg") as portrait:
        (face,) = FaceFinder.from_assets().find(torch.from_numpy(np.array(portrait.convert("RGB"))))
    return face.landmarks[:, :2]


def probe_landmarks(frames: list[list[torch.Tensor]], image_size: tuple[int, int] = (320, 320)) -> dict:
    faces = [[points.tolist() for points in frame] for frame in frames]
    return {"class_type": "ProbeLandmarks", "inputs": {"json": json.dumps({"frames": faces, "image_size": image_size})}}


def test_landmarks_of_cores_face_nodes_replace_the_search(chain, kept, portrait_landmarks):
    """The largest of two faces given from outside has the keypoints that the search finds."""
    found = kept(chain(keep={"value": ["portrait", 1], "name": "found"}), "found")
    landmarks = probe_landmarks([[portrait_landmarks * 0.1, portrait_landmarks]])
    prompt = chain(
        landmarks=landmarks, portrait={"landmarks": ["landmarks", 0]}, keep={"value": ["portrait", 1], "name": "given"}
    )
    given = kept(prompt, "given")
    assert np.abs(given["translation"] - found["translation"]).max() < 0.03
    assert np.abs(given["scale"] / found["scale"] - 1).max() < 0.05


def test_landmarks_of_another_picture_are_refused(server, chain, portrait_landmarks):
    landmarks = probe_landmarks([[portrait_landmarks]], (640, 640))
    with pytest.raises(NodeError, match="detect them on the same image"):
        server.run(chain(landmarks=landmarks, portrait={"landmarks": ["landmarks", 0]}))


def test_a_frame_without_landmarks_is_bridged_and_none_at_all_is_refused(server, chain, kept, portrait_landmarks):
    video = {"shaped": reshaped("video"), "keep": {"value": ["portrait", 1], "name": "bridged"}}
    linked = {"image": ["shaped", 0], "landmarks": ["landmarks", 0]}
    gap = probe_landmarks([[portrait_landmarks], [], [portrait_landmarks]])
    track = kept(chain(**video, landmarks=gap, portrait=linked), "bridged")
    assert np.allclose(track["expression"][1], track["expression"][0], atol=1e-5)
    assert "bridged from their neighbours" in server.log.read_text()
    with pytest.raises(NodeError, match="at most 0 faces a frame"):
        server.run(chain(**video, landmarks=probe_landmarks([[], [], []]), portrait=linked))


def test_drawn_keypoints_are_the_crop_once_per_frame(chain, kept):
    draw = {"class_type": "PCTalk_DrawKeypoints", "inputs": {"portrait": ["portrait", 0], "keypoints": ["sum", 0]}}
    pictures = kept(chain(draw=draw, keep={"value": ["draw", 0], "name": "drawn"}), "drawn")["value"]
    assert pictures.shape == (10, 512, 512, 3)
    red = (pictures[..., 0] > 0.9) & (pictures[..., 1] < 0.5)
    ys, xs = np.nonzero(red[0])
    assert len(ys) > 6 * 20  # six lip points of some fifty pixels each, some hidden
    assert 200 < xs.mean() < 312 and 256 < ys.mean() < 420  # below the middle of the crop, where the mouth is
