"""How the starter model is made, and what the shipped one does."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="training needs the extra `train` (scipy, soundfile, soxr)")
pytest.importorskip("soundfile", reason="training needs the extra `train` (scipy, soundfile, soxr)")

from pctalk.checkpoints import STARTER, MotionModel, load_motion_model, save_motion_model
from pctalk.emc import predict_emotions
from pctalk.keypoints import EMOTIONS, LIPS
from pctalk.lac import predict_lips
from pctalk.networks.decoder import flatten_keypoints
from pctalk.networks.predictor import Refiner
from pctalk.speech import SAMPLE_RATE, encode_speech
from pctalk.train import augment, corpus, encoder, measure, motion, styles, visemes, voices
from pctalk.train.expressions import MOUTH, VALUES, Expressions, FacePrior

EXAMPLE = Path(__file__).parents[1] / "web" / "examples" / "speech.flac"
TIMES = np.arange(0, 1.2, 1 / 80)
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed (Debian: apt-get install flite)")


@pytest.fixture(scope="module")
def prior() -> FacePrior:
    return FacePrior.load()


@pytest.fixture(scope="module")
def targets(prior) -> motion.Targets:
    return motion.Targets(prior)


def spell(*phones: str, seconds: float = 0.1) -> list[tuple[str, float, float]]:
    return [(phone, i * seconds, (i + 1) * seconds) for i, phone in enumerate(phones)]


def hum(phones, rng: np.random.Generator) -> voices.Utterance:
    """A buzz whose colour follows the phones: open vowels loud and low, closures silent."""
    samples = np.zeros(int(phones[-1][2] * SAMPLE_RATE), dtype=np.float32)
    t = np.arange(len(samples)) / SAMPLE_RATE
    tones = {"aa": (700, 0.6), "iy": (2400, 0.3), "uw": (350, 0.3), "s": (5000, 0.1), "m": (200, 0.02), "pau": (100, 0.0)}
    for name, start, end in phones:
        frequency, level = tones[name]
        inside = (t >= start) & (t < end)
        samples[inside] = level * (np.sin(2 * np.pi * frequency * t[inside]) + 0.1 * rng.standard_normal(inside.sum()))
    return voices.Utterance(samples, tuple(phones), "flite:none")


@pytest.fixture(scope="module")
def small_corpus() -> corpus.Corpus:
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(4):
        names = ["pau", *rng.choice(["aa", "iy", "uw", "s", "m"], size=38), "pau"]
        utterance = hum(spell(*names, seconds=0.12), rng)
        clips.append((*corpus.label(utterance), utterance.voice))
    return corpus.Corpus.join(clips)


@pytest.mark.parametrize("seconds", [0.03, 0.06, 0.15])
@pytest.mark.parametrize("phone", visemes.BILABIALS)
def test_closures_are_complete_on_a_video_frame(phone, seconds, targets):
    phones = [("aa", 0.0, 0.5), (phone, 0.5, 0.5 + seconds), ("aa", 0.5 + seconds, 1.2)]
    for offset in (0.0, 0.01, 0.02, 0.03):  # wherever the frames fall
        curves = visemes.mouth_curves(phones, np.arange(offset, 1.2, 1 / 25))
        gap = targets.prior.lip_gap(targets.expressions.articulate(curves))
        during = round((0.5 + seconds / 2 - offset) * 25)
        assert gap[during - 1 : during + 2].min() <= measure.CONTACT
        assert gap.max() > 0.15


def test_coarticulation_is_bounded_and_shared():
    rng = np.random.default_rng(1)
    phones = spell(*rng.choice(list(visemes.PHONES), size=12), seconds=0.1)
    curves = visemes.mouth_curves(phones, TIMES)
    assert curves.min() >= 0.0 and curves.max() <= 1.0
    assert np.abs(np.diff(curves, axis=0)).max() * 80 < 40  # no jump: the fastest is a closure within 50 ms
    calm = visemes.mouth_curves(spell("t", "iy", "t"), TIMES)[10]
    rounded = visemes.mouth_curves(spell("t", "iy", "uw"), TIMES)[10]
    assert rounded[1] > calm[1] + 0.05  # rounding is anticipated across a neighbour


def test_long_vowels_open_further_than_short_ones():
    openings = []
    for seconds in (0.04, 0.08, 0.2):
        phones = [("t", 0.0, 0.1), ("aa", 0.1, 0.1 + seconds), ("s", 0.1 + seconds, 0.4 + seconds)]
        openings.append(visemes.mouth_curves(phones, TIMES)[:, 0].max())
    assert openings[0] < openings[1] < openings[2] <= 0.9


def test_unknown_phones_are_pauses_and_stress_is_ignored():
    assert visemes.units([("+noise+", 0, 1)])[0] == ["sil"]
    assert visemes.units([("AY1", 0, 1)])[0] == ["AA", "IY"]


def test_every_style_keeps_closures_and_differs(targets):
    phones = spell("aa", "m", "uw", "p", "iy", "b", "eh", seconds=0.15)
    curves = visemes.mouth_curves(phones, np.arange(0, 1.05, 1 / 25))
    gaps = []
    for style in styles.STYLES:
        gap = targets.prior.lip_gap(targets.expressions.articulate(styles.apply_style(curves, style, 25)))
        mouth = measure.Mouth(gap, gap)
        assert max(measure.closures(mouth, phones)) <= measure.CONTACT, style.name
        gaps.append(gap)
    assert min(np.abs(a - b).max() for i, a in enumerate(gaps) for b in gaps[:i]) > 0.005


def test_mouth_shapes_on_the_mesh(prior):
    shapes = Expressions.design(prior)
    rest = shapes.articulate(np.zeros(4))
    wide_open, pursed, spread, pressed = (shapes.articulate(row) for row in np.eye(4))
    assert prior.lip_gap(rest) < measure.CONTACT
    assert 0.3 < prior.lip_gap(wide_open) < 0.42
    assert prior.lip_gap(pressed) < 0.0
    assert prior.mouth_width(pursed) < prior.mouth_width(rest) - 0.15
    assert prior.mouth_width(spread) > prior.mouth_width(rest) + 0.1
    assert np.abs(prior.mesh(pressed)[13] - prior.mesh(pressed)[14])[1] < 0.02  # the lips don't cross
    assert set(MOUTH) == {"rest", *visemes.CURVES}


def test_emotions_are_distinct_and_neutral_is_zero(prior):
    shapes = Expressions.design(prior).emotions
    assert not shapes[EMOTIONS.index("neutral")].any()
    moved = shapes[1:] @ prior.basis.reshape(VALUES, -1)
    cosine = moved @ moved.T / np.outer(*[np.linalg.norm(moved, axis=1)] * 2)
    assert (cosine - np.eye(7)).max() < 0.85
    assert np.linalg.norm(moved, axis=1).min() > 0.3


def test_emotions_do_what_their_action_units_say(prior):
    measured = {
        name: {what: float(shape @ prior.measure(what)) for what in ("corners", "inner_brows", "upper_lids", "gap", "nostrils")}
        for name, shape in zip(EMOTIONS, Expressions.design(prior).emotions, strict=True)
    }  # y is down: negative is raised
    assert measured["happy"]["corners"] < -0.06
    assert measured["sad"]["corners"] > 0.05 and measured["sad"]["inner_brows"] < -0.02
    assert measured["angry"]["inner_brows"] > 0.04
    assert measured["fear"]["inner_brows"] < -0.03 and measured["fear"]["upper_lids"] < -0.02
    assert measured["disgusted"]["nostrils"] < -0.01
    assert measured["surprised"]["gap"] > 0.15 and measured["surprised"]["upper_lids"] < -0.03
    contempt = Expressions.design(prior).emotions[EMOTIONS.index("contempt")]
    assert contempt @ prior.measure("right_corner") < -0.06
    assert contempt @ prior.measure("left_corner") > 0  # only one corner rises


@pytest.mark.parametrize("emotion", range(len(EMOTIONS)))
def test_no_emotion_breaks_a_closure(emotion, targets):
    closed = np.array([[0.0, 0.1, 0.0, 1.0]])
    face = targets.emotional(closed, np.ones(1), emotion) - targets.lips(np.zeros((1, 4))) + targets.expressions.rest
    assert targets.prior.lip_gap(face)[0] <= measure.CONTACT


def test_augmentation_keeps_shape_range_and_seed():
    mel = torch.rand(3, augment.REVERB_FRAMES + 30, 80) * 6 - 4
    one, two = (augment.augment(mel, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.shape == (3, 30, 80) and torch.equal(one, two)
    assert one.min() >= -4 and one.max() <= 4
    assert (one - mel[:, augment.REVERB_FRAMES :]).abs().mean() > 0.1
    assert torch.equal(augment.augment(mel, torch.Generator(), strength=0.0), mel[:, augment.REVERB_FRAMES :])


def test_band_warp_moves_a_resonance():
    mel = torch.full((1, 4, 80), -80.0)
    mel[..., 40] = 0.0
    warped = augment.warp_bands(mel, torch.tensor([1.2]), augment.band_centres())
    centres = augment.band_centres()
    assert centres[warped[0, 0].argmax()] / centres[40] == pytest.approx(1.2, rel=0.05)


def test_cut_interpolates_and_holds():
    clip = torch.arange(5.0)[:, None]
    assert augment.cut(clip, 0.5, 3, 1.5).flatten().tolist() == [0.5, 2.0, 3.5]
    assert augment.cut(clip, -2.0, 3, 1.0).flatten().tolist() == [0.0, 0.0, 0.0]


def test_training_decodes_as_the_pipeline_does():
    torch.manual_seed(0)
    network = motion.LipPredictor(styles=3, dim=32, ff_dim=64)
    torch.nn.init.normal_(network.vertice_map_r.weight)
    memory, style, warm = torch.randn(2, 12, 32), network.style(torch.tensor([0, 2])), torch.randn(2, 4, 18)
    for start in (None, warm):
        with torch.no_grad():
            decoder = network.prepared(style)
            ours, pipeline = motion.rollout(network, memory, style, start), decoder(decoder.cross(memory), start)
        assert ours.shape == (2, 12 - (0 if start is None else 4), 18)
        torch.testing.assert_close(ours, pipeline, rtol=1e-4, atol=1e-4)


def test_corpus_round_trip(small_corpus, tmp_path):
    small_corpus.save(tmp_path / "corpus.npz")
    loaded = corpus.Corpus.load(tmp_path / "corpus.npz")
    assert loaded.voices == small_corpus.voices and np.array_equal(loaded.curves, small_corpus.curves)
    joined = loaded.select([1, 3]) + loaded.select([0])
    for ours, theirs in zip(joined.clip(2), small_corpus.clip(0), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_short_training_learns_and_writes_loadable_files(small_corpus, targets, tmp_path):
    quiet = {"report": lambda line: None}
    audio_encoder, _, losses = encoder.train_encoder(small_corpus, steps=5, single_steps=1, batch=24, outputs=4, **quiet)
    assert len(losses) == 6 and np.mean(losses[-2:]) < losses[0]
    takes = motion.encode_corpus(audio_encoder, small_corpus, frames=500, seed=0, **quiet)
    assert all(len(take.features) == len(take.curves) == len(take.level) for take in takes)
    lac, losses = motion.train_lips(takes, targets, steps=12, rows=8, **quiet)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    emc, losses = motion.train_emotions(takes, targets, steps=8, rows=2, **quiet)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    style_encoder, losses = motion.train_style_encoder(lac, takes, targets, steps=6, rows=8, **quiet)
    assert np.isfinite(losses).all()
    made = MotionModel("made", audio_encoder, lac, Refiner(), emc, style_encoder)
    save_motion_model(made, tmp_path)
    loaded = load_motion_model(tmp_path)
    samples = hum(spell("pau", "aa", "m", "iy", "pau", seconds=0.2), np.random.default_rng(2)).samples
    ours, theirs = (measure.drive(model, targets.prior, samples).gap for model in (made, loaded))
    assert len(ours) == 25 and np.abs(ours - theirs).max() < 0.01  # half precision on disk


@needs_flite
def test_flite_tells_when_phones_end():
    utterance = voices.speak("flite:slt", "Bob may open my map.", stretch=1.1, formants=1.1)
    names = [name for name, _, _ in utterance.phones]
    assert {"b", "aa", "m"} <= set(names)
    assert all(a[2] == b[1] for a, b in pairwise(utterance.phones))
    assert utterance.phones[-1][2] == pytest.approx(len(utterance.samples) / SAMPLE_RATE, abs=0.1)


def test_an_unusable_recording_folder_is_said(tmp_path):
    (tmp_path / "controls.json").write_text('{"controls": [], "clips": []}')
    with pytest.raises(FileNotFoundError, match="FACEGOOD"):
        corpus.read_facegood(tmp_path)


# The model that ships.


@pytest.fixture(scope="module")
def shipped() -> MotionModel:
    return load_motion_model()


@pytest.fixture(scope="module")
def example() -> np.ndarray:
    import soundfile

    samples, rate = soundfile.read(EXAMPLE, dtype="float32")
    assert rate == SAMPLE_RATE
    return samples


def test_the_shipped_files_are_small():
    files = list(STARTER.glob("*.safetensors"))
    assert {file.stem for file in files} == {"audio_encoder", "lac", "emc", "style_encoder"}
    assert sum(file.stat().st_size for file in files) < 20 * 2**20


def test_the_shipped_model_speaks_and_rests(shipped, prior, example):
    silence = np.random.default_rng(0).normal(0, 3e-4, 3 * SAMPLE_RATE).astype(np.float32)
    mouth = measure.drive(shipped, prior, np.concatenate([example, silence]))
    speech = int(25 * len(example) / SAMPLE_RATE)
    assert np.percentile(mouth.gap[:speech], 90) > 0.1
    assert mouth.gap[speech + 25 :].max() < 0.03  # at rest a second after the speech
    assert mouth.width[:speech].max() - mouth.width[:speech].min() > 0.1


def test_the_shipped_styles_differ(shipped, prior, example):
    assert shipped.styles == len(styles.STYLES)
    gaps = {style.name: measure.drive(shipped, prior, example, index).gap for index, style in enumerate(styles.STYLES)}
    assert np.std(gaps["expressive"]) > 1.4 * np.std(gaps["restrained"])


def test_the_shipped_style_encoder_carries_a_style_over(shipped, prior, example):
    """Lips that speak in one style make other speech look like it."""
    speech = encode_speech(shipped.audio_encoder, torch.from_numpy(example), SAMPLE_RATE)
    still = measure.still_face(prior)
    mouths = {}
    for index, style in enumerate(styles.STYLES):
        lips = predict_lips(shipped, speech, still, style=index, lips="add").offsets[:100, list(LIPS)]
        with torch.no_grad():
            embedding = shipped.style_encoder(flatten_keypoints(lips)[None])[0]
        mouths[style.name] = measure.drive(shipped, prior, example[3 * SAMPLE_RATE :], embedding)
    assert mouths["expressive"].gap.std() > 1.2 * mouths["restrained"].gap.std()
    assert mouths["open-jawed"].gap.std() > 1.1 * mouths["soft"].gap.std()
    assert mouths["spread"].width.mean() > mouths["rounded"].width.mean() + 0.01


def test_the_shipped_emotions_are_recognisable(shipped, targets, example):
    table = measure.emotion_shapes(shipped, targets, example)
    for name, row in table.items():
        assert row["cosine"] > max(0.8, row["runner_up"]), name
        assert 0.6 < row["size"] < 1.4, name


def test_the_shipped_neutral_is_zero(shipped, prior, example):
    speech = encode_speech(shipped.audio_encoder, torch.from_numpy(example[: 2 * SAMPLE_RATE]), SAMPLE_RATE)
    assert not predict_emotions(shipped, speech, measure.still_face(prior), ["neutral"])["neutral"].offsets.any()


@needs_flite
def test_the_shipped_model_follows_unheard_sentences(shipped, targets):
    """Sentences and settings that training never had, in the four flite voices."""
    table = measure.agreement(shipped, targets, corpus.held_out_utterances()[:12])
    for voice, row in table.items():
        assert row["gap"] > 0.6 and row["width"] > 0.5, (voice, row)
        assert row["mismatched"] < row["gap_best"] - 0.2, (voice, row)
    assert np.mean([row["closed"] for row in table.values()]) >= 0.8
