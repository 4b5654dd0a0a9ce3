import numpy as np
import pytest
import torch

from pctalk.evaluate.golden import relative_difference
from pctalk.evaluate.reference import random_motion_model, reference_lips
from pctalk.keypoints import LIPS, Keypoints, add_deformations, rotation_matrix
from pctalk.lac import (
    ARTICULATION,
    articulation_vector,
    edit_articulation,
    kalman_smooth,
    lip_offsets,
    loudness_gain,
    predict_lips,
    style_embedding,
)
from pctalk.speech import Speech

REST = [point for point in range(21) if point not in LIPS]


@pytest.fixture(scope="module")
def model():
    return random_motion_model(dim=32, ff_dim=48, styles=5, window=10)


def random_speech(frames: int, seed: int = 0) -> Speech:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, 512, generator=generator)
    return Speech(features, -20.0 + 6.0 * torch.randn(frames, generator=generator), seconds=frames / 25)


def random_keypoints(frames: int = 1, fps: float = 25.0) -> Keypoints:
    generator = torch.Generator().manual_seed(7)
    return Keypoints(
        canonical=0.4 * torch.randn(21, 3, generator=generator),
        rotation=rotation_matrix(*(10 * torch.randn(3, frames, generator=generator))),
        scale=1.4 + 0.1 * torch.rand(frames, generator=generator),
        translation=0.2 * torch.randn(frames, 3, generator=generator),
        expression=0.05 * torch.randn(frames, 21, 3, generator=generator),
        fps=fps,
    )


