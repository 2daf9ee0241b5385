from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
import pytest
from law_surfaces import AMOUNTS, SIZES, joint_surface, ladder, study_of, training

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import compare
from hpcm_scale.evaluation.points import find_curves
from hpcm_scale.scaling.analysis import (
    COMPUTE_LAWS,
    COMPUTE_OPTIMAL,
    FILE_NAME,
    FORMAT,
    PARAMETER_LAWS,
    PARAMETERS_AND_DATA,
    analyse,
    rate_change,
    read_laws,
    write_laws,
)
from hpcm_scale.scaling.figures import draw_figures
from hpcm_scale.scaling.findings import headline
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal
from hpcm_scale.scaling.laws.law import from_plain
from hpcm_scale.scaling.plan import Setting, make_plan
from hpcm_scale.scaling.report import print_summary, report

NAMES = {*PARAMETER_LAWS, *COMPUTE_LAWS, PARAMETERS_AND_DATA, COMPUTE_OPTIMAL}
FEW = ladder(sizes=SIZES[::2])
"""Just enough for every law."""


def test_it_finds_every_law(grid_analysis):
    assert set(grid_analysis.laws) == NAMES
    assert grid_analysis.refused == {}
    assert all(law.name == name and law.converged for name, law in grid_analysis.laws.items())
    assert all(len(law.runs) == len(set(law.runs)) == law.points for law in grid_analysis.laws.values())
    assert set(grid_analysis.laws["law_of_parameters_and_data"].runs) == {
        each.run for each in grid_analysis.observations
    }
    assert set(grid_analysis.irreducible_probability) == {PARAMETER_LAWS[1], COMPUTE_LAWS[1]}
    assert set(grid_analysis.diagnostics) == NAMES - {"compute_optimal"}
    ahead = grid_analysis.laws["law_of_parameters_and_data"].predict((1e8, 3e10))
    assert ahead.low < joint_surface(1e8, 3e10) < ahead.high
    cost = grid_analysis.laws["compute_optimal"].parameters
    assert (cost["k"], cost["kappa"]) == pytest.approx((40, 0.79))


def test_predictions_are_those_of_both_laws(grid_analysis):
    line, saturating = (grid_analysis.laws[name] for name in PARAMETER_LAWS)
    found, value = grid_analysis.at_size(2e8), saturating.predict(2e8)
    assert (found.value, found.high) == (value.value, value.high)
    assert found.low == max(value.low, line.predict(2e8).low)
    assert found.low < joint_surface(2e8, AMOUNTS[-1]) < found.high
    assert grid_analysis.loss_ratio(2e8).value == pytest.approx(found.value / grid_analysis.at_size(2e7).value)
    assert grid_analysis.loss_ratio(2e8, 1e7).value == saturating.ratio(1e7, 2e8).value
    grid = np.array([1.0, 1e3])
    assert grid_analysis.at_compute(grid).value[1] == grid_analysis.at_compute(1e3).value
    assert grid_analysis.at_compute(1e3).value == grid_analysis.laws[COMPUTE_LAWS[1]].predict(1e3).value


def test_a_ratio_of_losses_becomes_a_change_of_rate(grid_analysis):
    largest = next(each for each in grid_analysis.observations if each.parameters == 2e7 and each.pixels == AMOUNTS[-1])
    reference = grid_analysis.reference
    assert (reference.model, reference.parameters) == (largest.model, 2e7)
    assert (reference.loss, reference.bpp) == (largest.loss, largest.bpp)
    ratio = grid_analysis.loss_ratio(2e8)
    change = grid_analysis.change_of_rate(ratio)
    for each, its in zip(change, ratio, strict=True):
        assert each == its ** (largest.loss / largest.bpp) - 1
    assert -1 < change.low < change.value < change.high


LAMBDAS = np.array([0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483])


