"""Command `hpcm estimate`: memory, FLOPs and time of a run, without a GPU.

hpcm estimate model=1b engine=zero3 engine.world_size=8 --gpu H100 --mfu 0.4 --price 3
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import TYPE_CHECKING

from hpcm_scale.compute.hardware import LAUNCH_US, MFU, Links, links_of, peak_of_option
from hpcm_scale.config.checks import check
from hpcm_scale.config.schema import EngineConfig, Precision, Target
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.errors import Parser, UserError, entry_point
from hpcm_scale.limits import PROCESSES, UTILISATION, Range
from hpcm_scale.model.ladder import compose_sized

if TYPE_CHECKING:
    from hpcm_scale.training.estimate import Estimate


@entry_point
def main() -> None:
    """Entry point of `hpcm estimate`."""
    arguments = _parser().parse_intermixed_args()
    config = compose_sized(arguments.overrides)
    world_size = config.engine.world_size or 1
    check(config, world_size)
    if config.objective.target != Target.human:
        raise UserError(
            "estimate-target",
            "objective.target",
            "hpcm estimate supports only codecs without pre-editor and receivers; omit stage and objective.target",
        )
    from hpcm_scale.model import families

    families.check(config.model)

    peak = peak_of_option(arguments.gpu, config.engine.precision == Precision.bf16)
    from hpcm_scale.training.estimate import estimate

    spec = RunSpec.of(config, world_size)
    needs = estimate(spec, config.model, config.engine, config.optimizer, len(config.train.ema))
    _print(config.model.name, config.engine, spec, needs, peak, arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="hpcm estimate",
        description="Memory per GPU by kind, FLOPs of the run, communication, and time at a given utilisation. Takes "
        "the overrides of training, for example model=1b engine=zero3 engine.world_size=8.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="H100", help="accelerator (default: %(default)s)")
    parser.add_argument(
        "--mfu", type=UTILISATION.real, default=MFU, help="model FLOPs utilisation (default: %(default)s)"
    )
    parser.add_argument(
        "--launch-us",
        type=Range(least=0, most=10_000).real,
        metavar="US",
        default=LAUNCH_US,
        help="host time to launch one operation, in microseconds: an assumption, not measured; a step without "
        "engine.compile takes at least that of all its operations (default: %(default)s)",
    )
    bandwidth = Range(least=0.001, most=1_000_000).real
    parser.add_argument(
        "--bandwidth-node",
        type=bandwidth,
        metavar="GB/S",
        help="from one GPU to the others of its node, in one direction (default: its data sheet, 450 for H100 and "
        "H200, 300 for A100)",
    )
    parser.add_argument(
        "--bandwidth-network",
        type=bandwidth,
        metavar="GB/S",
        help="from a node to the others (default: that of a DGX node, 400 for H100 and H200, 200 for A100)",
    )
    parser.add_argument("--gpus-per-node", type=PROCESSES.whole, default=8, help="GPUs per node (default: %(default)s)")
    parser.add_argument(
        "--price",
        type=Range(above=0, most=1_000_000).real,
        metavar="AMOUNT",
        help="price of a GPU-hour, to print the price of the run",
    )
    return parser


def _bandwidth(arguments: Namespace, world_size: int) -> float | None:
    """Bytes/s of a GPU in a ring of all; None if neither an option nor a data sheet gives it."""
    known = links_of(arguments.gpu) or Links(math.nan, math.nan)
    node = known.node if arguments.bandwidth_node is None else 1e9 * arguments.bandwidth_node
    network = known.network if arguments.bandwidth_network is None else 1e9 * arguments.bandwidth_network
    bandwidth = Links(node, network).ring(world_size, arguments.gpus_per_node)
    return None if math.isnan(node) or math.isnan(bandwidth) else bandwidth


def _print(name: str, engine: EngineConfig, spec: RunSpec, needs: Estimate, peak: float, arguments: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from hpcm_scale.training.estimate import launch_seconds

    memory, world_size = needs.memory, spec.world_size
    stage = f"{engine.name.value} ZeRO {engine.zero_stage}" if engine.name.value == "deepspeed" else "accelerate"
    crops = ", then ".join(f"{phase.micro_batch_size} crops of {phase.crop}²" for phase in spec.phases)
    kind = engine.activation_checkpointing.value
    recomputed = "" if kind == "none" else f", activation checkpointing of {kind}"
    print(
        f"{name}: {needs.parameters:,} parameters; {stage}, {engine.precision.value}{recomputed}, "
        f"{world_size} × {arguments.gpu}; {crops} per GPU and micro-batch"
    )
    table = Table(title="memory per GPU", title_justify="left")
    table.add_column("kind")
    table.add_column("GB", justify="right")
    averages = ["averages"] if needs.averages else []
    for kind in ("weights", "gradients", "optimizer", *averages, "activations", "buffers"):
        table.add_row(kind, f"{getattr(memory, kind) / 1e9:,.2f}")
    table.add_section()
    table.add_row("total", f"{memory.device / 1e9:,.2f}")
    if memory.host:
        table.add_row("host memory", f"{memory.host / 1e9:,.2f}")
    Console().print(table)
    print("not included: fragmentation and temporary memory of kernels, 10 to 20 %")
    print(
        f"a checkpoint: {needs.checkpoint / 1e9:,.2f} GB; each process has a shard of "
        f"{needs.checkpoint / world_size / 1e9:,.2f} GB in host memory"
    )
    print(f"building the model: up to {needs.building / 1e9:,.2f} GB of weights in the host memory of each process")
    launch = launch_seconds(engine.compile, arguments.launch_us)
    hours = needs.seconds(peak * world_size, arguments.mfu, launch) / 3600
    print(
        f"{spec.steps:,} steps of {spec.batch}: {needs.images:,} images, "
        f"{needs.pflops:,.4g} PFLOPs (1e15 floating-point operations)"
    )
    computing = needs.flops_per_step / (peak * arguments.mfu)
    print(
        f"at {arguments.mfu:.0%} of {peak / 1e12:,.4g} TFLOP/s ({arguments.gpu}, {engine.precision.value}) a step "
        f"takes {1e3 * computing:,.4g} ms of compute"
    )
    print(_host_floor(needs, engine.compile, launch))
    print(f"the run: {_duration(hours, world_size, arguments.price)}")
    if world_size == 1:
        return
    communication = needs.communication
    print(
        f"each GPU sends {communication.gradients / 1e9:,.2f} GB of gradients and "
        f"{communication.weights / 1e9:,.2f} GB of weights per step"
        f"{f', and {communication.matrices / 1e9:,.2f} GB to update matrices' if communication.matrices else ''}"
    )
    bandwidth = _bandwidth(arguments, world_size)
    if bandwidth is None:
        print("for the communication time, give --bandwidth-node and, for several nodes, --bandwidth-network")
        return
    times = needs.times(peak, arguments.mfu, bandwidth, launch)
    print(
        f"a step: {times.compute * 1e3:,.4g} ms computing, {times.communication * 1e3:,.4g} ms communication at "
        f"{bandwidth / 1e9:,.4g} GB/s (without latencies); {times.sequential * 1e3:,.4g} ms in sequence, "
        f"{times.overlapped * 1e3:,.4g} ms overlapped: scaling efficiency {times.efficiency:.1%}"
    )
    print(f"with overlapped communication: {_duration(hours / times.efficiency, world_size, arguments.price)}")


def _host_floor(needs: Estimate, compiled: bool, launch: float) -> str:
    """The host time to launch the operations of a step."""
    if compiled:
        return (
            f"a compiled step launches fewer operations than the {needs.launches_per_step:,} of an eager one; their "
            "host time is unknown and not included"
        )
    return (
        f"the host launches {needs.launches_per_step:,} operations in {1e3 * needs.launches_per_step * launch:,.4g} ms "
        f"at {1e6 * launch:,.4g} µs each (--launch-us, not measured); a step takes the longer of the two"
    )


def _duration(hours: float, world_size: int, price: float | None) -> str:
    money = "" if price is None else f", {hours * world_size * price:,.0f} at {price:,g} per GPU-hour"
    return f"{hours:,.1f} hours, {hours * world_size / 24:,.1f} GPU-days{money}"
