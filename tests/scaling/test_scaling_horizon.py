from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import training

from hpcm_scale.commands.scaling import main
from hpcm_scale.config.compose import compose
from hpcm_scale.errors import UserError
from hpcm_scale.scaling.horizon import fit_horizon

GAMMA = 0.3


def tuned(size: float, images: float, rates=(1, 2, 4, 8)) -> list:
    """Runs at rates around the best one, 3e-3·(images/1e5)^−γ, of a loss that is a parabola in log rate."""
    best = 3e-3 * (images / 1e5) ** -GAMMA
    chosen = best * 1.3 * np.array(rates) / 4
    return [
        training(size, images * 65536, 1.2 * np.exp(0.03 * np.log(rate / best) ** 2), seed=index, learning_rate=rate)
        for index, rate in enumerate(chosen)
    ]


def test_the_exponent_is_that_of_the_minima():
    found = fit_horizon([each for images in (1e4, 1e5, 4e5) for each in tuned(1e6, images)])
    assert found.exponent == pytest.approx(GAMMA, abs=1e-3)
    assert found.standard_error == pytest.approx(0, abs=1e-3)
    assert [each.learning_rate for each in found.best] == pytest.approx(
        [3e-3 * (images / 1e5) ** -GAMMA for images in (1e4, 1e5, 4e5)], rel=1e-3
    )
    two = fit_horizon([each for images in (1e4, 1e5) for each in tuned(1e6, images)])
    assert two.standard_error is None


def test_the_override_gives_a_run_the_rate_of_its_length():
    found = fit_horizon([each for images in (1e4, 1e5, 1e6) for each in tuned(1e6, images)])
    override = found.override.replace("'", "")
    config = compose(["model=nano", "train.steps=5000", "train.batch_size=20", override])
    assert config.schedule.learning_rate == pytest.approx(3e-3, rel=0.02)
    longer = compose(["model=nano", "train.steps=50000", "train.batch_size=20", override])
    assert longer.schedule.learning_rate / config.schedule.learning_rate == pytest.approx(10**-found.exponent, rel=0.01)


def test_runs_of_several_lambdas_need_a_choice(project, capsys):
    runs = str(project / "docs" / "results" / "ablations" / "journals" / "lambda")
    best = str(project / "docs" / "results" / "ablations" / "journals" / "best")
    for options, reason in (([], "--lmbda"), (["--lmbda", "0.013"], "no size has two lengths")):
        with pytest.raises(SystemExit):
            main(["horizon", runs, best, *options])
        assert reason in capsys.readouterr().err


def test_a_best_rate_at_the_edge_is_refused():
    with pytest.raises(UserError) as refused:
        fit_horizon([each for images in (1e4, 1e5) for each in tuned(1e6, images, rates=(8, 16, 32))])
    assert refused.value.code == "no-rate-against-length"
    with pytest.raises(UserError):
        fit_horizon(tuned(1e6, 1e5))
