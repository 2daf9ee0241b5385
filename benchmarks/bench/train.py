"""`hpcm bench train`: how fast a training step is in several ways, how near to the device's own rate, and how large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.machine import MatmulRate, machine, matmul_rate, products
from bench.report import Report, Table, with_quartiles
from bench.step import PLAIN, Step, Steps, Way
from bench.timing import HOW, peak_bytes
from hpcm_scale.config.schema import Checkpointing, Config, Precision
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.tracking.timing import Spread, alternate, ratio, seconds, spread
from hpcm_scale.training.costs import training_flops_per_image


@dataclass(frozen=True)
class Measured:
    """One way to compute the step; None where it did not fit into the device's memory."""

    way: Way
    activations: int | None
    """Bytes at the peak of forward and backward, beyond weights, gradients, moments and images."""
    seconds: list[float] | None
    """Of the whole step in each round."""
    loss: float | None


@dataclass(frozen=True)
class TrainingSpeed:
    """Everything measured of the steps of one size."""

    config: Config
    batch: int
    flops: int
    """Model FLOPs of one step."""
    parameters: int
    rates: dict[Precision, MatmulRate]
    baseline: Measured
    candidates: list[Measured]

    def faster(self, measured: Measured) -> Spread | None:
        """How many times as fast as the baseline."""
        if not (self.baseline.seconds and measured.seconds):
            return None
        return ratio(self.baseline.seconds, measured.seconds)

    def utilisation(self, measured: Measured) -> Spread | None:
        """Model FLOPs by what large matrix products in this precision do in the same round."""
        if not measured.seconds:
            return None
        rates = self.rates[measured.way.precision].rates
        return spread([self.flops / (time * rate) for time, rate in zip(measured.seconds, rates, strict=True)])

    def smaller(self, measured: Measured) -> float | None:
        """Its activations as a share of the baseline's."""
        if self.baseline.activations is None or measured.activations is None:
            return None
        return measured.activations / self.baseline.activations

    @property
    def fastest(self) -> Measured | None:
        """The candidate with the least median time."""
        timed = [measured for measured in self.candidates if measured.seconds]
        return min(timed, key=lambda measured: spread(measured.seconds).median, default=None)


def ways(precisions: Sequence[Precision], checkpoints: Sequence[Checkpointing], compiled: bool) -> list[Way]:
    """The candidates: every precision as it is; the last one recomputing, compiled, and both."""
    chosen = [Way(precision) for precision in precisions]
    for checkpoint in checkpoints:
        chosen += [Way(precisions[-1], checkpoint, compiles) for compiles in ((False, True) if compiled else (False,))]
    return list(dict.fromkeys(chosen))


def measure_steps(config: Config, batch: int, candidates: Sequence[Way], rounds: int, steps: Steps) -> TrainingSpeed:
    """Time the baseline, the candidates and large matrix products in turns."""
    device = steps.device
    ready = {way: _prepared(steps, way) for way in (PLAIN, *candidates)}
    factors = {precision: products(precision, device) for precision in dict.fromkeys(way.precision for way in ready)}
    contestants: dict[str, Callable[[], Any]] = {
        f"{product.precision.value} {product.name}": product.run for pair in factors.values() for product in pair
    }
    contestants |= {way.name: step for way, (step, _) in ready.items() if step}
    turns = alternate(contestants, rounds, device, description="steps", warm_up=1)
    rates = {
        precision: matmul_rate([(product, turns[f"{precision.value} {product.name}"]) for product in pair])
        for precision, pair in factors.items()
    }

    def measured(way: Way) -> Measured:
        _, activations = ready[way]
        ran = turns.get(way.name)
        return Measured(way, activations, ran and seconds(ran), ran and ran[-1].result.item())

    model = on_meta(config.model)
    return TrainingSpeed(
        config=config,
        batch=batch,
        flops=batch * training_flops_per_image(model, config.data.crop),
        parameters=parameter_count(model),
        rates=rates,
        baseline=measured(PLAIN),
        candidates=[measured(way) for way in candidates],
    )


