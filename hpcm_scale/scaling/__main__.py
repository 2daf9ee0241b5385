"""The command `hpcm scaling`: what runs tell about scale."""

from __future__ import annotations

from collections.abc import Sequence

from hpcm_scale.errors import one_line
from hpcm_scale.files import check_length, write_text, writing
from hpcm_scale.scaling.arguments import parser


def curves(chosen) -> None:
    """`hpcm scaling curves`: one figure, and how far each run is."""
    from hpcm_scale.scaling.figures.loss_against_compute import draw_loss_against_compute
    from hpcm_scale.scaling.runs import Run, find_runs
    from hpcm_scale.scaling.usable import TRAINING, end

    def summary(run: Run) -> str:
        compute, _ = run.curve(TRAINING)
        evaluation = run.curve("eval/loss")[1]
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
    from hpcm_scale.scaling.report import REPORT, report
    from hpcm_scale.scaling.runs import find_runs
    from hpcm_scale.scaling.summary import print_summary

    check_length(chosen.out)
    found = study(find_runs(chosen.runs), chosen.metric, chosen.lmbda)
    analysis = analyse(found, bootstrap=chosen.bootstrap, level=chosen.level)
    with writing(chosen.out):
        drawn = draw_figures(found, analysis, chosen.out, chosen.extrapolate)
        write_text(chosen.out / REPORT, report(analysis, drawn))
        write_laws(analysis, chosen.out / FILE_NAME)  # last: where it lies, the rest is there
    print_summary(analysis)
    print(f"written: {', '.join(str(chosen.out / name) for name in (REPORT, FILE_NAME))} and {len(drawn)} figures")


def plan(chosen) -> None:
    """`hpcm scaling plan`: what a budget buys."""
    from dataclasses import fields

    from hpcm_scale.scaling.analysis import read_laws
    from hpcm_scale.scaling.plan import Setting, make_plan
    from hpcm_scale.scaling.plan_text import print_plan

    setting = Setting(**{field.name: getattr(chosen, field.name) for field in fields(Setting)})
    pflops = chosen.pflops if chosen.days is None else setting.pflops(chosen.days)
    made = make_plan(read_laws(chosen.laws), setting, pflops=pflops, target_loss=chosen.target_loss)
    print(made.to_json()) if chosen.json else print_plan(made)


def publish(chosen) -> None:
    """`hpcm scaling publish`: one wandb run beside those of the sweep."""
    from hpcm_scale.scaling.publish import publish

    where = publish(chosen.folder, project=chosen.project, group=chosen.group, mode=chosen.mode)
    print(where)


def collect(chosen) -> None:
    """`hpcm scaling collect`: a ladder to share."""
    from hpcm_scale.scaling.collect import collect
    from hpcm_scale.scaling.runs import find_runs

    runs = find_runs(chosen.runs)
    with writing(chosen.out):
        size = collect(runs, chosen.out, every=chosen.every, most_bytes=chosen.most_bytes)
    print(f"{len(runs)} runs, {size:,} bytes: {chosen.out}")


@one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm scaling` and `python -m hpcm_scale.scaling`."""
    chosen = parser().parse_args(arguments)
    {"curves": curves, "fit": fit, "plan": plan, "publish": publish, "collect": collect}[chosen.command](chosen)


if __name__ == "__main__":
    main()
