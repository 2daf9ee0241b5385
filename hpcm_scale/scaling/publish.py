"""What a fit found, as one wandb run beside those of the sweep."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpcm_scale.errors import UserError, shown
from hpcm_scale.files import utf_8_path, writing
from hpcm_scale.scaling.analysis import FILE_NAME, Analysis, read_laws
from hpcm_scale.scaling.figures import FIGURES
from hpcm_scale.scaling.report import REPORT
from hpcm_scale.scaling.verdict import compute_law, doubts, headline
from hpcm_scale.tracking.wandb_view import AXES, load_wandb, run_id, settings

KEPT = (REPORT, FILE_NAME)
"""Files that go along."""
JOB = "scaling"
EXTRAPOLATE = 10


def publish(folder: Path, *, project: str | None = None, group: str | None = None, mode: str = "offline") -> str:
    """Make, or make again, the wandb run of a fit; returns a sentence that says where it is.

    The run has the frontier as a curve of the runs' own metric over compute/pflops, so that it lies over theirs in
    the group's panel; the law as law/loss, law/low and law/high; tables, figures, report.md and laws.json. Its id is
    kept in `folder`: called again, the same run is replaced, offline its file, too. Raises UserError where there is
    no fit, no project or group to put it in, or wandb refuses.
    """
    analysis = read_laws(folder)
    project, group = (shown(name or "") for name in (project or analysis.project, group or analysis.group))
    if not project:
        raise UserError("the runs do not share one wandb project; name it with --project")
    if not group:
        raise UserError("the runs do not share one sweep; name the wandb group with --group")
    wandb = load_wandb()
    with writing(folder / "wandb"):
        (folder / "wandb").mkdir(exist_ok=True)  # where it cannot, wandb would quietly use the temporary folder
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
                notes=" ".join([headline(analysis), *(f"Doubt: {doubt}." for doubt in doubts(analysis))]),
                config=_config(analysis),
                settings=settings(wandb, os.getpid()),  # not resumed: a run of this id is replaced as a whole
            )
            _log(wandb, run, analysis, place)
            run.finish()
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"wandb refuses ({reason}); mend that, or use --mode offline") from error
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
        "laws": {name: law.to_dict() for name, law in analysis.laws.items()},
        "preferred": analysis.preferred,
        "refused": analysis.refused,
    }


def _log(wandb: Any, run: Any, analysis: Analysis, folder: Path) -> None:
    run.define_metric(AXES[0])
    for row in _curves(analysis):
        for metric in row.keys() - {AXES[0]}:
            run.define_metric(metric, step_metric=AXES[0])
        run.log(row)
    shown: dict[str, Any] = {f"tables/{name}": _table(wandb, rows) for name, rows in tables(analysis).items() if rows}
    for name, figure in FIGURES.items():
        if (folder / f"{name}.png").is_file():
            shown[f"figures/{name}"] = wandb.Image(str(folder / f"{name}.png"), caption=figure.CAPTION)
    run.log(shown)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copy(folder / name, Path(run.dir) / name)
            run.save(str(Path(run.dir) / name), base_path=run.dir, policy="now")
    if law := compute_law(analysis):
        run.summary["law/formula"] = law.formula


def _curves(analysis: Analysis) -> list[dict[str, float]]:
    """History rows, ascending in compute: the frontier in the runs' own metric, and the law with its interval."""
    points = analysis.frontier_annealed or analysis.frontier
    rows = [{AXES[0]: point.pflops, analysis.metric: point.loss} for point in points]
    if law := compute_law(analysis):
        low, high = law.observed["C"]
        compute = np.geomspace(low, EXTRAPOLATE * high, 100)
        for place, *losses in zip(compute, *law.predict(compute, analysis.level), strict=True):
            named = zip(("law/loss", "law/low", "law/high"), losses, strict=True)
            rows.append({AXES[0]: float(place)} | {key: float(loss) for key, loss in named if math.isfinite(loss)})
    return sorted(rows, key=lambda row: row[AXES[0]])


def tables(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """Rows of every table, by its name; the values are numbers, texts, truth values or None."""
    laws = [
        {"law": law.name, "formula": law.formula, "parameter": name, "value": value}
        | {"standard_error": (law.standard_errors or {}).get(name), "aicc": law.aicc, "r": law.r}
        for law in analysis.laws.values()
        for name, value in law.parameters.items()
    ]
    held_out = [
        {"law": name, "held_out": kind, "run": held.run, "observed": held.observed, "predicted": held.predicted}
        | {"low": held.low, "high": held.high, "error": held.error}
        for name, trust in analysis.trust.items()
        for kind, points in (("one run", trust.leave_one_out), ("the largest", trust.largest))
        for held in points
    ]
    observations = [asdict(point) for point in analysis.observations]
    observations = [row | {f"parameters_{part}": n for part, n in row.pop("parts").items()} for row in observations]
    return {
        "observations": observations,
        "frontier": [asdict(point) for point in analysis.frontier],
        "frontier_annealed": [asdict(point) for point in analysis.frontier_annealed],
        "laws": laws,
        "held_out": held_out,
    }


def _table(wandb: Any, rows: list[dict[str, Any]]) -> Any:
    columns = list(rows[0])
    return wandb.Table(
        columns=columns, data=[[row[column] for column in columns] for row in rows], allow_mixed_types=True
    )
