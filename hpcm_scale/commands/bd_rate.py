"""`hpcm bd-rate`: BD-rates of evaluations, of points that others measured and of published curves."""

from __future__ import annotations

from difflib import get_close_matches

from hpcm_scale.errors import Parser, UserError, entry_point
from hpcm_scale.formatting import terminal, terminal_table


@entry_point
def main() -> None:
    """Entry point of `hpcm bd-rate`."""
    parser = Parser(
        prog="hpcm bd-rate",
        description="The difference in bits of a codec and an anchor at equal quality, in percent: log rate over "
        "quality, interpolated by pchip, averaged over the range that both share.",
    )
    parser.add_argument(
        "result",
        nargs="?",
        metavar="RESULT",
        help="a result of hpcm evaluate, a shipped curve, or a file of points: CompressAI's JSON, or a CSV file with "
        "columns bpp, psnr, ms-ssim (fractions, or dB if above 1)",
    )
    parser.add_argument("--anchor", metavar="ANCHOR", help="a shipped curve (kodak/vtm-18), or another RESULT")
    parser.add_argument("--metric", choices=("psnr", "ms-ssim"), default="psnr", help="default: %(default)s")
    parser.add_argument("--curve", metavar="NAME", help="only this curve of RESULT; default: all of them")
    parser.add_argument("--anchor-curve", metavar="NAME", help="the curve of ANCHOR, if it has several")
    parser.add_argument("--list", action="store_true", help="print the shipped curves and their sources")
    arguments = parser.parse_args()
    if not arguments.list and not (arguments.result and arguments.anchor):
        raise UserError(
            "no-anchor",
            "--anchor",
            "RESULT or --anchor is missing; give both (for example --anchor kodak/vtm-18), or list the shipped "
            "anchors with --list",
        )

    from hpcm_scale.evaluation.bd_rate import compare
    from hpcm_scale.evaluation.points import find_curves, shipped

    if arguments.list:
        _print_shipped(shipped().values())
        return
    curves = _chosen(find_curves(arguments.result), arguments.curve, arguments.result)
    anchors = _chosen(find_curves(arguments.anchor), arguments.anchor_curve, arguments.anchor)
    if len(anchors) > 1:
        names = ", ".join(curve.label for curve in anchors)
        raise UserError(
            "several-anchors",
            "--anchor-curve",
            f"{arguments.anchor} has several curves; choose one with --anchor-curve: {names}",
        )
    anchor = anchors[0]
    compared, refused = [], []
    for curve in curves:
        if curve == anchor and len(curves) > 1:
            continue  # the anchor itself
        try:
            compared.append((curve, compare(curve, anchor, arguments.metric)))
        except UserError as error:
            refused.append(error)
    if not compared:
        raise refused[0]
    _print_comparisons(compared, refused, anchor, arguments.metric)


def _chosen(curves: list, name: str | None, place: str) -> list:
    """The curves of that name or label, or all of them."""
    chosen = [curve for curve in curves if name in (None, curve.name, curve.label)]
    if not chosen:
        names = ", ".join(curve.label for curve in curves)
        near = get_close_matches(name or "", [curve.label for curve in curves], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if not curves:
            raise UserError("result-without-curves", "", f"{place} has no curves; evaluate some weights first")
        raise UserError("unknown-curve-of-result", "", f"{place} has no curve {name}; it has {names}{hint}")
    return chosen


def _print_comparisons(compared: list, refused: list, anchor, metric: str) -> None:
    from hpcm_scale.evaluation.bd_rate import METRICS, same_images
    from hpcm_scale.evaluation.points import GIVEN, stated

    console, rows = terminal(), []
    for curve, found in compared:
        shared = (f"{found.low:.2f}–{found.high:.2f}", f"{found.share_of_curve:.0%}", f"{found.share_of_anchor:.0%}")
        rows.append([curve.label, curve.rate, *shared, f"{found.bd_rate:+.2f}%"])
    table = terminal_table(["curve", "rate", "shared dB", "of curve", "of anchor", "BD-rate"], rows, words=2)
    console.print(f"BD-rate by {METRICS[metric].name} against {anchor.label} ({anchor.codec}; rate {anchor.rate})")
    console.print(table)
    console.print("Negative: fewer bits than the anchor at equal quality, over the range that both curves share.")
    for error in refused:
        console.print(f"Left out: {error}.")
    curve = compared[0][0]
    checked = same_images(curve, anchor)
    if unknown := [each.label for each in (curve, anchor) if each.rate == GIVEN]:
        console.print(f"Unknown image set: {' and '.join(unknown)}; compare only rates on the same images.")
    elif not checked:
        unnamed = next(each for each in (curve, anchor) if each.set is None)
        console.print(f"The image set was not checked: {unnamed.label} has none (use hpcm evaluate --set).")
    if checked and metric == "psnr" and anchor.recommended:
        papers = ", ".join(f"{each.codec} {each.bd_rate[anchor.set]:+.2f}%" for each in stated())
        console.print(f"The papers report, on {anchor.set} against {stated()[0].against}: {papers}.")
    console.print(f"Anchor from {anchor.source}.", soft_wrap=True)


def _print_shipped(curves) -> None:
    for curve in curves:
        name = f"{curve.name} *" if curve.recommended else curve.name
        measures = "PSNR and MS-SSIM" if curve.ms_ssim else "PSNR"
        reached = f"{len(curve.bpp)} points of {measures}, {min(curve.psnr):.2f}–{max(curve.psnr):.2f} dB"
        print(f"{name:30s} {reached}\n    {curve.codec}; {curve.source}")
    print("* the usual anchor of its image set, against which BD-rates agree with those in papers against VTM-22.0")
