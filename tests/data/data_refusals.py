"""Mistakes by their codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hpcm_scale.errors import UserError


@contextmanager
def refused(code: str, key: str = "") -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The code inside raises the UserError of that code, about that key."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert (caught.value.code, caught.value.key) == (code, key)
