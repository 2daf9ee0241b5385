"""A loss that is not finite on one process: all skip the step together, nothing is poisoned."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("engines", [["zero0", "zero1", "zero2", "zero3"], ["accelerate"]])
def test_all_processes_skip_together(engines, launch, project):
    result = launch(*engines, module="nonfinite_probe", PYTHONPATH=str(project / "tests" / "training"))
    assert result.returncode == 0, result.stdout + result.stderr
    for engine in engines:
        # Not skipped, skipped, not skipped; the skipped step moved nothing, and the next one moved finite weights.
        assert f"{engine} 0 False True False True True True" in result.stdout
        assert f"{engine} 1 False True False" in result.stdout