def test_on_published_curves_it_is_close_to_the_bd_rate_at_one_lambda_only():
    """HPCM-Base to -Large on Kodak: −4.3 % of BD-rate; by the losses −4.4 % at λ = 0.013, −8.1 % at 0.0018."""
    base, large = (find_curves(f"kodak/hpcm-{name}")[0] for name in ("base", "large"))
    assert compare(large, base).bd_rate == pytest.approx(-4.27, abs=0.01)
    losses = [LAMBDAS * 255**2 * 10 ** (-np.array(curve.psnr) / 10) + np.array(curve.bpp) for curve in (base, large)]
    found = 100 * np.array(list(map(rate_change, losses[1] / losses[0], losses[0], base.bpp)))
    assert found[3] == pytest.approx(-4.4, abs=0.05)
    assert found[0] == pytest.approx(-8.1, abs=0.05)


def test_laws_json_holds_every_digit(grid_analysis, tmp_path):
    write_laws(grid_analysis, tmp_path / FILE_NAME)
    text = (tmp_path / FILE_NAME).read_text(encoding="utf-8")
    again = read_laws(tmp_path)
    assert again == grid_analysis == read_laws(tmp_path / FILE_NAME)
    assert json.loads(text)["format"] == FORMAT
    assert repr(grid_analysis.laws["law_of_parameters_and_data"].parameters["A"]) in text
    assert isinstance(again.laws["compute_optimal"], ComputeOptimal)
    for name, law in grid_analysis.laws.items():
        x = (1e7, 1e9) if name == "law_of_parameters_and_data" else 1e7
        assert again.laws[name].predict(x) == law.predict(x)
        assert from_plain(type(law), json.loads(json.dumps(asdict(law)))) == law


