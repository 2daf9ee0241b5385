from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcm_scale.errors import UserError
from hpcm_scale.tracking.journal import Journal, new_records, read_journal

APPEND_FOR_EVER = """
import sys, time
from hpcm_scale.tracking.journal import Journal
journal = Journal(sys.argv[1])
step = 0
while True:
    step += 1
    time.sleep(1e-4)
    journal.append({"step": step, "time": step / 7, "train/images": 8 * step, "compute/pflops": step / 3,
                    "train/loss": 1 / step, "padding": "x" * (step % 3000)})
"""


def line(step: int, **values) -> dict:
    return {"step": step, "time": step / 3, "train/images": 8 * step, "compute/pflops": step * 0.1, **values}


def test_numbers_come_back_to_the_last_digit(tmp_path: Path) -> None:
    loss = 1.2345678901234567
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    tensor, array = torch.tensor(0.1, dtype=torch.float32), np.float32(0.1)
    journal.append(line(1, **{"train/loss": loss, "a": tensor, "b": array, "c": np.int64(3), "note": "λ"}))
    journal.close()
    [record] = read_journal(tmp_path / "run" / "metrics.jsonl")
    assert record == line(1, **{"train/loss": loss, "a": tensor.item(), "b": float(array), "c": 3, "note": "λ"})


@given(st.lists(st.floats(), min_size=1))
def test_every_float_is_valid_json_and_exact(tmp_path_factory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    journal = Journal(path)
    for step, value in enumerate(values):
        journal.append(line(step, **{"train/loss": value}))
    journal.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    records = [json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines()]
    expected = [value if math.isfinite(value) else None for value in values]
    assert [record["train/loss"] for record in records] == expected


@pytest.mark.parametrize("missing", ["step", "time", "train/images", "compute/pflops"])
def test_a_line_without_its_axes_is_refused(tmp_path: Path, missing: str) -> None:
    record = line(1)
    del record[missing]
    with pytest.raises(AssertionError, match=missing):
        Journal(tmp_path / "metrics.jsonl").append(record)
    assert read_journal(tmp_path / "metrics.jsonl") == []


def test_resume_leaves_neither_holes_nor_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    for step in range(1, 58):
        journal.append(line(step))
        if step % 20 == 0:
            journal.append(line(step, **{"eval/loss": 2.0}))
    with path.open("ab") as torn:
        torn.write(b'{"step": 58, "time": 1')

    resumed = Journal(path)
    resumed.resume(40)
    assert [record["step"] for record in read_journal(path)] == [*range(1, 21), *range(20, 41), 40]
    for step in range(41, 61):
        resumed.append(line(step))
    resumed.close()
    training = [record["step"] for record in read_journal(path) if "eval/loss" not in record]
    assert training == list(range(1, 61))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_starting_over_drops_everything(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(line(1))
    journal.resume(0)
    assert read_journal(tmp_path / "metrics.jsonl") == []


def test_a_torn_last_line_is_left_out_and_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(line(step)).encode() + b"\n" for step in (1, 2)]
    for cut in range(len(whole[1])):
        path.write_bytes(whole[0] + whole[1][:cut])
        assert read_journal(path) == [line(1)]
    with path.open("rb") as living:
        assert list(new_records(living)) == [line(1)]
        path.write_bytes(whole[0] + whole[1])
        assert list(new_records(living)) == [line(2)]
        assert list(new_records(living)) == []


def test_lines_that_find_no_room_wait_for_it(tmp_path: Path) -> None:
    """The room is limited by the system: a first write is cut short, later ones fail."""
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(line(1))
    size = journal.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        for step in (2, 3):
            journal.append(line(step))
        assert journal.waiting == 2 and journal.path.stat().st_size == size
        with pytest.raises(OSError, match=r"File too large|No space left"):
            journal.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append(line(4))
    assert journal.waiting == 0
    journal.close()
    assert read_journal(journal.path) == [line(step) for step in (1, 2, 3, 4)]


def test_damage_and_absence_are_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_journal(tmp_path / "metrics.jsonl")
    assert caught.value.code == "no-journal"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError) as caught:
        read_journal(tmp_path / "metrics.jsonl")
    assert caught.value.code == "damaged-journal"


def test_a_reader_sees_whole_lines_while_another_process_writes_and_after_it_was_killed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", APPEND_FOR_EVER, str(path)])
    try:
        deadline = time.monotonic() + 300
        while not (path.exists() and path.stat().st_size > 500_000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(5):
            steps = [record["step"] for record in read_journal(path)]
            assert steps == list(range(1, len(steps) + 1))
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    records = read_journal(path)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert all(record["train/loss"] == 1 / record["step"] for record in records)
    Journal(path).resume(10)
    assert len(read_journal(path)) == 10


def test_lines_of_concurrent_writers_are_never_mixed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    threads = [
        threading.Thread(target=lambda: [journal.append(line(step, padding="x" * 5000)) for step in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_journal(tmp_path / "metrics.jsonl")) == 800
