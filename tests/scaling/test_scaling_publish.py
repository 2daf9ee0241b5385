"""What wandb kept is read back with wandb's own reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest

from hpcm_scale.errors import UserError
from hpcm_scale.scaling.analysis import write_laws
from hpcm_scale.scaling.figures import draw_figures
from hpcm_scale.scaling.publish import publish, tables
from hpcm_scale.scaling.report import report


@pytest.fixture(scope="module")
def whole_fit(ladder_study, ladder_analysis, tmp_path_factory) -> Path:
    """A folder as `hpcm scaling fit` leaves it."""
    folder = tmp_path_factory.mktemp("fit")
    drawn = draw_figures(ladder_study, ladder_analysis, folder)
    (folder / "report.md").write_text(report(ladder_analysis, drawn))
    write_laws(ladder_analysis, folder / "laws.json")
    return folder


@pytest.fixture
def fitted(whole_fit, tmp_path) -> Path:
    """A copy of it to publish from."""
    return Path(shutil.copytree(whole_fit, tmp_path / "fit"))


def records(folder: Path) -> list[dict]:
    """Everything in the one file that wandb keeps."""
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=400)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.launch
def test_one_run_in_the_group_with_frontier_law_tables_figures_and_report(fitted, ladder_analysis, capfd) -> None:
    reported = publish(fitted)
    everything = records(fitted)
    [run] = [record["run"] for record in everything if record["type"] == "run"]
    identifier = (fitted / "wandb_id").read_text().strip()
    assert (run["run_id"], run["run_group"], run["project"]) == (identifier, "ladder", "hpcm_scale")
    assert (
        run["config"]["update"]["laws"]["law_of_parameters_and_data"]["parameters"]
        == ladder_analysis.laws["law_of_parameters_and_data"].parameters
    )
    assert "wandb sync" in reported and identifier in reported
    assert capfd.readouterr() == ("", "")

    metrics = {record["metric"]["name"]: record["metric"] for record in everything if record["type"] == "metric"}
    for name in ("eval/loss", "law/loss", "law/low", "law/high"):
        assert metrics[name]["step_metric"] == "compute/pflops"

    rows = [record["history"]["item"] for record in everything if record["type"] == "history"]
    frontier = [(row["compute/pflops"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    assert frontier == [(point.pflops, point.loss) for point in ladder_analysis.frontier]
    line = [row for row in rows if "law/loss" in row]
    assert [row["law/low"] for row in line] == [ladder_analysis.at_compute(row["compute/pflops"]).low for row in line]
    most = ladder_analysis.laws["power_law_of_compute"].observed["C"][1]
    assert line[-1]["compute/pflops"] == pytest.approx(10 * most)

    files = next((fitted / "wandb").glob("offline-run-*")) / "files"
    for name in ("report.md", "laws.json"):
        assert (files / name).read_bytes() == (fitted / name).read_bytes()
        assert not (files / name).is_symlink()
    for name, expected in tables(ladder_analysis).items():
        path = next(row[f"tables/{name}.path"] for row in rows if f"tables/{name}.path" in row)
        table = json.loads((files / path).read_text())
        assert len(table["data"]) == len(expected) > 0
        assert dict(zip(table["columns"], table["data"][0], strict=True)) == expected[0]
    pictures = {path.name.rsplit("_", 2)[0] for path in (files / "media" / "images" / "figures").iterdir()}
    assert pictures == {path.stem for path in fitted.glob("*.png")}


@pytest.mark.launch
def test_again_it_is_the_same_run_with_what_is_true_now(fitted, ladder_analysis) -> None:
    publish(fitted)
    identifier = (fitted / "wandb_id").read_text()
    later = replace(ladder_analysis, frontier=ladder_analysis.frontier[:3])
    write_laws(later, fitted / "laws.json")
    sleep(1)  # wandb names folders by the second
    forecasts = [{"run": "a", "step": 3, "loss": 2.0, "forecast": 1.5}]
    publish(fitted, group="another", project="codecs", forecasts=forecasts)
    everything = records(fitted)  # one file
    [run] = [record["run"] for record in everything if record["type"] == "run"]
    assert (run["run_id"], run["run_group"], run["project"]) == (identifier.strip(), "another", "codecs")
    assert not run.get("resume")
    rows = [record["history"]["item"] for record in everything if record["type"] == "history"]
    assert sum("eval/loss" in row for row in rows) == 3
    [path] = [row["tables/forecasts.path"] for row in rows if "tables/forecasts.path" in row]
    table = json.loads((next((fitted / "wandb").glob("offline-run-*")) / "files" / path).read_text())
    assert (table["columns"], table["data"]) == ([*forecasts[0]], [[*forecasts[0].values()]])


def test_what_cannot_be_published_is_one_sentence(fitted, ladder_analysis, tmp_path_factory) -> None:
    with pytest.raises(UserError) as refused:
        publish(tmp_path_factory.mktemp("empty"))
    assert refused.value.code == "unreadable-laws"
    write_laws(replace(ladder_analysis, group=None), fitted / "laws.json")
    with pytest.raises(UserError) as refused:
        publish(fitted)
    assert (refused.value.code, refused.value.key) == ("no-common-group", "--group")
    write_laws(replace(ladder_analysis, project=None), fitted / "laws.json")
    with pytest.raises(UserError) as refused:
        publish(fitted)
    assert (refused.value.code, refused.value.key) == ("no-common-project", "--project")
    assert not (fitted / "wandb").exists()


def test_online_without_an_account_is_one_sentence(fitted, monkeypatch, tmp_path_factory) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as refused:
        publish(fitted, mode="online")
    assert refused.value.code == "wandb-failure"
