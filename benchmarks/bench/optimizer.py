"""`hpcm bench optimizer`: time of Adam's, Muon's and SOAP's steps, and of whole training steps, by number of crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from bench.machine import arithmetic, machine
from bench.report import Report, Table, with_quartiles
from bench.step import Steps, Variant
from bench.timing import Quartiles, alternate, ratio, seconds
from hpcm_scale.config.schema import Config, OptimizerName, Precision
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.training.costs import optimizer_flops, training_flops_per_image


@dataclass(frozen=True)
class OptimizerSpeed:
    """Seconds per round."""

    config: Config
    precision: Precision
    gradients: dict[int, list[float]]
    """Forward and backward pass, by number of crops."""
    updates: dict[OptimizerName, list[float]]
    """Clipping and optimizer step: the mean of `optimizer.basis_every` steps, one of which updates SOAP's bases."""
    flops: dict[OptimizerName, int]
    """Of an optimizer step."""

    def update(self, name: OptimizerName) -> Quartiles:
        """Clipping and step, relative to Adam's."""
        return ratio(self.updates[name], self.updates[OptimizerName.adam])

    def step(self, name: OptimizerName, crops: int) -> Quartiles:
        """The whole step, relative to that with Adam."""
        ours, adam = (
            [first + second for first, second in zip(self.gradients[crops], self.updates[which], strict=True)]
            for which in (name, OptimizerName.adam)
        )
        return ratio(ours, adam)


def measure_optimizers(
    config: Config, batches: Sequence[int], precision: Precision, rounds: int, device: torch.device
) -> OptimizerSpeed:
    """Time forward and backward passes over each of the `batches`, and the steps of all optimizers, alternating."""
    chosen = {name: replace(config, optimizer=replace(config.optimizer, name=name)) for name in OptimizerName}
    of_optimizer = {name: Steps(each, max(batches), device) for name, each in chosen.items()}
    first = of_optimizer[OptimizerName.adam]
    images, programs = first.images, {}
    for crops in batches:
        first.images = images[:crops]
        programs[str(crops)] = first.of(Variant(precision)).gradients
    for name, steps in of_optimizer.items():
        steps.of(Variant(precision)).gradients()
        programs[name.value] = _updates(steps, precision, config.optimizer.basis_every)
    samples = alternate(programs, rounds, device, description="optimizers")
    count, model = config.optimizer.basis_every, on_meta(config.model)
    return OptimizerSpeed(
        config=config,
        precision=precision,
        gradients={crops: seconds(samples[str(crops)]) for crops in batches},
        updates={name: [time / count for time in seconds(samples[name.value])] for name in OptimizerName},
        flops={name: optimizer_flops(model, each.optimizer) for name, each in chosen.items()},
    )


def _updates(steps: Steps, precision: Precision, count: int) -> Callable[[], None]:
    def update() -> None:
        with arithmetic(precision):
            for _ in range(count):
                steps.optimize(drop=False)

    return update


def optimizer_report(speed: OptimizerSpeed, device: torch.device) -> Report:
    """Tables and numbers of `hpcm bench optimizer`."""
    config, batches = speed.config, list(speed.gradients)
    of_image = training_flops_per_image(on_meta(config.model), config.data.crop)
    rows = [
        [
            name.value,
            f"{median(speed.updates[name]):.4f}",
            with_quartiles(speed.update(name), 2, "×"),
            *(with_quartiles(speed.step(name, crops), 3, "×") for crops in batches),
            *(f"{speed.flops[name] / (crops * of_image):.1%}" for crops in batches),
        ]
        for name in OptimizerName
    ]
    rounds = len(speed.updates[OptimizerName.adam])
    times = ", ".join(f"{median(each):.3f} s with {crops}" for crops, each in speed.gradients.items())
    return Report(
        name="optimizer",
        title=f"Optimizers of {config.model.name}: crops of {config.data.crop}², {speed.precision.value}",
        machine=machine(device),
        tables=[
            Table(
                title="",
                headings=[
                    *("optimizer", "seconds", "relative to Adam"),
                    *(f"step of {crops}" for crops in batches),
                    *(f"FLOPs, {crops}" for crops in batches),
                ],
                rows=rows,
                notes=[
                    f"Seconds: gradient clipping and optimizer step, mean of {config.optimizer.basis_every} steps, one "
                    "of which updates SOAP's eigenbases. Steps: forward, backward and that, relative to Adam, by "
                    f"number of crops. {rounds} alternating rounds after one warm-up; medians, in brackets the "
                    "quartiles of the rounds' ratios.",
                    f"Forward and backward: {times} crops. FLOPs: products of matrices in the optimizer step, relative "
                    "to forward and backward.",
                ],
            )
        ],
        results=_numbers(speed),
    )


def _numbers(speed: OptimizerSpeed) -> dict[str, Any]:
    return {
        "model": speed.config.model.name,
        "crop": speed.config.data.crop,
        "precision": speed.precision.value,
        "gradients": {str(crops): times for crops, times in speed.gradients.items()},
        "optimizers": {
            name.value: {
                "seconds": speed.updates[name],
                "flops": speed.flops[name],
                "update": speed.update(name)._asdict(),
                "step": {str(crops): speed.step(name, crops)._asdict() for crops in speed.gradients},
            }
            for name in OptimizerName
        },
    }
