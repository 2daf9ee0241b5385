"""The training stream against the decoder alone, and what a GPU asks of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bench import data
from bench.data import DECODER, STREAM, data_report, demand, make_shards, measure_data, measure_waits
from bench.report import markdown

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.index import load_index
from hpcm_scale.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as smaller:
        smaller.setattr(data, "IMAGES", 4)
        return make_shards(tmp_path_factory.mktemp("made") / "set")


@pytest.fixture
def config(shards) -> DataConfig:
    return DataConfig(shards=str(shards), workers=1)


def test_synthetic_images_have_as_many_bits_as_natural_ones(shards):
    index = load_index(str(shards))
    assert len(index) == 4 and len(set(index.crc32.tolist())) == 4
    assert index.pixels / 4 == pytest.approx(2e6, rel=0.01)
    assert 1.5 < 8 * index.length.sum() / index.pixels < 2.5


@pytest.mark.launch
def test_rounds_rates_and_the_page(config):
    speed = measure_data(config, batch=2, batches=3, rounds=2)
    assert (speed.images, speed.crops, speed.workers) == (4, 6, 1)
    for times in (speed.seconds, speed.cpu_seconds):
        assert list(times) == [DECODER, STREAM]
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in times.values())
    fastest, slowest = min(speed.seconds[STREAM]), max(speed.seconds[STREAM])
    assert 6 / slowest <= speed.crops_per_worker <= 6 / fastest
    assert speed.crops_per_core == pytest.approx(6 / np.median(speed.cpu_seconds[STREAM]))
    demands = [demand(compose(["model=68m"]).model, 256, share) for share in (0.3, 0.45)]
    waits = measure_waits(config, batch=2, step=0.01, steps=3)
    report = data_report(speed, demands, waits, "synthetic images")
    numbers = json.loads(json.dumps(report.results))
    assert numbers["seconds"] == speed.seconds and len(numbers["waits"]["seconds"]) == 3
    assert numbers["demands"][0]["share"] == pytest.approx(demands[0].crops / (16 * speed.crops_per_core))
    page = markdown(report)
    assert "| JPEG decoder |" in page and "| 68m at 30 % | 821 |" in page and "Computed, not measured" in page
    assert f"{speed.crops_per_worker:,.0f}" in page


def test_an_h100_takes_what_its_peak_and_the_model_say():
    """989 TFLOP/s; 11.56 TFLOP in a step of 32 crops."""
    model = compose(["model=68m"]).model
    assert demand(model, 256, 0.3).crops == pytest.approx(0.3 * 989 / 11.56 * 32, rel=2e-3)
    assert demand(model, 512, 0.6).crops == pytest.approx(0.6 * 989 / 11.56 * 32 / 4, rel=2e-2)


def test_only_a_hasty_consumer_waits(config):
    hasty, slow = (measure_waits(config, batch=4, step=step, steps=7) for step in (0.0, 0.3))
    assert (hasty.step, slow.step) == (0.0, 0.3)
    assert sorted(slow.seconds)[3] < sorted(hasty.seconds)[3]


def test_a_corrupt_sample_is_one_error(shards, config):
    path = shards / "shard-000000.tar"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"cannot be read .*shards verify"):
            measure_data(config, batch=2, batches=2, rounds=1)
    finally:
        path.write_bytes(whole)
