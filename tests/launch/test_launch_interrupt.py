"""Ctrl-C in the terminal of a real training: DeepSpeed's launcher is in that terminal, too."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from small_training import SMALL

from hpcm_scale.errors import STOPPED

pytestmark = pytest.mark.launch

CHANGES = (*SMALL, "engine=accelerate", "engine.precision=fp32", "train.steps=5000")


def steps(run: Path) -> list[int]:
    """The steps in a run's journal so far."""
    journal = run / "metrics.jsonl"
    text = journal.read_text() if journal.is_file() else ""
    return [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]


class Said:
    """What is written to a terminal, read as it comes."""

    def __init__(self, terminal: int) -> None:
        self._lines: list[bytes] = []
        self._reader = threading.Thread(target=self._read, args=(terminal,), daemon=True)
        self._reader.start()

    def _read(self, terminal: int) -> None:
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(terminal, 4096):
                self._lines.append(chunk)

    def text(self) -> str:
        return b"".join(self._lines).decode(errors="replace")


def own(terminal: int) -> None:
    """Make this process the leader of a session whose terminal that is, as a login does."""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_ctrl_c_on_one_node_leaves_a_checkpoint(checkout, active, shards, tmp_path, exit_codes):
    (active / "bin/deepspeed").symlink_to(Path(sys.executable).with_name("deepspeed"))
    environment = os.environ | {"VIRTUAL_ENV": str(active), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    script = ["bash", str(checkout / "launch/one_node.sh"), *CHANGES, f"data.shards={shards}", f"run.dir={run}"]
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        script, env=environment, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=partial(own, terminal)
    )
    os.close(terminal)
    said = Said(ours)
    try:
        while len(steps(run)) < 3:
            assert process.poll() is None, said.text()
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3  # deepspeed, its launcher, training
        os.write(ours, b"\x03")
        assert process.wait(300) == STOPPED and "one_node.sh" in exit_codes[str(STOPPED)], said.text()
        assert psutil.wait_procs(children, timeout=60)[1] == []
    finally:
        for left in psutil.process_iter(["cmdline"]):
            if f"run.dir={run}" in (left.info["cmdline"] or []):
                left.kill()
    assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step_{steps(run)[-1]:08d}"
    assert "the same command resumes it" in said.text() and "Traceback" not in said.text()
