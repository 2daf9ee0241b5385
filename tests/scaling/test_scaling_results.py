"""The ladder in docs/results: what its page says follows from the journals beside it."""

from __future__ import annotations

import json
import re

import pytest

from hpcm_scale.commands.scaling import main
from hpcm_scale.scaling.analysis import read_laws
from hpcm_scale.scaling.runs import find_runs

MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def ladder(project):
    return project / "docs" / "results" / "ladder"


def equal(here, there, where: str = "laws.json") -> None:
    """Same keys, texts and counts; numbers as far as another processor's arithmetic lets them be the same."""
    if isinstance(there, dict):
        assert list(here) == list(there), where
        for key in there:
            equal(here[key], there[key], f"{where}: {key}")
    elif isinstance(there, list):
        assert len(here) == len(there), where
        for index, (mine, its) in enumerate(zip(here, there, strict=True)):
            equal(mine, its, f"{where}[{index}]")
    elif isinstance(there, float):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-9), where
    else:
        assert here == there, where


@pytest.mark.launch
def test_its_journals_give_its_laws_again(ladder, tmp_path):
    main(["fit", str(ladder / "journals"), "--out", str(tmp_path)])
    mine, committed = (json.loads((folder / "laws.json").read_text(encoding="utf-8")) for folder in (tmp_path, ladder))
    equal(mine, committed)


def test_it_is_a_ladder(ladder):
    analysis = read_laws(ladder / "laws.json")
    annealed = [point for point in analysis.observations if point.annealed]
    sizes = {point.parameters: sum(other.model == point.model for other in annealed) for point in annealed}
    assert len(sizes) >= 5 and min(sizes) > 1e5 and max(sizes) < 2e7
    assert min(sizes.values()) >= 2
    assert all(run.finished for run in find_runs([ladder / "journals"]) if run.config["run"]["cooldown_of"])


def test_it_is_small_and_tells_nothing_of_a_machine(ladder):
    files = [path for path in (ladder / "journals").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    for path in files:
        assert not re.search(r"/(home|root|tmp|work|mnt)/", path.read_text(encoding="utf-8")), path


def test_its_page_shows_what_is_there(ladder):
    page = (ladder / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page)
    assert len(links) > 3 and [link for link in links if not (ladder / link).exists()] == []
