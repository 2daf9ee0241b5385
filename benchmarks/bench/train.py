"""`hpcm bench train`: time, utilisation and activation memory of a training step, computed by several variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from bench.machine import MatmulRate, machine, matmul_rate, products
from bench.report import Report, Table, with_quartiles
from bench.step import REFERENCE, Step, Steps, Variant
from bench.timing import MEMORY_METHOD, Quartiles, alternate, peak_bytes, quartiles, ratio, seconds
from hpcm_scale.config.schema import Checkpointing, Config, Precision
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.training.costs import training_flops_per_image


@dataclass(frozen=True)
class Measured:
    """Measurements of one variant; None where it did not fit into the device's memory."""

    variant: Variant
    activations: int | None
    """Peak bytes of forward and backward, beyond weights, gradients, moments and images."""
    seconds: list[float] | None
    """Seconds of the whole step, per round."""
    loss: float | None


@dataclass(frozen=True)
class TrainingSpeed:
    """All measurements of one model size."""

    config: Config
    batch: int
    flops: int
    """Model FLOPs of one step."""
    parameters: int
    rates: dict[Precision, MatmulRate]
    baseline: Measured
    candidates: list[Measured]

    def faster(self, measured: Measured) -> Quartiles | None:
        """Speed relative to the baseline."""
        if not (self.baseline.seconds and measured.seconds):
            return None
        return ratio(self.baseline.seconds, measured.seconds)

    def utilisation(self, measured: Measured) -> Quartiles | None:
        """Model FLOP/s relative to large matrix products of this precision in the same round."""
        if not measured.seconds:
            return None
        rates = self.rates[measured.variant.precision].rates
        return quartiles([self.flops / (time * rate) for time, rate in zip(measured.seconds, rates, strict=True)])

    def smaller(self, measured: Measured) -> float | None:
        """Activations relative to the baseline's."""
        if self.baseline.activations is None or measured.activations is None:
            return None
        return measured.activations / self.baseline.activations

    @property
    def fastest(self) -> Measured | None:
        """The candidate with the smallest median time."""
        timed = [measured for measured in self.candidates if measured.seconds]
        return min(timed, key=lambda measured: median(measured.seconds), default=None)


def variants(precisions: Sequence[Precision], checkpoints: Sequence[Checkpointing], compiled: bool) -> list[Variant]:
    """The candidates: every precision, and the last one with recomputation, compiled, and both."""
    chosen = [Variant(precision) for precision in precisions]
    for checkpoint in checkpoints:
        chosen += [Variant(precisions[-1], checkpoint, compiles) for compiles in (False, True)[: 1 + compiled]]
    return list(dict.fromkeys(chosen))


def measure_steps(
    config: Config, batch: int, candidates: Sequence[Variant], rounds: int, steps: Steps
) -> TrainingSpeed:
    """Time the baseline, the candidates and large matrix products, alternating."""
    device = steps.device
    ready = {variant: _prepared(steps, variant) for variant in (REFERENCE, *candidates)}
    precisions = dict.fromkeys(variant.precision for variant in ready)
    factors = {precision: products(precision, device) for precision in precisions}
    programs: dict[str, Callable[[], Any]] = {
        f"{product.precision.value} {product.name}": product.run for pair in factors.values() for product in pair
    }
    programs |= {variant.name: step for variant, (step, _) in ready.items() if step}
    samples = alternate(programs, rounds, device, description="steps", warm_up=1)
    rates = {
        precision: matmul_rate([(product, samples[f"{precision.value} {product.name}"]) for product in pair])
        for precision, pair in factors.items()
    }

    def measured(variant: Variant) -> Measured:
        _, activations = ready[variant]
        ran = samples.get(variant.name)
        return Measured(variant, activations, ran and seconds(ran), ran and ran[-1].result.item())

    model = on_meta(config.model)
    return TrainingSpeed(
        config=config,
        batch=batch,
        flops=batch * training_flops_per_image(model, config.data.crop),
        parameters=parameter_count(model),
        rates=rates,
        baseline=measured(REFERENCE),
        candidates=[measured(variant) for variant in candidates],
    )


def _prepared(steps: Steps, variant: Variant) -> tuple[Step | None, int | None]:
    """The step after a warm-up, and the bytes of its activations; None for both if the device's memory is too small."""
    try:
        step = steps.of(variant)
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
                measured.variant.name,
                f"{median(measured.seconds):.3f}" if measured.seconds else "out of memory",
                with_quartiles(speed.faster(measured), 2, "×"),
                utilisation,
                "–" if measured.activations is None else f"{measured.activations / 1e9:.3f}",
                "–" if share is None else f"{share:.2f}",
            ]
        )
    rates = "; ".join(
        f"{precision.value} {median(rate.rates) / 1e9:,.0f} GFLOP/s ({rate.name})"
        for precision, rate in speed.rates.items()
    )
    rounds = len(next(iter(speed.rates.values())).rates)
    return Table(
        title="",
        headings=["step", "seconds", "times as fast", "utilisation", "activations (GB)", "relative to baseline"],
        rows=rows,
        notes=[
            f"Forward, loss, backward, gradient clipping and Adam: {speed.flops / 1e12:,.3f} TFLOP a step (model "
            "FLOPs: 2 per multiply-accumulate, backward counted as twice forward, recomputation not counted). "
            f"{rounds} alternating rounds after one warm-up; medians, in brackets the quartiles of the rounds' "
            "ratios.",
            "Times as fast: relative to the first line, in the same round.",
            f"Utilisation: model FLOP/s divided by the rate of large matrix products in the same round: {rates}.",
            "Activations: peak bytes of forward and backward beyond weights, gradients, moments and images; "
            f"{MEMORY_METHOD[device.type]}.",
        ],
    )


def _numbers(speed: TrainingSpeed) -> dict[str, Any]:
    def numbers(measured: Measured) -> dict[str, Any]:
        return {
            "name": measured.variant.name,
            "precision": measured.variant.precision.value,
            "checkpoint": measured.variant.checkpoint.value,
            "compiled": measured.variant.compiled,
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


def _as_dict(value: Quartiles | None) -> dict[str, float] | None:
    return value and value._asdict()
