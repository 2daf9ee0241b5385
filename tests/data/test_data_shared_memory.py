"""Data workers where /dev/shm is as small as in many containers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_refusals import refused

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.stream import check_shared_memory

SMALL = 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"'
"""A shell's command: run another one with so much of it."""
STREAM = """
import sys
from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.stream import open_stream
from hpcm_scale.errors import entry_point

@entry_point
def main():
    config = DataConfig(shards=sys.argv[1], workers=1, prefetch=4)
    options = dict(seed=0, first_image=0, batch_size=4, micro_batch_size=4, rank=0, world_size=1)
    batches = []
    for batch in open_stream(config, last_image=40, **options):
        batches.append(batch)  # kept, as those that a trainer waits with

main()
"""


def with_shared_memory(size: str, command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with a /dev/shm of its own; skips the test where none can be had."""
    apart = ["unshare", "-m", "sh", "-c", SMALL, size]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("needs root and unshare, to mount a small /dev/shm")
    return subprocess.run([*apart, *command], cwd=cwd, capture_output=True, text=True, timeout=400)


@pytest.mark.launch
def test_a_run_whose_batches_do_not_fit_is_refused(shards, tmp_path):
    """2 workers × 4 batches × 4 crops of 256² are 6.3 MB."""
    options = ["model=nano", f"data.shards={shards}", "train.batch_size=4", "train.steps=1", "run.dir=run"]
    result = with_shared_memory("1m", [sys.executable, "-m", "hpcm_scale.train", *options], tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("hpcm: data workers need up to 6 MB in /dev/shm, which has 1 MB free")
    assert "--shm-size" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_a_stream_that_fills_it_later_ends_in_one_sentence(shards, tmp_path):
    result = with_shared_memory("3m", [sys.executable, "-c", STREAM, str(shards)], tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("hpcm: data workers cannot write their images to shared memory (")
    assert "No space left" in result.stderr and "--shm-size" in result.stderr and result.stderr.count("\n") == 1


def test_what_workers_need_is_what_is_counted():
    """All processes, workers and batches; nothing without workers."""
    free = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    batch = 3 * 256**2
    common = {"micro_batch_size": 1, "crop": 256}
    fitting = free // batch // 64
    check_shared_memory(DataConfig(workers=2, prefetch=4), processes=fitting // 2, **common)
    with refused("shared-memory-too-small", "data.workers"):
        check_shared_memory(DataConfig(workers=2, prefetch=4), processes=16 * fitting, **common)
    check_shared_memory(DataConfig(workers=0, prefetch=4), processes=16 * fitting, **common)
