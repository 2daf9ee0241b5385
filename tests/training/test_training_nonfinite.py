"""A loss that is not finite on one process: all skip the step together, nothing is poisoned."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "accelerate"])
def test_all_processes_skip_together(engine, launch, project):
    folder = str(project / "tests" / "training")
    result = launch(f"engine={engine}", module="nonfinite_probe", PYTHONPATH=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    # Not skipped, skipped, not skipped; the skipped step moved nothing, and the next one moved finite weights.
    assert "RANK 0 [False, True, False, True, True, True]" in result.stdout
    assert "RANK 1 [False, True, False]" in result.stdout
