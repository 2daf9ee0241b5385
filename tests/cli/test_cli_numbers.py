"""Every numeric option of every command refuses what is not meaningful, in one sentence, before any work."""

from __future__ import annotations

import argparse
import io
import math
import sys
from contextlib import redirect_stdout

import pytest

from hpcm_scale.cli import COMMANDS, main
from hpcm_scale.errors import Parser
from hpcm_scale.limits import Range

HYDRA = ("train",)
"""Commands without options of their own: all they take are keys (tests/config/test_config_numbers.py)."""
NASTY = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "-1",
    "0",
    "-0.0",
    "1.5",
    "1e3",
    "5e-324",
    "1e308",
    "true",
    "",
    "9" * 400,
]
TOO_LONG = "9" * 5000


def parsers() -> list[Parser]:
    """The parser of every command, and those of its subcommands, as `--help` makes them."""
    made: list[Parser] = []
    make = Parser.__init__

    def recorded(self: Parser, *arguments, **keywords) -> None:
        make(self, *arguments, **keywords)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(Parser, "__init__", recorded)
        for command in COMMANDS:
            if command not in HYDRA:
                patch.setattr(sys, "argv", ["hpcm", command, "--help"])
                with pytest.raises(SystemExit):
                    main()
    return made


def numeric(action: argparse.Action) -> bool:
    """Whether an option is a number to its command."""
    try:
        value = action.type("200") if action.type else None
    except (argparse.ArgumentTypeError, ValueError):
        return True
    return isinstance(value, int | float)


PARSERS = parsers()
OPTIONS = {
    f"{parser.prog} {action.option_strings[0]}": action
    for parser in PARSERS
    for action in parser._actions
    if numeric(action)
}


def test_the_walk_finds_every_command_and_option():
    assert {parser.prog.split()[1] for parser in PARSERS} == set(COMMANDS) - set(HYDRA)
    assert len(OPTIONS) > 40
    assert {"hpcm shards build --shard-size", "hpcm scaling plan --mfu", "hpcm evaluate --qualities"} <= OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_number_is_in_its_range_or_refused(name):
    action = OPTIONS[name]
    allowed = getattr(action.type, "__self__", None)
    assert isinstance(allowed, Range), f"{name}: write type=Range(…).whole or .real"
    assert max(allowed.least, allowed.above) > -math.inf and min(allowed.most, allowed.below) < math.inf
    defaults = action.default if isinstance(action.default, list) else [action.default]
    assert all(default in (None, argparse.SUPPRESS) or default in allowed for default in defaults)
    for text in NASTY:
        value, reported = parsed(action, text)
        assert f"must be {allowed}" in reported or (value in allowed and math.isfinite(value))


def parsed(action: argparse.Action, text: str) -> tuple[float | None, str]:
    """The number that an option reads, or what it says against it."""
    try:
        return action.type(text), ""
    except argparse.ArgumentTypeError as refused:
        return None, str(refused)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", ["nan", "1e400", TOO_LONG], ids=lambda value: value[:6])
def test_a_command_that_is_typed_so_prints_one_sentence(run, name, value):
    *command, option = name.split()[1:]
    code, out, err = run(command[0], *command[1:], option, value)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"hpcm: argument {option}: {value[:50]}") and len(err) < 300
    assert f"must be {OPTIONS[name].type.__self__}; see {' '.join(['hpcm', *command])} --help" in err
