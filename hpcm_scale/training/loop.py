"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from hpcm_scale.compute.tracker import ComputeTracker
from hpcm_scale.config.schema import EvalConfig, LogConfig, OnDivergence, ScheduleConfig, TrainConfig
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.data.stream import Batch
from hpcm_scale.errors import Fault, UserError
from hpcm_scale.training.checkpoints import FailedSave, Saver
from hpcm_scale.training.diagnostics import StepContext, out_of_reach, profiling
from hpcm_scale.training.divergence import Diverged, LossHistory
from hpcm_scale.training.ema import EMA
from hpcm_scale.training.engines.base import CollectiveError, Engine
from hpcm_scale.training.optimizer import learning_rate
from hpcm_scale.training.recorder import CorruptImages, Meter, Recorder, StepMetrics
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.signals import StopRequest, collecting_between_steps
from hpcm_scale.training.task import Task


@dataclass
class Trainer:
    """One run in one process: `train` goes from `step` to the last step, or to a stop request."""

    train_config: TrainConfig
    schedule: ScheduleConfig
    spec: RunSpec
    log_config: LogConfig
    eval_config: EvalConfig
    max_corrupt_samples: int
    engine: Engine
    task: Task
    folder: RunFolder
    recorder: Recorder
    tracker: ComputeTracker
    images: ImageSet | None
    """For evaluations."""
    data_digest: str
    images_in_set: int
    """Number of training images."""
    stop: StopRequest
    saver: Saver
    averages: EMA
    alive: Callable[[int | None], None]
    """Called whenever there is progress; with the step, or None within an evaluation."""
    rollbacks: int = 0
    step: int = 0
    skipped_in_a_row: int = 0
    upscaled: int = 0
    """Images smaller than the crop so far."""
    failed_checkpoints: int = 0
    failed_evaluations: int = 0
    failed_in_a_row: int = 0
    """Of the newest evaluations."""
    unevaluated: bool = False
    """Whether the evaluation of the current step is due and not done."""
    meter: Meter = field(default_factory=Meter)
    log_meter: Meter = field(default_factory=Meter)
    """Of the steps since the last progress line."""
    losses: LossHistory = field(default_factory=LossHistory)
    corrupt: CorruptImages = field(default_factory=CorruptImages)
    stopped: bool = False
    """Whether training stopped on a request."""
    _batches: list[Batch] = field(default_factory=list)
    """The micro-batches of the next step, fetched one step early, so that all processes fail together."""
    _data_error: UserError | None = None
    """Why they could not be fetched."""
    _evaluation: float | None = None
    """Evaluation loss of the current step."""
    _began: tuple[int, float] = (0, 0.0)
    """Step and seconds of training at the start of this command."""
    _saved: int | None = None
    """Step of the newest checkpoint that was started or loaded."""

    def train(self, stream: Iterator[Batch]) -> None:
        """Train on the stream; writes a checkpoint of the last step.

        Raises UserError, the same on all processes, if the run cannot continue, and Diverged for a rollback.
        """
        last_step = self.train_config.stop_after or self.train_config.steps
        self.alive(self.step)
        self._began = self.step, self.tracker.seconds
        if self.unevaluated and self.images:  # it was interrupted
            self.evaluate(last_step)
        if self.step < last_step:
            self.fetch(stream)
            self.count_corrupt()
            self.raise_data_error()
        profiled = self.train_config.profile_steps if self.engine.rank == 0 else []
        if missed := out_of_reach(profiled, self.step, last_step):
            self.recorder.print(missed)
        with (
            collecting_between_steps() as collect,
            profiling(profiled, self.engine.device, self.folder.profile, self.report_profile) as in_profile,
        ):
            self.train_to(last_step, stream, collect, in_profile)

    def report_profile(self, text: str) -> None:
        """One line on the terminal; the time to write the profile does not count as that of a step."""
        self.recorder.print(text)
        self.tracker.restart_clock()

    def train_to(
        self, last_step: int, stream: Iterator[Batch], collect: Callable[[int], None], in_profile: StepContext
    ) -> None:
        """Run the steps with logging, checkpoints and evaluations between them."""
        while self.step < last_step:
            phase = self.spec.phase_at(self.step)
            if self.step == phase.first_step > 0:
                self.recorder.print(f"step {self.step}: {phase.batch_size} crops of {phase.crop}² from this step on")
            with in_profile(self.step + 1):
                metrics = self.train_step(stream, last=self.step + 1 == last_step)
            self.step += 1
            self.recorder.advance(metrics.means["loss"], self.status)
            self._evaluation = None
            self.alive(self.step)
            collect(self.step)
            if self.step % self.log_config.every == 0 or self.step == self.train_config.steps:
                self.log()
            evaluates = self.step % self.eval_config.every == 0 or self.step == self.train_config.steps
            self.unevaluated = self.images is not None and evaluates
            self.stopped = metrics.stopping > 0 and self.step < last_step
            ending = self.stopped or metrics.without_data > 0 or len(self.corrupt) > self.max_corrupt_samples
            due = self.step % self.train_config.checkpoint_every == 0 or self.step in self.train_config.keep_at
            if ending or due or self.step == last_step:
                self.checkpoint(last=ending or self.step == last_step)
            if self.unevaluated:
                self.evaluate(last_step)
            self.raise_data_error(metrics)
            if self.stopped:
                reason = f" ({self.stop.reason})" if self.stop.reason else ""
                self.recorder.print(
                    f"stopped on request{reason} with a checkpoint at step {self.step}; the same command resumes it"
                )
                return

    def train_step(self, stream: Iterator[Batch], last: bool) -> StepMetrics:
        """One optimizer step; fetches the images of the next one unless this is the `last`."""
        engine, rounds, names = self.engine, len(self._batches), self.task.objective.fields
        measured = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
        upscaled = sum(batch.upscaled for batch in self._batches)
        for batch in self._batches:
            result = self.task.loss(engine.module, batch, engine.device)
            engine.backward(result.loss.mean())
            measured += torch.stack([value.detach().double().mean() for value in result]) / rounds
        norm = engine.clip()
        self.corrupt.advance()
        waited = 0.0 if last else self.fetch(stream)
        corrupt = sum(len(batch.corrupt) for batch in self._batches)
        flags = (upscaled, corrupt, self._data_error is not None, self.stop.received(), *self.saver.flags())
        means = torch.cat([measured, norm.double()[None]]) / engine.world_size
        # The only host sync of a step; the device has had work queued until here.
        reduced = engine.reduce(torch.cat([means, torch.tensor(flags).to(means)])).tolist()
        metrics = StepMetrics(dict(zip(names, reduced, strict=False)), *reduced[len(names) :])
        self.apply(metrics)
        self.upscaled += int(metrics.upscaled)
        self.tracker.step(self.spec.phase_at(self.step).batch_size, waited)
        self.report_failed(self.saver.commit(metrics.written, metrics.unwritten))
        if metrics.corrupt:
            self.count_corrupt()
        return metrics

    def apply(self, metrics: StepMetrics) -> None:
        """Take the optimizer step, or react to a divergence by `train.on_divergence`, the same on all processes."""
        train = self.train_config
        wrong = self.losses.verdict(metrics.means["loss"], train.loss_spike_factor)
        rate = learning_rate(self.schedule, self.step, train.steps)
        stepped = self.engine.step(rate, metrics.grad_norm, bool(wrong))
        if not stepped.skipped:
            self.averages.update()
        elif not wrong:
            wrong = "its gradient is not finite"
        for meter in (self.meter, self.log_meter):
            meter.add(metrics.means | {"grad_norm": stepped.grad_norm}, stepped.skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if wrong else 0
        if not wrong:
            self.losses.add(metrics.means["loss"])
            return
        step = self.step + 1
        if train.on_divergence == OnDivergence.skip:
            self.recorder.print(f"step {step} skipped: {wrong}")
            if self.skipped_in_a_row < train.max_skipped:
                return
        self.report_failed(self.saver.finish())  # the checkpoint in progress is still valid
        if train.on_divergence == OnDivergence.rollback:
            raise Diverged(step, wrong)
        if train.on_divergence == OnDivergence.stop:
            raise UserError(
                "stopped-on-divergence",
                "train.on_divergence",
                f"the run stopped at step {step}: {wrong}; use train.on_divergence=skip or rollback to continue",
            )
        steps = self.skipped_in_a_row
        raise UserError(
            "too-many-skipped-steps",
            "train.max_skipped",
            f"{steps} steps in a row, up to step {step}, had a non-finite loss or gradient, or a loss spike; resume "
            "from an earlier checkpoint with train.on_divergence=rollback, or start again with a lower "
            "schedule.learning_rate",
        )

    def fetch(self, stream: Iterator[Batch]) -> float:
        """Fetch the images of the next step; returns the seconds waited. An error is kept for `raise_data_error`."""
        before = time.perf_counter()
        try:
            self._batches = [next(stream) for _ in range(self.spec.accumulation)]
        except UserError as error:
            self._batches, self._data_error = [], error
        return time.perf_counter() - before

    def count_corrupt(self) -> None:
        """Count, on all processes, the corrupt images that any of them has found."""
        found = self.corrupt.new([sample for batch in self._batches for sample in batch.corrupt])
        for line in self.corrupt.add(self.engine.gather(found)):
            self.recorder.print(line)

    def raise_data_error(self, metrics: StepMetrics | None = None) -> None:
        """Raise UserError on all processes if one of them has no images, or if too many images are corrupt."""
        self.corrupt.check(self.max_corrupt_samples)
        if metrics is not None and not metrics.without_data:
            return
        errors = self.engine.gather(self._data_error.args if self._data_error else None)
        if first := next(filter(None, errors), None):
            raise UserError(*first)

    def log(self) -> None:
        """Write one journal line: means over the steps since the last one."""
        means = self.meter.take([*self.task.objective.fields, "grad_norm"])
        rate = learning_rate(self.schedule, self.step - 1, self.train_config.steps)
        train = {f"train/{name}": value for name, value in means.items()}
        train |= {"train/learning_rate": rate, "train/upscaled": self.upscaled}
        train |= {"train/bad_photos": len(self.corrupt.reasons), "train/rollbacks": self.rollbacks}
        train |= {"train/failed_checkpoints": self.failed_checkpoints}
        train |= {"train/failed_evaluations": self.failed_evaluations}
        data = {"data/images": self.images_in_set, "data/epoch": self.tracker.images / self.images_in_set}
        self.recorder.line(self.position() | train | data | self.tracker.rates())

    def status(self) -> str:
        """A progress line: means and rates over the steps since the last one."""
        means = self.log_meter.take(["loss", "bpp", "psnr"])
        rates, steps = self.tracker.rates("log"), self.train_config.steps
        parts = [f"step {self.step:,}/{steps:,}"]
        if means["loss"] is not None:
            parts += [f"loss {means['loss']:.4f}", f"{means['bpp']:.4f} bpp", f"{means['psnr']:.2f} dB"]
        if means["skipped"]:
            parts.append(f"{means['skipped']} skipped")
        parts += [f"{self.tracker.pflops:.4g} PFLOPs", f"{rates['perf/images_per_second']:.4g} images/s"]
        if "perf/mfu" in rates:
            parts.append(f"MFU {rates['perf/mfu']:.1%}")
        began, seconds = self._began
        left = (steps - self.step) * (self.tracker.seconds - seconds) / (self.step - began)
        parts += [f"{rates['perf/memory_gb']:.3g} GB", f"{tqdm.format_interval(left)} left"]
        return f"{self.folder.path.name}: {', '.join(parts)}"

    def evaluate(self, last_step: int) -> None:
        """Evaluate the weights, after the checkpoint of this step if one is due.

        A failed evaluation is skipped, reported and counted. Raises UserError, the same on all processes, after a
        checkpoint, if too many in a row have failed and steps are left.
        """
        reason = self.measure()
        if not reason:
            self.failed_in_a_row = 0
        else:
            self.failed_evaluations += 1
            self.failed_in_a_row += 1
            self.recorder.warn(f"the evaluation of step {self.step} failed and is skipped: {reason}")
        in_a_row = self.failed_in_a_row
        ends = in_a_row >= self.eval_config.max_failed and self.step < last_step
        if ends:
            self.failed_in_a_row = 0  # the resumed run counts anew
        self.note_evaluation()
        self.tracker.restart_clock()
        if not ends:
            return
        if self._saved != self.step:
            self.checkpoint(last=True)
        raise UserError(
            "failed-evaluations",
            "eval.images",
            f"{in_a_row} evaluations in a row failed, the last one at step {self.step} ({reason}); correct the cause "
            "or set eval.images=null, and the same command resumes the run",
        )

    def measure(self) -> str:
        """Evaluate and write the result to journal and terminal; returns why that failed, or ""."""
        assert self.images is not None
        alive, multiple, shown = partial(self.alive, None), self.spec.side_multiple, self.log_config.images
        try:
            means, reconstructions = self.task.measure(self.images, self.engine, self.averages, alive, multiple, shown)
        except CollectiveError as failed:
            return str(failed)
        except Fault:
            self.failed_evaluations += 1
            self.note_evaluation(sole=True)  # a resumed run does not repeat it
            raise
        self._evaluation = means["eval"]["loss"]
        self.recorder.images(self.step, reconstructions)
        line = {f"{group}/{name}": value for group, mean in means.items() for name, value in mean.items()}
        self.recorder.line(self.position() | line)
        mean, *averaged = means.values()
        losses = ", ".join(f"{average['loss']:.4f}" for average in averaged)
        self.recorder.print(
            f"step {self.step}: {self.tracker.pflops:.4g} PFLOPs, evaluation loss {mean['loss']:.4f}"
            f"{f' (averages of the weights: {losses})' if losses else ''}, {mean['bpp']:.4f} bpp, {mean['psnr']:.2f} dB"
        )
        return ""

    def note_evaluation(self, sole: bool = False) -> None:
        """Update the checkpoint of this step, if there is one, with the result of its evaluation.

        `sole`: only this process calls it.
        """
        self.unevaluated = False
        if self._saved == self.step and (sole or self.engine.rank == 0):
            self.saver.amend(self.step, self.evaluated())

    def checkpoint(self, last: bool = False) -> None:
        """Begin to write a checkpoint; wait for it if it is the `last` of this command or an evaluation follows.

        Raises UserError if the last one cannot be written.
        """
        self._saved = self.step
        self.report_failed(self.saver.begin(self.state()))
        ended = self.saver.finish() if last or self.unevaluated else []
        self.tracker.restart_clock()
        self.alive(self.step)
        if not last:
            self.report_failed(ended)
        elif ended:
            kept = self.folder.checkpoints.reached()
            raise UserError(
                "unwritten-checkpoint",
                "run.dir",
                f"the checkpoint of step {self.step} could not be written ({ended[-1].error}); correct the cause, and "
                f"the same command resumes from step {kept}",
            )

    def report_failed(self, ended: list[FailedSave]) -> None:
        """Warn of checkpoints that could not be written; training continues."""
        for saved in ended:
            self.failed_checkpoints += 1
            self.recorder.warn(
                f"the checkpoint of step {saved.step} could not be written ({saved.error}); training continues, and "
                "earlier checkpoints are kept"
            )

    def position(self) -> dict[str, float]:
        """The keys of every journal line."""
        return {"step": self.step} | self.tracker.position()

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint outside the engine: plain JSON values."""
        return {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "upscaled": self.upscaled,
            "failed_checkpoints": self.failed_checkpoints,
            **self.evaluated(),
            "tracker": self.tracker.state(),
            "meter": asdict(self.meter),
            "losses": self.losses.losses,
            "bad": self.corrupt.reasons,
            "data": self.data_digest,
        }

    def evaluated(self) -> dict[str, Any]:
        """The part of `state` that an evaluation changes."""
        return {
            "evaluation": self._evaluation,
            "unevaluated": self.unevaluated,
            "failed_evaluations": self.failed_evaluations,
            "failed_in_a_row": self.failed_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the `state` of a checkpoint."""
        self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        self.upscaled, self.failed_checkpoints = state["upscaled"], state["failed_checkpoints"]
        self._saved, self.unevaluated = self.step, state.get("unevaluated", False)
        self.failed_evaluations = state.get("failed_evaluations", 0)
        self.failed_in_a_row = state.get("failed_in_a_row", 0)
        self.tracker.load_state(state["tracker"])
        self.meter = Meter(**state["meter"])
        self.losses = LossHistory(state["losses"])
        self.corrupt = CorruptImages(state["bad"])
