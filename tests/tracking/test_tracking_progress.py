from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

BAR = """
from hpcm_scale.tracking.progress import progress
bar = progress(total=500, initial=100, description="train", unit="step")
for _ in range(400):
    bar.update(1)
bar.close()
assert list(progress([1, 2])) == [1, 2]
"""


def on_a_terminal(rank: str) -> bytes:
    """What the bar writes to a pseudo-terminal."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", BAR], stderr=there, env=os.environ | {"RANK": rank})
    os.close(there)
    written = b""
    try:
        while chunk := os.read(here, 4096):
            written += chunk
    except OSError:  # the other end is closed
        pass
    os.close(here)
    assert process.wait() == 0
    return written


LINES = """
from hpcm_scale.tracking.progress import progress
bar = progress(total=4, description="building", unit="file", seconds=1e-9)
for _ in range(4):
    bar.update(1)
bar.close()
assert list(progress(range(3), description="webp 80", unit="image", report=True)) == [0, 1, 2]
with progress(total=2, seconds=1e-9, text=lambda: "step 1/2") as bar:
    bar.update(1)
"""


def in_a_pipe(rank: str) -> list[str]:
    """The lines on stderr."""
    environment = os.environ | {"RANK": rank}
    done = subprocess.run([sys.executable, "-c", LINES], capture_output=True, check=True, text=True, env=environment)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_whole_lines_in_a_pipe_and_of_the_first_process_only() -> None:
    *under_way, done, setting, own = in_a_pipe(rank="0")
    assert [line.split(",")[0] for line in under_way] == [f"building: {n}/4 files" for n in (1, 2, 3, 4)]
    assert all("file" in line.split(",")[1] and line.endswith(" left") for line in under_way)
    assert done.startswith("building: 4/4 files in ")
    assert setting.startswith("webp 80: 3/3 images in ")
    assert own == "step 1/2"
    assert in_a_pipe(rank="1") == []


def test_what_is_done_soon_has_no_line_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, check=True)
    assert done.stdout == b""
    assert done.stderr == b""


def test_rate_and_time_left_on_a_terminal_of_the_first_process_only() -> None:
    shown = on_a_terminal(rank="0").decode()
    assert "train" in shown
    assert "500/500" in shown
    assert "step/s" in shown
    assert on_a_terminal(rank="1") == b""
