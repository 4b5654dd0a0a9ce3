"""Make the starter motion model from nothing: speak a corpus, train the networks, measure them, write the files.

    python -m pctalk.train --work DIR [--facegood DIR] [--recordings DIR] [--out DIR]

Needs the extra `train` and flite; Festival and eSpeak NG are used when they are there (see voices.py). Every stage leaves a
file in the work folder and is skipped when it finds it, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints import STARTER, MotionModel, save_motion_model
from ..networks.audio_encoder import AudioEncoder
from ..networks.predictor import Refiner
from .corpus import Corpus, held_out_utterances, read_facegood, synthesise
from .encoder import train_encoder
from .expressions import FacePrior
from .measure import agreement, emotion_shapes, read_recordings, steadiness, style_spread
from .motion import Targets, encode_corpus, train_emotions, train_lips, train_style_encoder

RECOMMENDED = (0, 1, 6)  # style ids: balanced, expressive, crisp (see styles.py)


@dataclass(frozen=True)
class Schedule:
    """How long each stage trains: optimiser steps, and video frames of cached features."""

    encoder: int = 1500
    encoder_single: int = 350
    frames: int = 52_000
    lips: int = 1800
    emotions: int = 900
    styles: int = 900
    corpus: float = 1.0


QUICK = Schedule(encoder=60, encoder_single=20, frames=6000, lips=60, emotions=40, styles=30, corpus=0.05)


def train_starter(
    work: Path, *, facegood: Path | None = None, schedule: Schedule | None = None, seed: int = 0, processes: int = 2
) -> MotionModel:
    """All stages; see the module. Raises RuntimeError when there is nothing to speak with."""
    schedule = schedule or Schedule()
    work.mkdir(parents=True, exist_ok=True)
    corpus = synthesise(work, processes, schedule.corpus)
    if facegood is not None:
        corpus = corpus + read_facegood(facegood)
    print(f"corpus: {corpus.clips} clips, {corpus.bounds[-1] / 80 / 60:.1f} minutes")
    encoder = _encoder(work, corpus, schedule, seed)
    targets = Targets(FacePrior.load())
    takes = encode_corpus(encoder, corpus, frames=schedule.frames, seed=seed)
    lac, _ = train_lips(takes, targets, steps=schedule.lips, seed=seed)
    style_encoder, _ = train_style_encoder(lac, takes, targets, steps=schedule.styles)
    emc, _ = train_emotions(takes, targets, steps=schedule.emotions, seed=seed)
    # The refiner stays the identity: fitted linearly to what the predictor leaves, it made closures and rest worse.
    return MotionModel("starter", encoder, lac, Refiner().eval(), emc, style_encoder, RECOMMENDED)


def _encoder(work: Path, corpus: Corpus, schedule: Schedule, seed: int) -> AudioEncoder:
    path = work / "audio_encoder.pt"
    encoder = AudioEncoder()
    if path.exists():
        encoder.load_state_dict(torch.load(path, weights_only=True))
        return encoder.eval()
    encoder, _, _ = train_encoder(corpus, steps=schedule.encoder, single_steps=schedule.encoder_single, seed=seed)
    temporary = path.with_suffix(".part")
    torch.save(encoder.state_dict(), temporary)
    os.replace(temporary, path)
    return encoder


def report(model: MotionModel, recordings: Path | None = None) -> dict:
    """Every figure of the model card."""
    targets = Targets(FacePrior.load())
    utterances = held_out_utterances()
    figures = {
        "held_out_synthetic": agreement(model, targets, utterances),
        "steadiness": steadiness(model, targets.prior, utterances[0]),
        "styles": style_spread(model, targets.prior, utterances[0]),
        "emotions": emotion_shapes(model, targets, utterances[0].samples),
    }
    if recordings is not None:
        figures["recordings"] = agreement(model, targets, read_recordings(recordings))
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m pctalk.train` and `pctalk train`. Returns 0; exits with 2 and one sentence on an error."""
    parser = argparse.ArgumentParser(prog="pctalk train", description="Make the starter motion model from nothing.")
    parser.add_argument("model", nargs="?", choices=["starter"], default="starter", help="what to train")
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus and intermediate results")
    parser.add_argument("--facegood", type=Path, help="folder with FACEGOOD-Audio2Face clips and controls.json")
    parser.add_argument("--recordings", type=Path, help="folder of VOICE-NAME.wav and .txt to measure on (never trained on)")
    parser.add_argument("--out", type=Path, default=STARTER, help="folder for the weights (default: the one that ships)")
    parser.add_argument("--threads", type=int, default=1, help="threads to train with")
    parser.add_argument("--quick", action="store_true", help="a minute's run that shows that everything works")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        model = train_starter(options.work, facegood=options.facegood, schedule=QUICK if options.quick else None)
        save_motion_model(model, options.out)
        print(json.dumps(report(model, options.recordings), indent=1))
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0
