"""Command: scaling laws of runs.

hpcm scaling fit runs/ladder --out results
hpcm scaling plan --laws results --gpus 64 --days 7
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.config.schema import IMAGES
from hpcm_scale.errors import Parser, UserError, entry_point
from hpcm_scale.files import check_length, writing
from hpcm_scale.limits import BUDGET, CONFIDENCE, COUNT, CROP, LAMBDA, UTILISATION, Range


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="hpcm scaling", description="Scaling laws of runs, finished or not.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    first = (_add_curves, _add_fit, _add_plan, _add_design, _add_forecast, _add_score)
    for add in (*first, _add_horizon, _add_publish, _add_collect, _add_compare):
        add(commands)
    return main


def _add_runs(command: Parser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of runs")


def _add_curves(commands) -> None:
    curves = commands.add_parser("curves", help="draw loss against compute", description="Draw loss against compute.")
    _add_runs(curves)
    curves.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("loss_vs_compute.png"),
        help="the figure, .png, .svg or .pdf (default: %(default)s)",
    )


def _add_fit(commands) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit laws to runs: laws.json, figures and report.md",
        description="Find the frontier of runs, fit laws of parameters and of compute with diagnostics, and write "
        "laws.json, figures (PNG, SVG) and report.md.",
    )
    _add_runs(fit)
    fit.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    fit.add_argument(
        "--metric",
        help="eval/loss, train/loss or, with train.ema, eval_ema_0.05/loss; default: eval/loss if the runs have it",
    )
    fit.add_argument("--lmbda", metavar="X", type=LAMBDA.real, help="λ of the runs; required if they have several")
    fit.add_argument(
        "--level",
        metavar="P",
        type=CONFIDENCE.real,
        default=0.95,
        help="probability of the intervals; default: %(default)s",
    )
    fit.add_argument(
        "--extrapolate",
        metavar="X",
        type=Range(least=1, most=1_000_000).real,
        default=10.0,
        help="figures extend to this multiple of the largest size; default: %(default)g",
    )


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="size, steps and predicted loss for a compute budget",
        description="The compute-optimal size for a budget with its interval, models near it, their predicted losses, "
        "and the training command with the recipe of the runs.",
    )
    plan.add_argument("--laws", metavar="FILE", type=Path, required=True, help="laws.json or its folder")
    budget = plan.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--pflops", metavar="C", type=BUDGET.real, help="training compute, 1e15 floating-point operations"
    )
    budget.add_argument(
        "--target-loss",
        metavar="L",
        type=Range(above=0, most=1_000_000).real,
        help="the least compute that reaches this loss",
    )
    budget.add_argument(
        "--days", metavar="T", type=Range(above=0, most=36_525).real, help="compute of --gpus at --mfu in this time"
    )
    plan.add_argument("--gpus", metavar="N", type=IMAGES.whole, default=8, help="default: %(default)s")
    plan.add_argument("--gpu", metavar="NAME", default="H100", help="model, for its peak rate; default: %(default)s")
    plan.add_argument(
        "--mfu", metavar="X", type=UTILISATION.real, default=0.4, help="fraction of the peak rate; default: %(default)s"
    )
    plan.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    plan.add_argument("--batch-size", metavar="B", type=IMAGES.whole, help="images per step; default: that of the runs")
    plan.add_argument("--crop", metavar="PX", type=CROP.whole, help="side of a crop; default: that of the runs")
    plan.add_argument("--images-in-set", metavar="N", type=COUNT.whole, help="images in the data set, to count epochs")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_forecast(commands) -> None:
    forecast = commands.add_parser(
        "forecast",
        help="predict the loss of a training, or the BD-rate of a size, before it is trained",
        description="The predicted loss of one new training with the recipe of the laws, as a dated file that `score` "
        "compares with the run; with --anchor the predicted BD-rate of a size.",
    )
    forecast.add_argument(
        "--laws",
        metavar="DIR",
        type=Path,
        required=True,
        nargs="+",
        help="laws.json or its folder; several λ with --anchor",
    )
    forecast.add_argument("--size", metavar="N", help="a preset, or parameters such as 30m or 10b")
    data = forecast.add_mutually_exclusive_group()
    data.add_argument("--images", metavar="D", type=COUNT.real, help="training images")
    data.add_argument("--pflops", metavar="C", type=BUDGET.real, help="training compute, 1e15 operations")
    forecast.add_argument("--out", metavar="FILE", type=Path, help="write the forecast as JSON, to be scored")
    forecast.add_argument("--anchor", metavar="ANCHOR", help="anchor of the BD-rate, such as kodak/vtm-18")
    forecast.add_argument(
        "--reference", metavar="RESULT", help="with laws at one λ: an evaluation, or a shipped curve, of a trained size"
    )
    forecast.add_argument("--reference-size", metavar="N", help="its size; default: the largest size of the laws")


def _add_score(commands) -> None:
    score = commands.add_parser(
        "score",
        help="compare a forecast with the run",
        description="How far a forecast was off, and whether the run is inside its interval; a run of another recipe "
        "is refused.",
    )
    score.add_argument("forecast", metavar="FORECAST", type=Path, help="a file of `hpcm scaling forecast --out`")
    score.add_argument("run", metavar="RUN", type=Path, help="the run folder")


def _add_horizon(commands) -> None:
    horizon = commands.add_parser(
        "horizon",
        help="the best learning rate against the length of a run",
        description="The exponent γ of the best learning rate, ∝ images^−γ, from runs at several rates and lengths; "
        "and the override that applies it to a run.",
    )
    _add_runs(horizon)
    horizon.add_argument("--lmbda", metavar="X", type=LAMBDA.real, help="λ of the runs; required if they have several")


def _add_publish(commands) -> None:
    publish = commands.add_parser(
        "publish",
        help="add the results of fit to the wandb group of the sweep",
        description="Add one wandb run with frontier, laws, tables, figures and report to the group of the sweep; a "
        "second call replaces the run. With --watch, runs are fitted and published every few minutes until all of them "
        "are finished, or Ctrl-C.",
    )
    publish.add_argument("folder", metavar="DIR", type=Path, help="output of `hpcm scaling fit --out DIR`")
    publish.add_argument(
        "--watch",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="run folders, or folders of runs, that train: fit them into DIR; metric and λ are those of an earlier fit "
        "in DIR",
    )
    publish.add_argument("--project", help="default: that of the runs")
    publish.add_argument("--group", help="default: the sweep of the runs")
    publish.add_argument("--mode", choices=("online", "offline"), default="offline", help="default: %(default)s")


def _add_collect(commands) -> None:
    collect = commands.add_parser(
        "collect",
        help="copy configurations and thinned journals, to share or commit",
        description="Copy configuration and thinned journal of each run, without paths of this machine; `fit` accepts "
        "the copy.",
    )
    _add_runs(collect)
    collect.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for one folder per run")
    size = collect.add_mutually_exclusive_group()
    size.add_argument("--every", metavar="N", type=COUNT.whole, help="training lines that are averaged into one")
    size.add_argument(
        "--most-bytes",
        metavar="B",
        type=Range(least=1, most=10**15).whole,
        default=1_000_000,
        help="largest total size; default: %(default)s",
    )


def _add_compare(commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="how much less data or compute one recipe needs than another",
        description="Fit one law with shared exponents to the runs of two recipes: how much less data and compute the "
        "second needs for the loss of the first, and whether the exponents are equal.",
    )
    compare.add_argument(
        "recipes", nargs="+", metavar="LABEL=RUNS", help="a label, and a run folder or a folder of runs; two labels"
    )
    compare.add_argument("--metric", help="as in fit")
    compare.add_argument("--lmbda", metavar="X", type=LAMBDA.real, help="λ of the runs; required if they have several")


def _add_design(commands) -> None:
    design = commands.add_parser(
        "design",
        help="sizes and amounts of data that determine L(N, D), for a budget",
        description="Choose constant-rate runs and cooldowns of given sizes so that a fit of L(N, D) to them has the "
        "least standard error of log N* at ten times the budget, and write an experiment that trains them.",
    )
    design.add_argument("--pflops", metavar="C", type=BUDGET.real, required=True, help="budget of the whole sweep")
    design.add_argument(
        "--sizes", metavar="N,N,…", required=True, help="parameters, such as 1m,3m,10m,30m, or presets; three or more"
    )
    design.add_argument("--laws", metavar="FILE", type=Path, help="laws whose L(N, D), recipe and noise are assumed")
    design.add_argument(
        "--noise",
        metavar="X",
        type=Range(least=1e-6, most=1).real,
        help="standard deviation of log loss between seeds; default: the residual deviation of --laws, or 0.003",
    )
    design.add_argument("--seeds", metavar="N", type=IMAGES.whole, default=1, help="default: %(default)s")
    design.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    design.add_argument("--gpus", metavar="N", type=IMAGES.whole, default=8, help="for the time; default: %(default)s")
    design.add_argument("--gpu", metavar="NAME", default="H100", help="default: %(default)s")
    design.add_argument("--mfu", metavar="X", type=UTILISATION.real, default=0.4, help="default: %(default)s")
    design.add_argument("--out", metavar="FILE", type=Path, help="a new experiment: conf/experiment/NAME.yaml")


def curves(chosen) -> None:
    """`hpcm scaling curves`: one figure, and a line on each run."""
    from hpcm_scale.scaling.figures.compute import draw_loss_against_compute
    from hpcm_scale.scaling.filters import EVALUATION, TRAINING, end
    from hpcm_scale.scaling.runs import Run, find_runs

    def summary(run: Run) -> str:
        compute, _ = run.curve(TRAINING)
        evaluation = run.curve(EVALUATION)[1]
        state = f"{run.name}: step {run.step:,} of {run.config['train']['steps']:,}"
        if compute.size:
            state += f", {compute[-1]:,.4g} PFLOPs, training loss {end(run, TRAINING, run.step):.4f} (smoothed)"
        if evaluation.size:
            state += f", evaluation loss {evaluation[-1]:.4f}"
        return state

    check_length(chosen.out)
    runs = find_runs(chosen.runs)
    with writing(chosen.out):
        draw_loss_against_compute(runs, chosen.out)
    print("\n".join(map(summary, runs)))
    print(f"drawn: {chosen.out}")


def fit(chosen) -> None:
    """`hpcm scaling fit`: laws.json, figures, report.md, and a summary."""
    from hpcm_scale.scaling.analysis import FILE_NAME
    from hpcm_scale.scaling.publish import write_fit
    from hpcm_scale.scaling.report import REPORT, print_summary

    check_length(chosen.out)
    options = {key: getattr(chosen, key) for key in ("metric", "lmbda", "level", "extrapolate")}
    analysis, drawn = write_fit(chosen.runs, chosen.out, **options)
    print_summary(analysis)
    print(f"written: {', '.join(str(chosen.out / name) for name in (REPORT, FILE_NAME))} and {len(drawn)} figures")


def plan(chosen) -> None:
    """`hpcm scaling plan`: size, steps and predicted loss for a budget."""
    from dataclasses import fields

    from hpcm_scale.scaling.analysis import read_laws
    from hpcm_scale.scaling.plan import Setting, make_plan, print_plan

    setting = Setting(**{field.name: getattr(chosen, field.name) for field in fields(Setting)})
    pflops = chosen.pflops if chosen.days is None else setting.pflops(chosen.days)
    made = make_plan(read_laws(chosen.laws), setting, pflops=pflops, target_loss=chosen.target_loss)
    print(made.to_json()) if chosen.json else print_plan(made)


def forecast(chosen) -> None:
    """`hpcm scaling forecast`: a predicted loss, or a predicted BD-rate."""
    from hpcm_scale.formatting import terminal
    from hpcm_scale.scaling import forecast
    from hpcm_scale.scaling.analysis import read_laws
    from hpcm_scale.scaling.forecast_rate import forecast_bd_rate

    of_rate = chosen.anchor is not None
    for option in ("images", "pflops", "out") if of_rate else ("reference", "reference_size"):
        if getattr(chosen, option) is not None:
            name, with_or_without = f"--{option.replace('_', '-')}", "with" if of_rate else "without"
            raise UserError("unused-option", name, f"{name} has no effect {with_or_without} --anchor; omit it")
    if chosen.size is None and chosen.pflops is None:
        raise UserError("nothing-to-forecast", "--size", f"a forecast needs --size{'' if of_rate else ' or --pflops'}")
    analyses = [read_laws(path) for path in chosen.laws]
    size = None if chosen.size is None else forecast.size_of(chosen.size)
    console = terminal()
    if of_rate and size is not None:
        start = chosen.reference_size and forecast.size_of(chosen.reference_size, "--reference-size")
        rate = forecast_bd_rate(analyses, size, chosen.anchor, chosen.reference, start)
        console.print(rate.sentence, soft_wrap=True)
        return
    if len(analyses) > 1:
        raise UserError("several-laws", "--laws", "a loss is predicted by the laws of one λ; give one folder")
    made = forecast.make_forecast(analyses[0], parameters=size, images=chosen.images, pflops=chosen.pflops)
    for sentence in (made.sentence, *(f"Caveat: {doubt}" for doubt in forecast.doubts(analyses[0], made))):
        console.print(f"{sentence}.", soft_wrap=True)
    if chosen.out is not None:
        forecast.write_forecast(made, chosen.out)
        print(f"written: {chosen.out}")


def score(chosen) -> None:
    """`hpcm scaling score`: the error of a forecast."""
    from hpcm_scale.formatting import terminal
    from hpcm_scale.scaling import forecast
    from hpcm_scale.scaling.runs import load_run

    made = forecast.read_forecast(chosen.forecast)
    terminal().print(f"{forecast.describe_score(made, forecast.score(made, load_run(chosen.run)))}.", soft_wrap=True)


def horizon(chosen) -> None:
    """`hpcm scaling horizon`: the exponent of the best learning rate."""
    from hpcm_scale.scaling.horizon import fit_horizon, print_horizon
    from hpcm_scale.scaling.observations import study
    from hpcm_scale.scaling.runs import find_runs

    print_horizon(fit_horizon(study(find_runs(chosen.runs), lmbda=chosen.lmbda).observations))


def design(chosen) -> None:
    """`hpcm scaling design`: a sweep for a budget."""
    from hpcm_scale.scaling.analysis import read_laws
    from hpcm_scale.scaling.design import design
    from hpcm_scale.scaling.design_experiment import print_design, write_experiment
    from hpcm_scale.scaling.plan import Setting

    made = design(
        chosen.pflops,
        chosen.sizes.split(","),
        analysis=read_laws(chosen.laws) if chosen.laws else None,
        noise=chosen.noise,
        seeds=chosen.seeds,
        overrides=chosen.set,
    )
    setting = Setting(chosen.gpus, chosen.gpu, chosen.mfu, made.settings.precision)
    setting.peak()  # an unknown GPU is refused before anything is written
    if chosen.out:
        write_experiment(made, chosen.out)
    print_design(made, setting, chosen.out.stem if chosen.out else "design")


def publish(chosen) -> None:
    """`hpcm scaling publish`: one wandb run in the group of the sweep."""
    from hpcm_scale.scaling.publish import publish
    from hpcm_scale.sweeps.watch import publish_while_training

    options = {key: getattr(chosen, key) for key in ("project", "group", "mode")}
    if chosen.watch:
        publish_while_training(chosen.watch, chosen.folder, **options)
    else:
        print(publish(chosen.folder, **options))


def collect(chosen) -> None:
    """`hpcm scaling collect`: a portable copy of runs."""
    from hpcm_scale.scaling.collect import collect
    from hpcm_scale.scaling.runs import find_runs

    runs = find_runs(chosen.runs)
    with writing(chosen.out):
        size = collect(runs, chosen.out, every=chosen.every, most_bytes=chosen.most_bytes)
    print(f"{len(runs)} runs, {size:,} bytes: {chosen.out}")


def compare(chosen) -> None:
    """`hpcm scaling compare`: efficiency of one recipe against another."""
    from hpcm_scale.scaling.compare import print_comparison, read_recipes

    print_comparison(read_recipes(chosen.recipes), chosen.metric, chosen.lmbda)


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm scaling` and `python -m hpcm_scale.commands.scaling`."""
    chosen = parser().parse_args(arguments)
    functions = (curves, fit, plan, design, forecast, score, horizon, publish, collect, compare)
    {function.__name__: function for function in functions}[chosen.command](chosen)


if __name__ == "__main__":
    main()
