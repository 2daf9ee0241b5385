"""The results of a fit: their files, and one wandb run in the group of the sweep."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpcm_scale.errors import UserError, printable
from hpcm_scale.files import utf_8_path, write_text, writing
from hpcm_scale.scaling.analysis import COMPUTE_LAWS, FILE_NAME, Analysis, analyse, read_laws, write_laws
from hpcm_scale.scaling.figures import FIGURES, draw_figures
from hpcm_scale.scaling.findings import summary
from hpcm_scale.scaling.observations import study
from hpcm_scale.scaling.report import REPORT, report
from hpcm_scale.scaling.runs import find_runs
from hpcm_scale.tracking.wandb_view import AXES, load_wandb, run_id, settings

KEPT = (REPORT, FILE_NAME)
"""Files that are uploaded."""
JOB = "scaling"
EXTRAPOLATE = 10
"""Multiple of the largest compute up to which the law is logged."""


def write_fit(
    runs: Sequence[str | Path],
    folder: Path,
    *,
    metric: str | None = None,
    lmbda: float | None = None,
    level: float = 0.95,
    extrapolate: float = EXTRAPOLATE,
) -> tuple[Analysis, Sequence[str]]:
    """Fit laws to runs; write laws.json, figures and report.md to `folder`. Returns analysis and names of figures.

    Options are those of `observations.study`, `analysis.analyse` and `figures.draw_figures`; raises UserError as they
    do.
    """
    found = study(find_runs(runs), metric, lmbda)
    analysis = analyse(found, level=level)
    with writing(folder):
        drawn = draw_figures(found, analysis, folder, extrapolate)
        write_text(folder / REPORT, report(analysis, drawn))
        write_laws(analysis, folder / FILE_NAME)  # last: a folder with laws.json is complete
    return analysis, drawn


def publish(
    folder: Path,
    *,
    project: str | None = None,
    group: str | None = None,
    mode: str = "offline",
    forecasts: Sequence[dict[str, Any]] = (),
) -> str:
    """Create or replace the wandb run of a fit; returns a sentence with its location.

    The run has the frontier as a curve of the runs' own metric over compute/pflops, so that it appears in the group's
    panel; the law as law/loss, law/low and law/high; tables, figures, report.md and laws.json; and `forecasts` of runs
    that train, a row each. Its id is kept in `folder`, so that a second call replaces the run, and offline its file.
    Raises UserError if there is no fit, no project or group, or if wandb fails.
    """
    analysis = read_laws(folder)
    project, group = (printable(name or "") for name in (project or analysis.project, group or analysis.group))
    if not project:
        raise UserError("no-common-project", "--project", "the runs have no common wandb project; give --project")
    if not group:
        raise UserError(
            "no-common-group", "--group", "the runs have no common sweep; give the wandb group with --group"
        )
    wandb = load_wandb()
    with writing(folder / "wandb"):
        (folder / "wandb").mkdir(exist_ok=True)  # otherwise wandb silently uses the temporary folder
        identifier = run_id(folder)
    superseded = list((folder / "wandb").glob(f"offline-run-*-{identifier}*"))
    try:
        with utf_8_path(folder) as place:
            run = wandb.init(
                dir=str(place),
                id=identifier,
                name=f"{JOB} of {group}",
                job_type=JOB,
                mode=mode,
                project=project,
                group=group,
                notes=" ".join(summary(analysis)),
                config=_config(analysis),
                settings=settings(wandb, os.getpid()),  # not resumed: replaces the run with this id
            )
            _log(wandb, run, analysis, place, forecasts)
            run.finish()
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "wandb-failure", "--mode", f"wandb failed ({reason}); correct the cause or use --mode offline"
        ) from error
    kept = Path(run.dir).parent
    for old in superseded:
        if old.name != kept.name:
            shutil.rmtree(old, ignore_errors=True)
    if mode == "offline":
        return f"run {identifier} of group {group}, project {project}: wandb sync {folder / 'wandb' / kept.name}"
    return f"run {identifier} of group {group}, project {project}: {run.url}"


def _config(analysis: Analysis) -> dict[str, Any]:
    return {
        "metric": analysis.metric,
        "lmbda": analysis.lmbda,
        "distortion": analysis.distortion,
        "level": analysis.level,
        "recipe": analysis.recipe,
        "laws": {name: asdict(law) for name, law in analysis.laws.items()},
        "refused": analysis.refused,
    }


def _log(wandb: Any, run: Any, analysis: Analysis, folder: Path, forecasts: Sequence[dict[str, Any]]) -> None:
    run.define_metric(AXES[0])
    for row in _curves(analysis):
        for metric in row.keys() - {AXES[0]}:
            run.define_metric(metric, step_metric=AXES[0])
        run.log(row)
    all_tables = {**tables(analysis), "forecasts": list(forecasts)}
    shown: dict[str, Any] = {f"tables/{name}": _table(wandb, rows) for name, rows in all_tables.items() if rows}
    for name, figure in FIGURES.items():
        if (folder / f"{name}.png").is_file():
            shown[f"figures/{name}"] = wandb.Image(str(folder / f"{name}.png"), caption=figure.caption)
    run.log(shown)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copy(folder / name, Path(run.dir) / name)
            run.save(str(Path(run.dir) / name), base_path=run.dir, policy="now")


def _curves(analysis: Analysis) -> list[dict[str, float]]:
    """History rows, ascending in compute: the frontier as the runs' own metric, and the law with its interval."""
    rows = [{AXES[0]: point.pflops, analysis.metric: point.loss} for point in analysis.frontier]
    if COMPUTE_LAWS[0] in analysis.laws:
        low, high = analysis.laws[COMPUTE_LAWS[0]].observed["C"]
        compute = np.geomspace(low, EXTRAPOLATE * high, 100)
        for place, *losses in zip(compute, *analysis.at_compute(compute), strict=True):
            named = zip(("law/loss", "law/low", "law/high"), losses, strict=True)
            rows.append({AXES[0]: float(place)} | {key: float(loss) for key, loss in named if math.isfinite(loss)})
    return sorted(rows, key=lambda row: row[AXES[0]])


def tables(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """Rows of the published tables by name; values are numbers, strings, booleans or None."""
    laws = [
        {"law": law.name, "formula": law.formula, "parameter": name, "value": value}
        | {"standard_error": (law.standard_errors or {}).get(name), "r": law.r}
        for law in analysis.laws.values()
        for name, value in law.parameters.items()
    ]
    held_out = [
        {"law": name, "held_out": kind, "run": held.run, "observed": held.observed, "predicted": held.predicted}
        | {"low": held.low, "high": held.high, "error": held.error}
        for name, found in analysis.diagnostics.items()
        for kind, points in (("one run", found.leave_one_out), ("the largest", found.largest))
        for held in points
    ]
    return {
        "observations": [asdict(point) for point in analysis.observations],
        "frontier": [asdict(point) for point in analysis.frontier],
        "laws": laws,
        "held_out": held_out,
    }


def _table(wandb: Any, rows: list[dict[str, Any]]) -> Any:
    columns = list(rows[0])
    return wandb.Table(
        columns=columns, data=[[row[column] for column in columns] for row in rows], allow_mixed_types=True
    )
