"""Command: scaling laws of runs.

hpcm scaling fit runs/ladder --out results
hpcm scaling plan --laws results --gpus 64 --days 7
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.config.schema import IMAGES
from hpcm_scale.errors import Parser, entry_point
from hpcm_scale.files import check_length, write_text, writing
from hpcm_scale.limits import BUDGET, CONFIDENCE, COUNT, CROP, LAMBDA, UTILISATION, Range


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="hpcm scaling", description="Scaling laws of runs, finished or not.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_curves, _add_fit, _add_plan, _add_publish, _add_collect):
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
        "--bootstrap",
        metavar="K",
        type=Range(least=0, most=100_000).whole,
        default=0,
        help="resamples for bootstrap intervals; default: 0",
    )
    _add_level(fit)
    fit.add_argument(
        "--extrapolate",
        metavar="X",
        type=Range(least=1, most=1_000_000).real,
        default=10.0,
        help="figures extend to this multiple of the largest size; default: %(default)g",
    )


def _add_level(command: Parser) -> None:
    command.add_argument(
        "--level",
        metavar="P",
        type=CONFIDENCE.real,
        default=0.95,
        help="probability of the intervals; default: %(default)s",
    )


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="size, steps and predicted loss for a compute budget",
        description="The compute-optimal size for a budget, the nearest presets, their predicted losses, and the "
        "training command.",
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
    plan.add_argument(
        "--batch-size", metavar="B", type=IMAGES.whole, help="images per step; default: 32 or a multiple of --gpus"
    )
    plan.add_argument("--crop", metavar="PX", type=CROP.whole, default=256, help="side of a crop; default: %(default)s")
    plan.add_argument("--images-in-set", metavar="N", type=COUNT.whole, help="images in the data set, to count epochs")
    _add_level(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_publish(commands) -> None:
    publish = commands.add_parser(
        "publish",
        help="add the results of fit to the wandb group of the sweep",
        description="Add one wandb run with frontier, laws, tables, figures and report to the group of the sweep; a "
        "second call replaces the run.",
    )
    publish.add_argument("folder", metavar="DIR", type=Path, help="output of `hpcm scaling fit --out DIR`")
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
    from hpcm_scale.scaling.analysis import FILE_NAME, analyse, write_laws
    from hpcm_scale.scaling.figures import draw_figures
    from hpcm_scale.scaling.observations import study
    from hpcm_scale.scaling.report import REPORT, print_summary, report
    from hpcm_scale.scaling.runs import find_runs

    check_length(chosen.out)
    found = study(find_runs(chosen.runs), chosen.metric, chosen.lmbda)
    analysis = analyse(found, bootstrap=chosen.bootstrap, level=chosen.level)
    with writing(chosen.out):
        drawn = draw_figures(found, analysis, chosen.out, chosen.extrapolate)
        write_text(chosen.out / REPORT, report(analysis, drawn))
        write_laws(analysis, chosen.out / FILE_NAME)  # last: a folder with laws.json is complete
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


def publish(chosen) -> None:
    """`hpcm scaling publish`: one wandb run in the group of the sweep."""
    from hpcm_scale.scaling.publish import publish

    print(publish(chosen.folder, project=chosen.project, group=chosen.group, mode=chosen.mode))


def collect(chosen) -> None:
    """`hpcm scaling collect`: a portable copy of runs."""
    from hpcm_scale.scaling.collect import collect
    from hpcm_scale.scaling.runs import find_runs

    runs = find_runs(chosen.runs)
    with writing(chosen.out):
        size = collect(runs, chosen.out, every=chosen.every, most_bytes=chosen.most_bytes)
    print(f"{len(runs)} runs, {size:,} bytes: {chosen.out}")


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm scaling` and `python -m hpcm_scale.commands.scaling`."""
    chosen = parser().parse_args(arguments)
    {"curves": curves, "fit": fit, "plan": plan, "publish": publish, "collect": collect}[chosen.command](chosen)


if __name__ == "__main__":
    main()
