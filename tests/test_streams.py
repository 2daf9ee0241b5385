"""What every command has in common: its output takes any name, and outlives whoever reads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMANDS = [("--help",), ("models",), ("estimate", "model=nano"), ("bd-rate", "--help"), ("train", "--help")]


def hpcm(*arguments: str | bytes, **options) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "hpcm_scale.cli", *arguments], stderr=subprocess.PIPE, timeout=120, **options
    )


@pytest.mark.parametrize("buffering", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_closed_pipe_ends_a_command_quietly(command, buffering):
    """As in `hpcm models | head -1`; with 1, as Python's documentation has it, unless the command has its own code."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *buffering, "-m", "hpcm_scale.cli", *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == int(command[-1] != "--help" or command == ("--help",))


def test_standard_streams_may_be_closed_or_full():
    full = os.open("/dev/full", os.O_WRONLY)
    done = hpcm("models", stdout=full)
    os.close(full)
    told = b"hpcm: cannot write to standard output (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, told)
    for closed in (">&-", "2>&-"):
        script = f"exec '{sys.executable}' -m hpcm_scale.cli models {closed}"
        assert subprocess.run(["bash", "-c", script], capture_output=True, timeout=120).returncode == 0


ASCII, LATIN = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, ASCII, LATIN], ids=["usual", "C", "ascii", "latin"])
def test_any_name_is_shown_in_any_locale(locale, tmp_path):
    shards = os.fsencode(tmp_path) + b"/caf\xe9 \xce\xbb"
    os.mkdir(shards)  # noqa: PTH102
    done = hpcm("shards", "info", shards, stdout=subprocess.PIPE, env=os.environ | locale)
    assert done.returncode == 2 and done.stderr.startswith(b"hpcm: there are no shards at ")
    assert rb"caf\xe9" in done.stderr and done.stderr.count(b"\n") == 1
    done = hpcm("--help", stdout=subprocess.PIPE, env=os.environ | locale)
    assert (done.returncode, done.stderr) == (0, b"") and b"hpcm COMMAND" in done.stdout
