"""A ladder of run folders whose loss surface is known, and what fits to it give; shared, so only to be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from known_ladder import write_ladder
from law_surfaces import ladder, study_of

from hpcm_scale.scaling.analysis import Analysis, analyse
from hpcm_scale.scaling.observations import Study, study
from hpcm_scale.scaling.runs import find_runs


@pytest.fixture(scope="session")
def ladder_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sizes, a trunk and three branches each, with 0.4 % of scatter."""
    return write_ladder(tmp_path_factory.mktemp("ladder"))


@pytest.fixture(scope="session")
def ladder_study(ladder_runs: Path) -> Study:
    """What these runs tell."""
    return study(find_runs([ladder_runs]))


@pytest.fixture(scope="session")
def grid_analysis() -> Analysis:
    """The laws of six sizes times three amounts of data on the surface of `law_surfaces`, without run folders."""
    return analyse(study_of(ladder()))


@pytest.fixture(scope="session")
def ladder_analysis(ladder_study: Study) -> Analysis:
    """The laws fitted to them."""
    return analyse(ladder_study)
