"""Laws of a sweep that is training, kept up to date."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcm_scale.errors import UserError, print_message
from hpcm_scale.scaling.analysis import FILE_NAME, read_laws
from hpcm_scale.scaling.publish import publish, write_fit
from hpcm_scale.sweeps.status import Follower, look

MINUTES = 5
"""Between two fits."""


def publish_while_training(runs: Sequence[Path], folder: Path, **options: Any) -> None:
    """Fit the runs, publish the results and print where, again every `MINUTES`, until all runs are finished.

    Metric, λ and level are those of an earlier fit in `folder`. What cannot be fitted or published is a message while
    runs train, and UserError after that.

    Args:
        runs: folders of runs, those of sweep.json that have not begun included.
        folder: for the results of the fit.
        options: of `publish`.
    """
    earlier = read_laws(folder) if (folder / FILE_NAME).exists() else None
    kept = {key: getattr(earlier, key) for key in ("metric", "lmbda", "level")} if earlier else {}
    followers: dict[Path, Follower] = {}
    while True:
        states = look(runs, followers)
        finished = all(state.state == "finished" for state in states)
        forecasts = [
            {"run": state.name, "step": state.step, "loss": state.loss, "forecast": state.forecast}
            for state in states
            if state.forecast is not None
        ]
        try:
            write_fit(runs, folder, **kept)
            print(publish(folder, **options, forecasts=forecasts), flush=True)
        except UserError as error:
            if finished:
                raise
            print_message(f"{error}; the next attempt is in {MINUTES} minutes")
        if finished:
            return
        time.sleep(60 * MINUTES)
