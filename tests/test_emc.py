import itertools

import pytest
import torch
from test_lac import random_keypoints, random_speech

from pctalk import emc as module
from pctalk.emc import emotion_motion, mix_regions, predict_emotion, predict_emotions, soft_mask
from pctalk.evaluate.golden import relative_difference
from pctalk.evaluate.reference import random_motion_model, reference_emotions
from pctalk.keypoints import EMOTIONS, LIPS, REGIONS, Deformation, region_mask


@pytest.fixture(scope="module")
def model():
    return random_motion_model(dim=32, ff_dim=48, styles=5, window=10)


@pytest.fixture(scope="module")
def emotions(model):
    return predict_emotions(model, random_speech(23), random_keypoints(), EMOTIONS)


@pytest.mark.parametrize("frames", [1, 5, 10, 11, 18, 19, 43])
def test_batched_decoding_is_the_published_scheme(model, frames):
    features, codes = random_speech(frames).features, torch.eye(8)[[0, 1, 6]]
    expected = reference_emotions(model.emc, features, codes)
    actual = emotion_motion(model.emc, features, codes)
    assert actual.shape == (3, frames, 21, 3)
    assert (actual - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


def test_groups_of_windows_don_t_matter(model, monkeypatch):
    features, codes = random_speech(60).features, torch.eye(8)[[0, 3]]
    whole = emotion_motion(model.emc, features, codes)
    monkeypatch.setattr(module, "CONDITION_WINDOWS", 2)
    assert relative_difference(emotion_motion(model.emc, features, codes), whole) < 1e-4


def test_an_emotion_does_not_depend_on_its_company(model, emotions):
    alone = predict_emotions(model, random_speech(23), random_keypoints(), ["sad"])["sad"]
    assert relative_difference(alone.offsets, emotions["sad"].offsets) < 1e-4


def test_every_emotion_moves_the_whole_face_but_neutral(emotions):
    assert set(emotions) == set(EMOTIONS)
    for name, deformation in emotions.items():
        assert deformation.offsets.shape == (23, 21, 3) and deformation.regions == ("all",)
        assert deformation.offsets.any(dim=2).all() == (name != "neutral")
    assert not emotions["neutral"].offsets.any()


def test_emotions_are_checked(model):
    with pytest.raises(ValueError, match="Unknown emotion 'bored': choose one of neutral, happy"):
        predict_emotions(model, random_speech(5), random_keypoints(), ["happy", "bored"])
    with pytest.raises(ValueError, match="Unknown region 'nose'"):
        predict_emotion(model, random_speech(5), random_keypoints(), emotion="happy", region="nose")
    assert predict_emotions(model, random_speech(5), random_keypoints(), []) == {}


def test_intensity_is_linear_and_zero_is_zero(model, emotions):
    speech, keypoints = random_speech(23), random_keypoints()

    def happy(intensity):
        return predict_emotion(model, speech, keypoints, emotion="happy", intensity=intensity).offsets

    assert not happy(0.0).any()
    assert torch.allclose(happy(0.3) + happy(0.4), happy(0.7), atol=1e-6)
    assert relative_difference(happy(1.0), emotions["happy"].offsets) < 1e-4
    assert torch.equal(happy(0.5), 0.5 * happy(1.0))


@pytest.mark.parametrize("region", REGIONS)
def test_outside_its_region_an_emotion_is_exactly_zero(model, region):
    deformation = predict_emotion(model, random_speech(12), random_keypoints(), emotion="angry", region=region)
    inside = region_mask(region) > 0
    assert not deformation.offsets[:, ~inside].any()
    assert deformation.offsets[:, inside].any(dim=2).all()


def test_progress_counts_frames(model):
    calls = []
    predict_emotions(
        model, random_speech(23), random_keypoints(), ["sad"], progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(10, 23), (18, 23), (23, 23)]


def test_mix_by_region(emotions):
    mixed = mix_regions([(emotions["happy"], "lips", 0.5), (emotions["sad"], "upper_face", 0.3)])
    assert torch.equal(mixed.offsets[:, LIPS], 0.5 * emotions["happy"].offsets[:, LIPS])
    upper = list(REGIONS["upper_face"])
    assert torch.equal(mixed.offsets[:, upper], 0.3 * emotions["sad"].offsets[:, upper])
    rest = [point for point in range(21) if point not in LIPS and point not in upper]
    assert not mixed.offsets[:, rest].any()
    assert mixed.regions == ("lips", "upper_face")


def test_order_of_rows_never_matters(emotions):
    rows = [
        (emotions["happy"], "lips", 0.5),
        (emotions["sad"], "all", 0.3),
        (emotions["angry"], "brows", -0.7),
        (emotions["fear"], "all", 1.1),
    ]
    mixes = [mix_regions(order, softness) for softness in (0.0, 0.6) for order in itertools.permutations(rows)]
    assert all(torch.equal(mix.offsets, mixes[0].offsets) for mix in mixes[:24])
    assert all(torch.equal(mix.offsets, mixes[24].offsets) for mix in mixes[24:])


def test_zero_weight_adds_nothing(emotions):
    assert not mix_regions([(emotions["happy"], "all", 0.0)]).offsets.any()
    with pytest.raises(ValueError, match="no deformation"):
        mix_regions([])
    with pytest.raises(ValueError, match="Unknown region"):
        mix_regions([(emotions["happy"], "chin", 1.0)])


def test_lengths_may_differ():
    long, short = Deformation(torch.ones(10, 21, 3)), Deformation(torch.arange(3.0)[:, None, None].expand(3, 21, 3))
    mixed = mix_regions([(long, "eyes", 1.0), (short, "lips", 1.0)])
    assert mixed.frames == 10
    assert mixed.offsets[:, 6, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("region", ["lips", "eyes", "brows", "upper_face"])
def test_soft_seams_fade_out_and_leave_other_regions_alone(region):
    hard = region_mask(region)
    others = region_mask("upper_face") + region_mask("lower_face") - hard > 0
    assert torch.equal(soft_mask(region, 0.0), hard)
    previous = hard
    for softness in (0.2, 0.5, 1.0):
        soft = soft_mask(region, softness)
        assert torch.equal(soft[hard > 0], hard[hard > 0])
        assert not soft[others].any()
        assert (soft >= previous).all() and soft.max() <= 1.0
        previous = soft
    assert previous.sum() > hard.sum()
    with pytest.raises(ValueError, match=r"seam softness is 1\.5"):
        soft_mask(region, 1.5)