@pytest.mark.parametrize("frames", [1, 5, 10, 11, 18, 19, 43])
@pytest.mark.parametrize("refined", [True, False])
def test_incremental_decoding_is_the_published_scheme(model, frames, refined):
    features = random_speech(frames).features
    still = random_keypoints(frames).undeformed()[:, LIPS]
    style = style_embedding(model, 3)
    refiner = model.refiner if refined else None
    expected = reference_lips(model.lac, refiner, features, still, style)
    actual = lip_offsets(model.lac, refiner, features, still, style)
    assert actual.shape == (frames, 6, 3)
    assert (actual - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


def test_replace_takes_the_place_of_the_sources_lips(model):
    speech, keypoints = random_speech(23), random_keypoints()
    replaced = add_deformations(keypoints, [predict_lips(model, speech, keypoints, lips="replace")])
    offsets = predict_lips(model, speech, keypoints, lips="add").offsets
    expected = keypoints.undeformed() + offsets
    assert torch.allclose(replaced.posed()[:, LIPS], expected[:, LIPS], atol=1e-6)
    still = keypoints.posed().expand(23, -1, -1)
    assert torch.allclose(replaced.posed()[:, REST], still[:, REST], atol=1e-6)


def test_replace_follows_a_moving_source(model):
    speech, keypoints = random_speech(20), random_keypoints(30)
    deformation = predict_lips(model, speech, keypoints, amplitude=0.0)
    still = add_deformations(keypoints.extended(20), [deformation])
    assert torch.allclose(still.posed()[:, LIPS], keypoints.undeformed()[:20, LIPS], atol=1e-6)


def test_only_the_lips_move(model):
    deformation = predict_lips(model, random_speech(12), random_keypoints(), pursing=1.3, opening=0.7)
    assert deformation.regions == ("lips",)
    assert not deformation.offsets[:, REST].any()
    assert deformation.offsets[:, LIPS].any(dim=(1, 2)).all()


def test_zero_amplitude_is_exactly_zero(model):
    assert not predict_lips(model, random_speech(12), random_keypoints(), amplitude=0.0, lips="add").offsets.any()


def test_amplitude_is_linear_and_may_vary_with_time(model):
    speech, keypoints = random_speech(12), random_keypoints()
    whole = predict_lips(model, speech, keypoints, lips="add").offsets
    half = predict_lips(model, speech, keypoints, amplitude=0.5, lips="add").offsets
    assert torch.allclose(half, 0.5 * whole, atol=1e-7)
    curve = torch.linspace(0, 1, 12)
    varying = predict_lips(model, speech, keypoints, amplitude=curve, lips="add").offsets
    assert torch.allclose(varying, curve[:, None, None] * whole, atol=1e-7)


def test_progress_counts_frames(model):
    calls = []
    predict_lips(model, random_speech(23), random_keypoints(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(10, 23), (18, 23), (23, 23)]


def test_styles_differ_and_are_checked(model):
    speech, keypoints = random_speech(12), random_keypoints()
    first, second = (predict_lips(model, speech, keypoints, style=style).offsets for style in (0, 4))
    assert relative_difference(first, second) > 0.1
    embedding = style_embedding(model, 4)[0]
    assert torch.equal(predict_lips(model, speech, keypoints, style=embedding).offsets, second)
    for style in (5, -1):
        with pytest.raises(ValueError, match=f"Style {style} is out of range: .* has the styles 0 to 4"):
            predict_lips(model, speech, keypoints, style=style)
    with pytest.raises(ValueError, match="has 16 values, the motion model random expects 32"):
        predict_lips(model, speech, keypoints, style=torch.zeros(16))
    with pytest.raises(ValueError, match="expected 'replace' or 'add'"):
        predict_lips(model, speech, keypoints, lips="both")


def test_smoothing_can_be_turned_off(model):
    speech, keypoints = random_speech(12), random_keypoints()
    rough = predict_lips(model, speech, keypoints, smoothing=False, lips="add").offsets
    smooth = predict_lips(model, speech, keypoints, lips="add").offsets
    assert torch.allclose(kalman_smooth(rough.flatten(1)), smooth.flatten(1), atol=1e-6)
    assert not torch.equal(rough, smooth)


@pytest.mark.parametrize("name", ARTICULATION)
def test_articulation_gain_scales_its_own_direction(name):
    offsets = torch.randn(9, 21, 3, generator=torch.Generator().manual_seed(0))
    vector = articulation_vector(name).flatten()
    gain = torch.linspace(0.5, 1.5, 9)
    edited = edit_articulation(offsets, **{name: gain})
    share, edited_share = offsets.flatten(1) @ vector, edited.flatten(1) @ vector
    assert torch.allclose(edited_share, gain * share, atol=1e-6)
    change = (edited - offsets).flatten(1)
    assert torch.allclose(change, (change @ vector)[:, None] * vector / vector.square().sum(), atol=1e-6)
    assert torch.equal(edit_articulation(offsets), offsets)


def test_articulation_edits_apply_in_order():
    pursing, widening = articulation_vector("pursing").flatten(), articulation_vector("widening").flatten()
    assert torch.cosine_similarity(pursing, widening, dim=0).item() == pytest.approx(-0.516, abs=1e-3)
    offsets = torch.randn(4, 21, 3, generator=torch.Generator().manual_seed(0))
    together = edit_articulation(offsets, pursing=1.2, widening=0.9)
    in_turn = edit_articulation(edit_articulation(offsets, pursing=1.2), widening=0.9)
    assert torch.allclose(together, in_turn, atol=1e-7)


def plain_smoother(track: np.ndarray) -> np.ndarray:
    """Kalman filter and Rauch-Tung-Striebel smoother, a frame at a time."""
    mean, variance = track[0], 1.0
    filtered = []
    for frame, observed in enumerate(track):
        if frame:
            variance = variance + 1e-5
        gain = variance / (variance + 1e-6)
        mean, variance = mean + gain * (observed - mean), (1 - gain) * variance
        filtered.append((mean, variance))
    smoothed = [filtered[-1][0]]
    for mean, variance in reversed(filtered[:-1]):
        smoothed.append(mean + variance / (variance + 1e-5) * (smoothed[-1] - mean))
    return np.array(smoothed[::-1])


@pytest.mark.parametrize("frames", [1, 2, 3, 17, 200])
def test_kalman_smoother(frames):
    track = torch.randn(frames, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert np.abs(kalman_smooth(track).numpy() - plain_smoother(track.numpy())).max() < 1e-14
    assert kalman_smooth(track.float()).dtype == torch.float32


def test_loudness_gain():
    loudness = torch.full((100,), -20.0)
    loudness[40:60] = -70.0
    assert torch.equal(loudness_gain(loudness, 0.0), torch.ones(100))
    gain = loudness_gain(loudness, 1.0)
    assert torch.allclose(gain[:38], torch.ones(38)) and torch.allclose(gain[62:], torch.ones(38))
    assert gain[42:58].abs().max() < 1e-6  # silence closes the mouth
    assert (gain[38:43].diff() < 0).all() and gain.diff().abs().max() < 0.5  # smoothly
    assert torch.allclose(loudness_gain(loudness, 0.5), 0.5 + 0.5 * gain)
    assert torch.allclose(loudness_gain(loudness + 7.0, 1.0), gain, atol=1e-6)  # only relative loudness counts
    loudness[80:] = 0.0
    assert loudness_gain(loudness, 1.0).max().item() == pytest.approx(1.5)  # bounded
    with pytest.raises(ValueError, match=r"follow_loudness is 1\.5"):
        loudness_gain(loudness, 1.5)


def test_follow_loudness_scales_the_lips(model):
    speech, keypoints = random_speech(30), random_keypoints()
    plain = predict_lips(model, speech, keypoints, lips="add").offsets
    following = predict_lips(model, speech, keypoints, follow_loudness=0.7, lips="add").offsets
    assert torch.allclose(following, plain * loudness_gain(speech.loudness, 0.7)[:, None, None], atol=1e-6)


def test_the_same_input_gives_the_same_bytes(model):
    speech, keypoints = random_speech(30), random_keypoints()
    assert torch.equal(predict_lips(model, speech, keypoints).offsets, predict_lips(model, speech, keypoints).offsets)
