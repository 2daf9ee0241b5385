"""The subcommands of `hpcm bench`: measure, print and write a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from bench.arguments import check, configuration, parser
from hpcm_scale.errors import entry_point

PROFILE = "train_profile.png"
DEMANDS = (("68m", 0.3), ("68m", 0.45), ("1b", 0.45))
"""Model sizes and GPU utilisations that the training stream should supply."""


def train(chosen) -> None:
    """`hpcm bench train`: training steps by several variants."""
    config = configuration(chosen.preset, chosen.crop)
    from bench.step import Steps
    from bench.train import measure_steps, training_report, variants
    from hpcm_scale.config.schema import Checkpointing, Precision

    device = _device(chosen)
    candidates = variants(
        [Precision(name) for name in chosen.precision],
        [Checkpointing(name) for name in chosen.checkpoint],
        chosen.compile,
    )
    steps = Steps(config, chosen.batch, device)
    speed = measure_steps(config, chosen.batch, candidates, chosen.rounds, steps)
    report = training_report(speed, device)
    _publish(_with_profile(report, steps, speed, chosen.out) if chosen.profile else report, chosen)


def _with_profile(report, steps, speed, folder):
    """The report with a figure, in `folder`, of the time by kind of operation for baseline and fastest candidate."""
    from bench.profiling import draw_profile, profiled
    from hpcm_scale.files import writing

    spent = {
        measured.variant.name: profiled(steps.of(measured.variant), steps.device, median(measured.seconds))
        for measured in (speed.baseline, speed.fastest)
        if measured and measured.seconds
    }
    with writing(folder):
        draw_profile(spent, folder / PROFILE, report.title)
    return replace(report, results=report.results | {"profile": spent}, figures=(PROFILE,))


def optimizer(chosen) -> None:
    """`hpcm bench optimizer`: steps of Adam, Muon and SOAP."""
    config = configuration(chosen.preset, chosen.crop)
    from bench.optimizer import measure_optimizers, optimizer_report
    from hpcm_scale.config.schema import Precision

    device = _device(chosen)
    speed = measure_optimizers(config, chosen.batches, Precision(chosen.precision), chosen.rounds, device)
    _publish(optimizer_report(speed, device), chosen)


def processes(chosen) -> None:
    """`hpcm bench processes`: two processes against one."""
    configuration(chosen.preset, chosen.crop)
    from bench.processes import measure_processes, processes_report

    measured = measure_processes(chosen.preset, chosen.batch, chosen.crop, chosen.rounds, chosen.engines)
    _publish(processes_report(chosen.preset, chosen.batch, chosen.crop, measured), chosen)


def data(chosen) -> None:
    """`hpcm bench data`: the training stream."""
    import tempfile
    from pathlib import Path

    from bench.data import data_report, demand, make_shards, measure_data, measure_waits
    from hpcm_scale.config.schema import DataConfig
    from hpcm_scale.data.processes import available_cores

    workers = chosen.workers or available_cores()
    demands = [demand(configuration(preset, chosen.crop).model, chosen.crop, share) for preset, share in DEMANDS]
    with tempfile.TemporaryDirectory() as folder:
        source = f"images of {Path(chosen.shards).resolve().name}" if chosen.shards else "synthetic images"
        shards = chosen.shards or make_shards(Path(folder))
        config = DataConfig(shards=str(shards), crop=chosen.crop, workers=workers)
        speed = measure_data(config, chosen.batch, chosen.batches, chosen.rounds)
        step = chosen.batch / (demands[0].share(speed) * workers * speed.crops_per_worker)
        waits = measure_waits(config, chosen.batch, step, steps=4 * chosen.batches * workers)
    _publish(data_report(speed, demands, waits, source), chosen)


def codec(chosen) -> None:
    """`hpcm bench codec`: encoding and decoding."""
    import torch

    from bench.codec import codec_report, measure_codec, synthetic_image
    from hpcm_scale.data.sources import ImageSet
    from hpcm_scale.model.hpcm import HPCM
    from hpcm_scale.model.weights import load_weights

    if chosen.images:
        found = ImageSet(chosen.images, chosen.limit)
        images = [(name, lambda index=index: found.load(index)) for index, name in enumerate(found.names)]
        source = f"images of {found.folder.resolve().name}"
    else:
        images, source = [("synthetic", synthetic_image)], "a synthetic image"
    device = _device(chosen)
    torch.manual_seed(0)
    if chosen.weights:
        model = load_weights(chosen.weights)[0]
    else:
        model = HPCM(configuration(chosen.preset).model).eval()
        source += ", untrained weights, which give more bits than trained ones"
    _publish(codec_report(model, measure_codec(model, images, chosen.rounds, device), source, device), chosen)


def entropy(chosen) -> None:
    """`hpcm bench entropy`: the range coder and the likelihood."""
    from bench.entropy import entropy_report, measure_likelihood, measure_range_coder

    device = _device(chosen)
    groupings = measure_range_coder(chosen.symbols, chosen.rounds)
    likelihood = measure_likelihood(chosen.elements, chosen.rounds, device, compiled=chosen.compile)
    _publish(entropy_report(groupings, likelihood, device), chosen)


def _device(chosen):
    """The device to measure on, with exact fp32 arithmetic."""
    from hpcm_scale.config.schema import Precision
    from hpcm_scale.model.layers import set_arithmetic
    from hpcm_scale.model.weights import device_of

    set_arithmetic(Precision.fp32)
    return device_of(chosen.device)


def _publish(report, chosen) -> None:
    """Print the report, and write it to --out."""
    from bench.report import publish

    publish(report, chosen.out)


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm bench` and `python -m bench.command`."""
    chosen = parser().parse_args(arguments)
    check(chosen)
    commands = (train, optimizer, processes, data, codec, entropy)
    {command.__name__: command for command in commands}[chosen.command](chosen)


if __name__ == "__main__":
    main()
