import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pctalk.evaluate.golden import filled, relative_difference
from pctalk.evaluate.reference import masks, random_motion_model, torch_decoder
from pctalk.networks.audio_encoder import AudioEncoder
from pctalk.networks.decoder import Decoder, PeriodicPositions, flatten_keypoints, unflatten_keypoints, windows
from pctalk.networks.emotion import EmotionPredictor
from pctalk.networks.predictor import LipPredictor, Refiner
from pctalk.networks.style_encoder import StyleEncoder

PUBLISHED = json.loads((Path(__file__).parent / "golden" / "state_dict_shapes.json").read_text())
NETWORKS = {
    "audio_encoder": AudioEncoder,
    "lac": LipPredictor,
    "refinement": Refiner,
    "style_encoder": StyleEncoder,
    "emc": EmotionPredictor,
}


@pytest.fixture(scope="module")
def model():
    return random_motion_model(dim=32, ff_dim=48, styles=5, window=10)


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_and_shapes_are_the_published_ones(name):
    ours = {key: list(value.shape) for key, value in NETWORKS[name]().state_dict().items()}
    assert ours == PUBLISHED[name]


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 10, 25, 26, 44, 45, 46, 60, 65, 66, 1000])
@pytest.mark.parametrize("window", [1, 4, 5, 10, 25])
def test_windows_cover_every_frame_once(frames, window):
    cuts = list(windows(frames, window))
    fresh = [frame for start, end, warm in cuts for frame in range(start + warm, end)]
    assert fresh == list(range(frames))
    assert all(end - start <= window and warm < end - start for start, end, warm in cuts)
    assert {warm for _, _, warm in cuts[1:]} <= {window // 5}
    assert all(following[0] == cut[1] - window // 5 for cut, following in pairwise(cuts))


def test_layout_is_coordinates_first():
    motion = torch.arange(12).reshape(4, 3)
    assert flatten_keypoints(motion).tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert torch.equal(unflatten_keypoints(flatten_keypoints(motion)), motion)


def test_positions_repeat_with_their_period():
    positions = PeriodicPositions(16, 25)
    assert positions.pe.shape == (1, 625, 16)
    assert torch.equal(positions(0, 25), positions(25, 25))
    assert not torch.equal(positions(0, 24), positions(1, 24))


def test_decoder_is_torchs_decoder_under_the_published_masks():
    torch.manual_seed(0)
    decoder = Decoder(32, heads=4, ff_dim=48, layers=2)
    tokens, memory = torch.randn(3, 10, 32), torch.randn(3, 10, 32)
    causal, diagonal = masks(10, 10, 4, tokens.device)
    with torch.no_grad():
        expected = torch_decoder(decoder)(tokens, memory, causal.repeat(3, 1, 1), diagonal)
        assert relative_difference(decoder(tokens, decoder.cross(memory)), expected) < 1e-5


def test_published_bias_is_zero_inside_one_window():
    causal, diagonal = masks(25, 25, 4, torch.device("cpu"))
    assert torch.equal(causal[2] == 0, torch.ones(25, 25).tril().bool())
    assert torch.equal(diagonal == 0, torch.eye(25).bool())
    longer, _ = masks(26, 25, 4, torch.device("cpu"))
    assert longer[0, 25, 0] == -0.25 and longer[3, 25, 0] == -(2.0**-8)


@pytest.mark.parametrize("rows", [1, 3])
def test_teacher_forcing_on_its_own_predictions_gives_them_again(model, rows):
    features = torch.randn(rows, 10, 512, generator=torch.Generator().manual_seed(1))
    style = model.lac.style(torch.arange(rows))
    decoded = model.lac(features, style)
    assert decoded.shape == (rows, 10, 18)
    assert relative_difference(model.lac.forward_teacher(features, decoded, style), decoded) < 1e-4

    emotion, style = torch.eye(8)[:rows], model.emc.style(torch.zeros(rows, dtype=torch.long))
    decoded = model.emc(features, emotion, style)
    assert relative_difference(model.emc.forward_teacher(features, emotion, decoded, style), decoded) < 1e-4


def test_warm_frames_are_the_first_predictions(model):
    features = torch.randn(2, 10, 512, generator=torch.Generator().manual_seed(2))
    style = model.lac.style(torch.tensor([3, 4]))
    whole = model.lac(features, style)
    assert relative_difference(model.lac(features, style, whole[:, :4]), whole[:, 4:]) < 1e-4


def test_a_frame_does_not_see_later_ones(model):
    generator = torch.Generator().manual_seed(3)
    features, later = torch.randn(2, 1, 10, 512, generator=generator)
    later[:, :6] = features[:, :6]
    style = model.lac.style(torch.tensor([0]))
    assert torch.equal(model.lac(features, style)[:, :6], model.lac(later, style)[:, :6])
    emotion = torch.eye(8)[1:2]
    assert torch.equal(model.emc.condition(features, emotion)[:, :6], model.emc.condition(later, emotion)[:, :6])
    assert not torch.equal(model.emc.condition(features, emotion)[:, 6:], model.emc.condition(later, emotion)[:, 6:])


def test_training_reaches_every_parameter():
    model = random_motion_model(dim=32, ff_dim=48, styles=5, window=10)
    features, emotion = torch.randn(2, 10, 512), torch.eye(8)[:2]
    ids = torch.tensor([0, 1])
    lips = model.lac.forward_teacher(features, torch.randn(2, 10, 18), model.lac.style(ids))
    face = model.emc.forward_teacher(features, emotion, torch.randn(2, 10, 63), model.emc.style(ids))
    (model.refiner(lips, features).square().mean() + face.square().mean()).backward()
    unreached = {
        name
        for network in (model.lac, model.refiner, model.emc)
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert unreached == {"audio_feature_map.weight", "audio_feature_map.bias"}  # EMC's own, which nothing uses
    assert model.lac.audio_feature_map.weight.grad.any()


def test_condition_with_and_without_gradients(model):
    features, emotion = torch.randn(3, 10, 512), torch.eye(8)[[0, 0, 0, 5, 5, 5]]
    with torch.no_grad():
        expected = model.emc.condition(features, emotion)
    actual = model.emc.condition(features, emotion)
    assert actual.requires_grad
    assert relative_difference(actual.detach(), expected) < 1e-5
    alone = model.emc.condition(features[1:2], emotion[4:5]).detach()  # row 4 is window 1 under emotion 5
    assert relative_difference(alone[0], expected[4]) < 1e-5


def test_decoded_motion_may_take_part_in_training(model):
    decoded = model.lac(torch.randn(1, 10, 512), model.lac.style(torch.tensor([0])))
    weight = torch.ones(18, requires_grad=True)
    (decoded * weight).sum().backward()
    assert torch.allclose(weight.grad, decoded.sum(dim=(0, 1)))


def test_decoding_leaves_the_number_of_threads(model):
    threads = torch.get_num_threads()
    model.lac(torch.randn(1, 10, 512), model.lac.style(torch.tensor([0])))
    with pytest.raises(ValueError, match="expected 1 to 10"):
        model.lac(torch.randn(1, 11, 512), model.lac.style(torch.tensor([0])))
    assert torch.get_num_threads() == threads


def test_folded_audio_encoder_is_the_same_function():
    encoder = filled(AudioEncoder(), seed=3)
    mel = torch.randn(3, 1, 80, 16, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    with torch.no_grad():
        assert relative_difference(encoder.folded()(mel), encoder(mel)) < 1e-4
    assert len(encoder.audio_encoder[0].conv_block) == 2  # the original is untouched


def test_style_encoder_classifies():
    encoder = StyleEncoder(styles=7, dim=32, ff_dim=48)
    embedding = encoder(torch.randn(2, 100, 18))
    assert embedding.shape == (2, 32)
    assert encoder.cls(embedding).shape == (2, 7)
