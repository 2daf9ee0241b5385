"""Commands, called as the console script calls them."""

from __future__ import annotations

import sys

import pytest

from hpcm_scale.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(command, *arguments)` in this process: exit code, stdout, stderr."""

    def start(command: str, *arguments: object, columns: int = 120) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpcm", command, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start
