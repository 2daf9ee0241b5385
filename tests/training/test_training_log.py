"""What a training says where stderr is no terminal."""

from __future__ import annotations

import json
import os
import re

import pytest
from small_training import SMALL
from watch_processes import await_line

from hpcm_scale.data.index import load_index

pytestmark = pytest.mark.launch

LINE = re.compile(
    r"log: step (\d)/3, loss ([\d.]+), ([\d.]+) bpp, ([\d.]+) dB, ([\d.e-]+) PFLOPs, [\d.e+-]+ images/s, [\d.]+ GB, "
    r"([\d:]+) left"
)


def test_a_line_of_the_first_process_every_so_many_seconds(launch, shards):
    options = (*SMALL, "train.steps=3", "engine=accelerate")
    # Where the user has not set OMP_NUM_THREADS, libraries do, and warn of it.
    result = launch(*options, f"data.shards={shards}", "run.dir=log", "log.print_seconds=1e-6", OMP_NUM_THREADS=None)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "OMP_NUM_THREADS" not in result.stdout + result.stderr and "hpcm export" not in result.stdout
    lines = [LINE.fullmatch(line) for line in result.stderr.splitlines() if line.startswith("log: ")]
    assert [int(line[1]) for line in lines] == [1, 2, 3]
    assert lines[-1][6] == "00:00"
    for line, reported in zip(lines, (launch.folder / "log" / "metrics.jsonl").open(), strict=True):
        record = json.loads(reported)
        names = ("train/loss", "train/bpp", "train/psnr", "compute/pflops")
        expected = [record[name] for name in names]
        assert [float(value) for value in line.groups()[1:5]] == pytest.approx(expected, rel=1e-2)
        assert record["data/images"] == len(load_index(str(shards)))
        assert record["data/epoch"] == record["train/images"] / record["data/images"]


def test_a_run_that_cannot_be_exported_reports_it_at_its_start(fork_server, shards, tmp_path):
    """Of the public presets alone: a size of another name has no counterpart."""
    options = ("model=68m", "train.batch_size=1", "data.workers=0", "engine=accelerate", "log.wandb=disabled")
    log = tmp_path / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        arguments = [*options, f"data.shards={shards}", "run.dir=export"]
        process = fork_server.start("hpcm_scale.train", arguments, cwd=tmp_path, env=os.environ, output=output)
    lines = lambda: log.read_text(encoding="utf-8").splitlines()  # noqa: E731
    try:
        await_line(lines, "`hpcm export` needs model.hyper_placement=upstream")
    finally:
        process.kill()
    assert len(lines()) <= 2
