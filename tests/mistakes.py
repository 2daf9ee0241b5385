"""Commands that are typed wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def mistake_in(main: Callable[[Sequence[str]], None], capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line that a wrong command is answered with."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    reported = capsys.readouterr()
    assert (end.value.code, reported.out, reported.err.count("\n")) == (2, "", 1)
    return reported.err
