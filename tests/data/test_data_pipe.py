"""Shards from a shell command: only when switched on, whole files only, failures reported without the command."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from crops import assert_same, seen
from data_refusals import refused

from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose
from hpcm_scale.data import storage
from hpcm_scale.data.index import load_index
from hpcm_scale.data.storage import PipeStorage
from hpcm_scale.errors import UserError

pytestmark = pytest.mark.launch


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "pause", lambda attempt: 0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pipe_gives_the_same_as_the_folder(small_set, tmp_path, workers):
    odd = tmp_path / "it's a place"
    odd.symlink_to(small_set)
    command = f"""pipe:cat "{odd}"/{{}} | cat"""
    found = seen(command, pipe=True, cache=str(tmp_path / "cache"), workers=workers)
    assert_same(found, seen(small_set))
    assert found.corrupt == []


def test_it_is_refused_unless_switched_on(small_set, tmp_path):
    marker = tmp_path / "marker"
    command = f"pipe:touch {marker}; cat {small_set}/{{}}"
    with refused("pipe-not-enabled", "data.pipe"):
        seen(command, cache=str(tmp_path))
    with refused("pipe-not-enabled", "data.pipe"):
        load_index(command)
    assert not marker.exists()
    load_index(command, pipe=True)
    assert marker.exists()


def test_what_the_checks_say():
    source = "data.shards='pipe:cat /nowhere/{}'"
    with refused("pipe-not-allowed", "data.pipe"):
        check(compose([source]), 1)
    with refused("pipe-without-cache", "data.cache"):
        check(compose([source, "data.pipe=true"]), 1)
    config = compose([source, "data.pipe=true", "data.cache=cache"])
    check(config, 1)
    assert config.data.shards == "pipe:cat /nowhere/{}"
    with refused("pipe-without-placeholder", "data.shards"):
        PipeStorage("pipe:cat /nowhere", retries=1, timeout=60)


def test_the_name_of_a_file_is_no_part_of_the_command(tmp_path):
    storage = PipeStorage("pipe:printf %s {}", retries=1, timeout=60)
    name = f"a'b; touch {tmp_path}/marker; $(touch {tmp_path}/marker) `touch {tmp_path}/marker`"
    assert storage.read(name) == name.encode()
    assert not (tmp_path / "marker").exists()


def test_failed_and_wrong_output_is_tried_again_and_then_reported(small_set, tmp_path):
    """The first two runs for each file fail: by exit code, then with half of the file."""
    script = tmp_path / "flaky"
    script.write_text(
        f"""#!/bin/sh
        runs="{tmp_path}/runs-$1"; echo x >> "$runs"
        case $(wc -l < "$runs") in
        1) echo working >&2; echo "no luck today" >&2; exit 7;;
        2) head -c 1000 "{small_set}/$1";;
        *) cat "{small_set}/$1";;
        esac
        """
    )
    script.chmod(0o755)
    command = f"pipe:{script} {{}}"
    index = load_index(f"pipe:cat {small_set}/{{}}", pipe=True)
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"index\.json from pipe:… after 1 try \(OSError exit code 7: no luck today\)"):
        load_index(command, retries=1, pipe=True)
    (tmp_path / "runs-index.json").write_text("x\nx\n")
    assert_same(seen(command, pipe=True, cache=str(cache), retries=3), seen(small_set))
    assert {len((tmp_path / f"runs-{shard.name}").read_text()) for shard in index.shards} == {6}


def test_a_shard_that_never_comes_right_is_bad(small_set, tmp_path):
    command = f"pipe:test {{}} != shard-000001.tar || exit 3; cat {small_set}/{{}}"
    found = seen(command, pipe=True, cache=str(tmp_path / "cache"))
    index = load_index(str(small_set))
    assert {int(index.shard[photo.sample]) for photo in found.corrupt} == {1}
    assert found.corrupt[0].reason.endswith(
        "shard-000001.tar from pipe:… cannot be read after 2 tries (OSError exit code 3)"
    )


def test_a_silent_command_is_ended_with_all_that_it_started(tmp_path):
    storage = PipeStorage(
        f"pipe:sleep 77 & echo $! > {tmp_path}/pid; while :; do echo busy >&2; sleep 0.1; done; # {{}}",
        retries=2,
        timeout=0.5,
    )
    with pytest.raises(OSError, match=r"after 2 tries \(TimeoutError the command wrote nothing for 0\.5 seconds"):
        storage.read("x")
    sleeper = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60  # a killed process is there for a moment
    while psutil.pid_exists(sleeper) and psutil.Process(sleeper).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slow_but_steady_command_is_waited_for():
    storage = PipeStorage("pipe:for i in 1 2 3 4 5 6 7 8; do printf {}; sleep 0.5; done", retries=1, timeout=3)
    assert storage.read("ab") == b"ab" * 8


PROGRAM = """
import sys
from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.stream import open_stream

config = DataConfig(shards=sys.argv[1], pipe=True, cache=sys.argv[2], crop=64, workers=2)
next(open_stream(config, seed=3, first_image=0, last_image=None, batch_size=4, micro_batch_size=4, rank=0,
                 world_size=1))
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_commands_end_with_the_program(small_set, fork_server, tmp_path, blow):
    """Both workers wait for a command that says nothing."""
    pids = tmp_path / "pids"
    command = f"pipe:case {{}} in index.json) cat {small_set}/{{}};; *) echo $$ >> {pids}; sleep 78;; esac"
    (tmp_path / "program.py").write_text(PROGRAM)
    program = fork_server.start("program", [command, str(tmp_path / "cache")], cwd=tmp_path, env=os.environ)
    try:
        until = time.monotonic() + 300
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert time.monotonic() < until and program.poll() is None
            time.sleep(0.05)
        shells = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        program.send_signal(blow)
        program.wait(60)
        assert not psutil.wait_procs(shells, timeout=60)[1]
    finally:
        program.kill()
        program.wait()
