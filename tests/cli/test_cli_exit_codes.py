"""The table of exit codes in docs/failures.md, against commands that end so; tests of launches look into it, too."""

from __future__ import annotations

import os
import pty
import signal
from pathlib import Path

import pytest

from hpcm_scale.config.compose import compose, to_yaml
from hpcm_scale.errors import STOPPED, Fault, UserError

pytestmark = pytest.mark.launch

COMMAND = "hpcm_scale.cli"


def test_the_table_has_every_code_once(exit_codes):
    ours = [0, Fault.exit_code, UserError.exit_code, STOPPED]
    signals = [128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)]
    assert sorted(exit_codes) == sorted([*map(str, ours), *map(str, signals), "256 − signal"])


def test_what_goes_well_fails_or_is_refused(shards, fork_server, tmp_path, exit_codes):
    def code_of(*arguments: str | Path) -> int:
        return fork_server.start(COMMAND, list(map(str, arguments)), cwd=tmp_path, env=os.environ).wait(300)

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in shards.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: None if file.suffix == ".json" else -4096])
    found = {code_of("shards", "verify", shards), code_of("shards", "verify", damaged), code_of("train", "modle=nano")}
    assert found == {0, Fault.exit_code, UserError.exit_code}
    assert all("all" in exit_codes[str(code)] for code in found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_command(number, fork_server, tmp_path, exit_codes):
    """As a shell shows it: `hpcm sweep status --watch`, in a terminal, of a run that does not end."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(compose(["model=nano"])), encoding="utf-8")
    ours, terminal = pty.openpty()
    with os.fdopen(terminal, "wb") as output:
        words = ["sweep", "status", "--watch", str(tmp_path)]
        process = fork_server.start(COMMAND, words, cwd=tmp_path, env=os.environ, output=output)
        os.read(ours, 1)
        process.send_signal(number)
        code = process.wait(300)
    os.close(ours)
    shown = 128 - code if code < 0 else code
    assert shown == 128 + number and "all" in exit_codes[str(shown)]
