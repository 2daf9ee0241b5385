"""What every command has in common: its output takes any name, and outlives whoever reads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.launch


def hpcm(*arguments: str | bytes, **options) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "hpcm_scale.cli", *arguments], stderr=subprocess.PIPE, timeout=120, **options
    )


@pytest.mark.parametrize("buffering", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_closed_pipe_ends_a_command_quietly(buffering):
    """As in `hpcm --help | head -1`; with 1, as Python's documentation has it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *buffering, "-m", "hpcm_scale.cli", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_standard_streams_may_be_closed_or_full():
    full = os.open("/dev/full", os.O_WRONLY)
    done = hpcm("--help", stdout=full)
    os.close(full)
    reported = b"hpcm: cannot write to standard output (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, reported)
    for closed in (">&-", "2>&-"):
        script = f"exec '{sys.executable}' -m hpcm_scale.cli --help {closed}"
        assert subprocess.run(["bash", "-c", script], capture_output=True, timeout=120).returncode == 0


ASCII, LATIN = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}


@pytest.mark.parametrize("locale", [{}, ASCII, LATIN], ids=["usual", "ascii", "latin"])
def test_any_name_is_shown_in_any_locale(locale):
    done = hpcm(b"caf\xe9 \xce\xbb", stdout=subprocess.PIPE, env=os.environ | locale)
    assert done.returncode == 2 and done.stderr.startswith(b"hpcm: there is no command `caf\\xe9 ")
    assert done.stderr.count(b"\n") == 1
    done = hpcm("--help", stdout=subprocess.PIPE, env=os.environ | locale)
    assert (done.returncode, done.stderr) == (0, b"") and b"hpcm COMMAND" in done.stdout
