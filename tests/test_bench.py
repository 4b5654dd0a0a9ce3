"""The parts of the benchmark; its figures are no test's business."""

import mmap

import pytest
import torch
from test_cli import PORTRAIT
from test_talk import Dial

from pctalk.evaluate.bench import EXAMPLES, Row, _repeated, chain_rows, import_time, memory_in_use, table
from pctalk.evaluate.reference import random_motion_model
from pctalk.media import read_audio


def test_the_table_is_markdown():
    lines = table([Row("Whole chain", "41.0 frames/s", ">= 30 frames/s"), Row("- reading", "0.1 s")]).splitlines()
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["Whole chain", "41.0 frames/s", ">= 30 frames/s"]
    assert set(lines[1]) == {"|", "-"} and "CPU cores" in lines[0]


def test_the_chain_is_measured_by_stage():
    model = random_motion_model(dim=32, ff_dim=64, styles=2)
    rows = chain_rows(model, Dial(), PORTRAIT, EXAMPLES / "speech.flac", runs=2)
    chains = [row for row in rows if row.name.startswith("Whole chain")]
    assert [row.name.split(",")[1:] for row in chains] == [[" 32 x 32 crop", " 9.1 s"], [" 320 x 320 whole picture", " 9.1 s"]]
    assert all(float(row.value.removesuffix(" frames/s")) > 0 for row in chains)
    assert sum(float(row.value.split("(")[-1].removesuffix("%)")) for row in rows if "%" in row.value) == pytest.approx(
        200, abs=10
    )


def test_a_long_recording_repeats_the_short_one(tmp_path):
    short, rate = read_audio(EXAMPLES / "speech.flac", 48_000)
    long, long_rate = read_audio(_repeated(EXAMPLES / "speech.flac", 0.25, tmp_path / "long.flac"))
    assert rate == long_rate == 48_000 and long.shape == (2, 15 * 48_000)
    expected = short[0, torch.arange(long.shape[1]) % short.shape[1]]
    assert (long - expected).abs().max() < 1e-3


def test_memory_in_use_sees_what_is_allocated():
    size = 64 * 2**20
    before = memory_in_use()
    with mmap.mmap(-1, size) as fresh:  # not from a heap that may hold freed pages
        for start in range(0, size, mmap.PAGESIZE):
            fresh[start] = 1
        grown = memory_in_use() - before
    assert 0.9 * size < grown < 1.5 * size


def test_the_import_time_is_measured_in_a_fresh_interpreter():
    assert 0.001 < import_time(1) < 30