@pytest.mark.launch
def test_the_same_runs_give_the_same_file(tmp_path):
    for runs, name in ((FEW, "one.json"), (FEW[::-1], "two.json")):
        write_laws(analyse(study_of(runs)), tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_from_run_folders(ladder_runs, ladder_analysis, tmp_path):
    law = ladder_analysis.laws["saturating_power_law_of_parameters"]
    assert law.parameters["alpha"] == pytest.approx(0.33, abs=3 * law.standard_errors["alpha"])
    assert ladder_analysis.refused == {}
    write_laws(ladder_analysis, tmp_path / FILE_NAME)
    text = (tmp_path / FILE_NAME).read_text(encoding="utf-8")
    assert str(ladder_runs) not in text and "/data/photos" not in text
    assert read_laws(tmp_path) == ladder_analysis


def test_what_few_runs_lack_is_reported():
    with pytest.raises(UserError) as refused:
        analyse(study_of([training(1e6, 1e8, 1.0)]))
    assert refused.value.code == "too-few-runs"
    same_size = analyse(study_of([training(1e6, 1e8, 1.2), training(1e6, 1e9, 1.0)]))
    assert "power_law_of_parameters" in same_size.refused
    assert "needs two different N, and there is 1" in same_size.refused["power_law_of_parameters"]
    assert set(same_size.laws) == {"power_law_of_compute"}
    assert (same_size.reference, same_size.largest) == (None, None)
    for count in range(2, 6):
        some = analyse(study_of(ladder(sizes=SIZES[:count], amounts=AMOUNTS[:2])))
        assert set(some.laws) | set(some.refused) == NAMES
        assert ("saturating_power_law_of_parameters" in some.laws) == (count > 2)
        assert some.refused["compute_optimal"].startswith("it needs L(N, D), and L(N, D) needs 3 sizes")
        assert all(sentence for sentence in some.refused.values())


def test_laws_of_unannealed_runs_have_warnings():
    hot = analyse(study_of([replace(each, annealed=False) for each in ladder(amounts=AMOUNTS[1:2])]))
    assert set(hot.laws) == {*PARAMETER_LAWS, *COMPUTE_LAWS}
    for law in hot.laws.values():
        assert any("no learning rate had decayed" in warning for warning in law.warnings)


def test_without_a_rate_there_is_no_change_of_rate():
    silent = analyse(study_of([replace(each, bpp=None) for each in ladder(amounts=AMOUNTS[:1])]))
    assert (silent.reference, silent.change_of_rate(silent.loss_ratio(1e9))) == (None, None)
    assert "power_law_of_parameters" in silent.laws


def test_the_level_is_everywhere():
    runs = study_of(ladder(amounts=AMOUNTS[:2]))
    half, usual = analyse(runs, level=0.5), analyse(runs)
    assert half.level == 0.5
    for name in half.diagnostics:
        narrow, wide = (found.diagnostics[name].leave_one_out[0] for found in (half, usual))
        assert narrow.predicted == wide.predicted
        assert wide.low < narrow.low < narrow.high < wide.high
    with pytest.raises(UserError) as refused:
        analyse(study_of(ladder()), level=95)
    assert (refused.value.code, refused.value.key) == ("level-out-of-range", "--level")


def test_files_that_are_no_laws_are_refused(grid_analysis, tmp_path):
    file = tmp_path / FILE_NAME
    with pytest.raises(UserError) as refused:
        read_laws(file)
    assert refused.value.code == "unreadable-laws"
    write_laws(grid_analysis, file)
    good = json.loads(file.read_text(encoding="utf-8"))
    broken = [
        "",
        "[]",
        "{}",
        json.dumps(good | {"format": "hpcm_scale laws 1"}),
        json.dumps(good | {"laws": {"law_of_parameters_and_data": {"name": "law_of_parameters_and_data"}}}),
        json.dumps(good | {"lmbda": "0.013"}),
        json.dumps(good | {"laws": {}}),
        json.dumps(good | {"level": 95}),
        json.dumps({key: value for key, value in good.items() if key != "diagnostics"}),
    ]
    for text in broken:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as refused:
            read_laws(file)
        assert refused.value.code == "laws-of-another-version"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_laws(grid_analysis, tmp_path / "file" / FILE_NAME)


def test_numbers_are_pythons_own(grid_analysis):
    """numpy's would compare and print differently after a way through JSON."""

    def walk(value) -> None:
        assert not isinstance(value, np.generic | np.ndarray), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(item)

    for law in grid_analysis.laws.values():
        walk(asdict(law))


def equal(observations, loss: float = 1.2345678901):
    return [replace(each, loss=loss) for each in observations]


DEGENERATE = {
    "all losses equal": equal(ladder()),
    "two runs": equal(ladder(sizes=SIZES[:2], amounts=AMOUNTS[:1])),
    "not annealed": [replace(each, annealed=False) for each in equal(ladder())],
    "equal for each amount": [replace(each, loss=float(joint_surface(1e6, each.pixels))) for each in FEW],
    "one size": equal(ladder(sizes=SIZES[:1])),
    "one training": [replace(equal(ladder())[0], run=f"run {index}", seed=index) for index in range(3)],
    "rising": [replace(each, loss=1 / each.loss) for each in FEW],
    "tiny": [replace(each, loss=1e-300 * each.loss) for each in FEW],
    "no finite measures": [replace(each, psnr=float("nan"), bpp=float("inf")) for each in FEW],
}


@pytest.mark.launch
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("runs", DEGENERATE.values(), ids=[*DEGENERATE])
def test_degenerate_runs_give_whole_results(runs, tmp_path):
    """Figures, report and a laws.json that every reader of JSON takes; what no law follows from is said."""
    study = study_of(runs)
    found = analyse(study)
    assert set(found.laws) | set(found.refused) == NAMES
    write_laws(found, tmp_path / FILE_NAME)
    json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    again = read_laws(tmp_path)
    assert set(again.laws) == set(found.laws)
    draw_figures(study, found, tmp_path / "figures")
    assert report(found, [])
    print_summary(found)
    for asked in ({"pflops": 1.0}, {"target_loss": 1.1}):
        with suppress(UserError):
            json.loads(make_plan(again, Setting(), **asked).to_json(), parse_constant=pytest.fail)


def test_equal_losses_are_reported_as_such():
    found = analyse(study_of(DEGENERATE["all losses equal"]))
    assert set(found.laws) == {*()}
    assert found.refused["power_law_of_parameters"].endswith("are equal and do not depend on N")
    assert found.refused["law_of_parameters_and_data"].endswith("are equal and do not depend on N or D")
    assert "determine no law of parameters: all losses of" in headline(found)[0]