def _prepared(steps: Steps, way: Way) -> tuple[Step | None, int | None]:
    """The step, run once, and the bytes of its activations; None for both where the device has no room for it."""
    try:
        step = steps.of(way)
        step()
        steps.make_gradients()
        activations = peak_bytes(step.gradients, steps.device)
    except torch.OutOfMemoryError:
        step = activations = None
        torch.cuda.empty_cache()
    steps.drop_gradients()
    return step, activations


def training_report(speed: TrainingSpeed, device: torch.device) -> Report:
    """Tables and numbers of `hpcm bench train`."""
    side, name = speed.config.data.crop, speed.config.model.name
    crops = f"{speed.batch} crop{'s' * (speed.batch > 1)} of {side}²"
    return Report(
        name="train",
        title=f"A training step of {name}: {crops}",
        machine=machine(device),
        tables=[_step_table(speed, device)],
        results=_numbers(speed),
    )


def _step_table(speed: TrainingSpeed, device: torch.device) -> Table:
    rows = []
    for measured in (speed.baseline, *speed.candidates):
        share = speed.smaller(measured)
        utilisation = with_quartiles(speed.utilisation(measured), 1, " %", 100)
        rows.append(
            [
                measured.way.name,
                f"{spread(measured.seconds).median:.3f}" if measured.seconds else "does not fit",
                with_quartiles(speed.faster(measured), 2, "×"),
                utilisation,
                "–" if measured.activations is None else f"{measured.activations / 1e9:.3f}",
                "–" if share is None else f"{share:.2f}",
            ]
        )
    rates = "; ".join(
        f"{precision.value} {spread(rate.rates).median / 1e9:,.0f} GFLOP/s ({rate.name})"
        for precision, rate in speed.rates.items()
    )
    rounds = len(next(iter(speed.rates.values())).rates)
    return Table(
        title="",
        headings=["step", "seconds", "times as fast", "utilisation", "activations (GB)", "of the baseline's"],
        rows=rows,
        notes=[
            f"Forward, loss, backward, gradient clipping and Adam: {speed.flops / 1e12:,.3f} TFLOP a step (model "
            "FLOPs: 2 per multiply-accumulate, backward taken as twice forward, recomputation not counted). "
            f"{rounds} rounds in turns after one to warm up; medians, and in brackets the quartiles of the rounds' "
            "ratios.",
            "Times as fast: as the first line, in the same round.",
            f"Utilisation: model FLOPs by time and by the rate of large matrix products in the same round: {rates}.",
            "Activations: most bytes at a time during forward and backward beyond weights, gradients, moments and "
            f"images; {HOW[device.type]}.",
        ],
    )


def _numbers(speed: TrainingSpeed) -> dict[str, Any]:
    def numbers(measured: Measured) -> dict[str, Any]:
        return {
            "name": measured.way.name,
            "precision": measured.way.precision.value,
            "checkpoint": measured.way.checkpoint.value,
            "compiled": measured.way.compiled,
            "seconds": measured.seconds,
            "times_as_fast": _as_dict(speed.faster(measured)),
            "utilisation": _as_dict(speed.utilisation(measured)),
            "activation_bytes": measured.activations,
            "activations_of_baseline": speed.smaller(measured),
            "loss": measured.loss,
        }

    return {
        "model": speed.config.model.name,
        "parameters": speed.parameters,
        "crop": speed.config.data.crop,
        "batch": speed.batch,
        "step_flops": speed.flops,
        "matmul": {precision.value: rate._asdict() for precision, rate in speed.rates.items()},
        "baseline": numbers(speed.baseline),
        "candidates": [numbers(measured) for measured in speed.candidates],
    }


def _as_dict(value: Spread | None) -> dict[str, float] | None:
    return value and value._asdict()
