"""Small networks of every kind compute what they computed when parity with the published one was last shown."""

from __future__ import annotations

import json

import pytest
from small_outputs import FILE, NETWORKS, outputs


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_unchanged(name):
    assert outputs(name) == pytest.approx(json.loads(FILE.read_text(encoding="utf-8"))[name], rel=1e-5)
