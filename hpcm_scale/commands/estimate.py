"""Command: what a run will need, without a GPU.

hpcm estimate model=1b engine=zero3 engine.world_size=8 --gpu H100 --mfu 0.4 --price 3
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import TYPE_CHECKING

from hpcm_scale.compute.hardware import LAUNCH_US, MFU, Links, links_of, peak_of
from hpcm_scale.config.checks import check, micro_batch_size
from hpcm_scale.config.compose import compose
from hpcm_scale.config.phases import described, phases
from hpcm_scale.config.schema import Config, Precision, Target
from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.limits import PROCESSES, UTILISATION, Range
from hpcm_scale.model.ladder import sized

if TYPE_CHECKING:
    from hpcm_scale.training.estimate import Estimate


@one_line
def main() -> None:
    """Entry point of `hpcm estimate` and `python -m hpcm_scale.commands.estimate`."""
    arguments = _parser().parse_intermixed_args()
    config = compose(arguments.overrides, sized)
    world_size = config.engine.world_size or 1
    check(config, world_size)
    if config.objective.target != Target.human:
        raise UserError(
            "hpcm estimate counts codecs alone, without pre-editor and receivers; leave out stage and objective.target"
        )
    from hpcm_scale.model import families

    families.check(config.model)

    peak = peak_of(arguments.gpu, config.engine.precision == Precision.bf16)
    if peak is None:
        raise UserError(
            f"the peak rate of --gpu {arguments.gpu} is not known; name another, for example A100, H100 or "
            "'H100 PCIe', or add it to hpcm_scale/compute/hardware.py"
        )
    _print(config, world_size, peak, _bandwidth(arguments, world_size), arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="hpcm estimate",
        description="Memory per GPU by kind, FLOPs of the run, communication, and time at a stated utilisation. Takes "
        "the same overrides as training, for example model=1b engine=zero3 engine.world_size=8.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="H100", help="whose peak rate to take (default: %(default)s)")
    parser.add_argument("--mfu", type=UTILISATION.real, default=MFU, help="share of it in use (default: %(default)s)")
    parser.add_argument(
        "--launch-us",
        type=Range(least=0, most=10_000).real,
        metavar="US",
        default=LAUNCH_US,
        help="time that the host takes to launch one operation, in microseconds: an assumption, not measured; a step "
        "without engine.compile takes no less than that of all its operations (default: %(default)s)",
    )
    bandwidth = Range(least=0.001, most=1_000_000).real
    parser.add_argument(
        "--bandwidth-node",
        type=bandwidth,
        metavar="GB/S",
        help="of one GPU to the others of its machine, in one direction (default: of its data sheet: 450 for H100 and "
        "H200, 300 for A100)",
    )
    parser.add_argument(
        "--bandwidth-network",
        type=bandwidth,
        metavar="GB/S",
        help="of a whole machine to the others (default: of its maker's machine: 400 for H100 and H200, 200 for A100)",
    )
    parser.add_argument(
        "--gpus-per-node", type=PROCESSES.whole, default=8, help="of one machine (default: %(default)s)"
    )
    parser.add_argument(
        "--price",
        type=Range(above=0, most=1_000_000).real,
        metavar="AMOUNT",
        help="of a GPU-hour, to have the run's printed",
    )
    return parser


def _bandwidth(arguments: Namespace, world_size: int) -> float | None:
    """Bytes/s of a GPU in a ring through all; None where neither an option nor a data sheet tells."""
    known = links_of(arguments.gpu) or Links(math.nan, math.nan)
    node = known.node if arguments.bandwidth_node is None else 1e9 * arguments.bandwidth_node
    network = known.network if arguments.bandwidth_network is None else 1e9 * arguments.bandwidth_network
    bandwidth = Links(node, network).ring(world_size, arguments.gpus_per_node)
    return None if math.isnan(node) or math.isnan(bandwidth) else bandwidth


def _print(config: Config, world_size: int, peak: float, bandwidth: float | None, arguments: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from hpcm_scale.training.estimate import estimate, launch_seconds

    needs = estimate(config, world_size)
    memory, engine = needs.memory, config.engine
    stage = f"{engine.name.value} ZeRO {engine.zero_stage}" if engine.name.value == "deepspeed" else "accelerate"
    crops = ", then ".join(
        f"{micro_batch_size(config, world_size, phase)} crops of {phase.crop}²" for phase in phases(config)
    )
    again = (
        ""
        if engine.activation_checkpointing.value == "none"
        else f", {engine.activation_checkpointing.value} computed again"
    )
    print(
        f"{config.model.name}: {needs.parameters:,} parameters; {stage}, {engine.precision.value}{again}, "
        f"{world_size} × {arguments.gpu}; {crops} per GPU at a time"
    )
    table = Table(title="memory per GPU", title_justify="left")
    table.add_column("kind")
    table.add_column("GB", justify="right")
    averages = ["averages"] if config.train.ema else []
    for kind in ("weights", "gradients", "optimizer", *averages, "activations", "buffers"):
        table.add_row(kind, f"{getattr(memory, kind) / 1e9:,.2f}")
    table.add_section()
    table.add_row("in all", f"{memory.device / 1e9:,.2f}")
    if memory.host:
        table.add_row("in host memory", f"{memory.host / 1e9:,.2f}")
    Console().print(table)
    print("fragmentation and temporary memory of kernels come on top: 10 to 20 %")
    print(
        f"a checkpoint: {needs.checkpoint / 1e9:,.2f} GB, of which each process keeps its "
        f"{needs.checkpoint / world_size / 1e9:,.2f} GB in host memory"
    )
    print(f"while the model is made, each process holds up to {needs.building / 1e9:,.2f} GB of weights in host memory")
    launch = launch_seconds(config, arguments.launch_us)
    hours = needs.seconds(peak * world_size, arguments.mfu, launch) / 3600
    print(
        f"{config.train.steps:,} steps of {described(config)}: {needs.images:,} images, "
        f"{needs.pflops:,.4g} PFLOPs (1e15 floating-point operations)"
    )
    computing = needs.flops_per_step / (peak * arguments.mfu)
    print(
        f"at {arguments.mfu:.0%} of {peak / 1e12:,.4g} TFLOP/s ({arguments.gpu}, {engine.precision.value}) a step "
        f"computes for {1e3 * computing:,.4g} ms"
    )
    print(_host_floor(needs, config, launch))
    print(f"the run: {_duration(hours, world_size, arguments.price)}")
    if world_size == 1:
        return
    traffic = needs.traffic
    print(
        f"each GPU sends {traffic.gradients / 1e9:,.2f} GB of gradients and {traffic.weights / 1e9:,.2f} GB of weights "
        "per step"
    )
    if bandwidth is None:
        print("for its time, give --bandwidth-node and, for several machines, --bandwidth-network")
        return
    times = needs.times(peak, arguments.mfu, bandwidth, launch)
    print(
        f"a step: {times.compute * 1e3:,.4g} ms computing, {times.communication * 1e3:,.4g} ms communication at "
        f"{bandwidth / 1e9:,.4g} GB/s (latencies left out); {times.in_turn * 1e3:,.4g} ms in turn, "
        f"{times.overlapped * 1e3:,.4g} ms overlapped: scaling efficiency {times.efficiency:.1%}"
    )
    print(f"with overlapped communication: {_duration(hours / times.efficiency, world_size, arguments.price)}")


def _host_floor(needs: Estimate, config: Config, launch: float) -> str:
    """What the host takes to launch a step's operations."""
    if config.engine.compile:
        return (
            f"compiled, a step launches fewer operations than the {needs.launches_per_step:,} of an eager one; how "
            "many is not known, and the host's time for them is left out"
        )
    return (
        f"the host launches {needs.launches_per_step:,} operations in {1e3 * needs.launches_per_step * launch:,.4g} ms "
        f"at {1e6 * launch:,.4g} µs each (--launch-us, not measured); the longer of the two counts"
    )


def _duration(hours: float, world_size: int, price: float | None) -> str:
    money = "" if price is None else f", {hours * world_size * price:,.0f} at {price:,g} per GPU-hour"
    return f"{hours:,.1f} hours, {hours * world_size / 24:,.1f} GPU-days{money}"


if __name__ == "__main__":
    main()
