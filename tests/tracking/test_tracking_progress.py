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


def test_silent_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, check=True)
    assert done.stdout == b""
    assert done.stderr == b""


def test_rate_and_time_left_on_a_terminal_of_the_first_process_only() -> None:
    shown = on_a_terminal(rank="0").decode()
    assert "train" in shown
    assert "500/500" in shown
    assert "step/s" in shown
    assert on_a_terminal(rank="1") == b""
