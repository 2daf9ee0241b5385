"""Steps of one process and of two."""

from __future__ import annotations

import pytest
from bench.processes import Scaling, measure_processes, processes_report
from bench.report import markdown


def test_efficiency_is_sharing_times_communication():
    scaling = Scaling("zero2", one=[1.0, 2.0, 1.0], separate=[1.25, 2.5, 1.25], together=[2.0, 4.0, 2.0])
    assert scaling.efficiency.median == pytest.approx(0.5)
    assert scaling.sharing.median == pytest.approx(0.8)
    assert scaling.communication.median == pytest.approx(0.625)
    page = markdown(processes_report("nano", 1, 256, [scaling]))
    assert "| zero2 | 1.000 | 1.250 | 2.000 | 50.0 % (50.0…50.0)" in page


@pytest.mark.long
def test_real_processes_take_steps_together_and_apart():
    [scaling] = measure_processes("nano", images=1, crop=256, rounds=1, engines=["zero2"])
    assert scaling.engine == "zero2"
    assert [len(times) for times in scaling[1:]] == [1, 1, 1]
    assert min(map(min, scaling[1:])) > 0
