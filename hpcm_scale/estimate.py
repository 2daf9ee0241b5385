"""Command: what a run will need, without a GPU.

hpcm estimate model=1b engine=zero3 engine.world_size=8 --gpu H100 --mfu 0.4
"""

from __future__ import annotations

from hpcm_scale.config.checks import check, micro_batch_size
from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Config, Precision
from hpcm_scale.errors import Parser, UserError, one_line


@one_line
def main() -> None:
    """Entry point of `hpcm estimate` and `python -m hpcm_scale.estimate`."""
    parser = Parser(
        prog="hpcm estimate",
        description="Memory per GPU by kind, FLOPs of the run, and its time at a stated utilisation. Takes the "
        "same overrides as training, for example model=1b engine=zero3 engine.world_size=8.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="H100", help="whose peak rate to take (default: %(default)s)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of it in use (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    config = compose(arguments.overrides)
    world_size = config.engine.world_size or 1
    check(config, world_size)
    from hpcm_scale.compute.hardware import peak_of  # after the arguments: torch takes seconds to import

    peak = peak_of(arguments.gpu, config.engine.precision == Precision.bf16)
    if peak is None:
        raise UserError(
            f"the peak rate of --gpu {arguments.gpu} is not known; name another, for example A100, H100 or "
            "'H100 PCIe', or add it to hpcm_scale/compute/hardware.py"
        )
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu} must lie between 0 and 1")
    _print(config, world_size, arguments.gpu, peak, arguments.mfu)


def _print(config: Config, world_size: int, gpu: str, peak: float, mfu: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from hpcm_scale.training.estimate import estimate

    needs = estimate(config, world_size)
    memory, engine = needs.memory, config.engine
    stage = f"{engine.name.value} ZeRO {engine.zero_stage}" if engine.name.value == "deepspeed" else "accelerate"
    print(
        f"{config.model.name}: {needs.parameters:,} parameters; {stage}, {engine.precision.value}, "
        f"{world_size} × {gpu}; {micro_batch_size(config, world_size)} crops of {config.data.crop}² per GPU at a time"
    )
    table = Table(title="memory per GPU", title_justify="left")
    table.add_column("kind")
    table.add_column("GB", justify="right")
    for kind in ("weights", "gradients", "optimizer", "activations", "buffers"):
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
    hours = needs.seconds(peak * world_size, mfu) / 3600
    print(
        f"{config.train.steps:,} steps of {config.train.batch_size} images: {needs.images:,} images, "
        f"{needs.pflops:,.4g} PFLOPs (1e15 floating-point operations)"
    )
    print(
        f"at {mfu:.0%} of {peak / 1e12:,.4g} TFLOP/s ({gpu}, {engine.precision.value}): {hours:,.1f} hours, "
        f"{hours * world_size / 24:,.1f} GPU-days"
    )


if __name__ == "__main__":
    main()
