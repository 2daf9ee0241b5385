"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from hpcm_scale.compute.tracker import ComputeTracker
from hpcm_scale.config.checks import accumulation
from hpcm_scale.config.phases import phase_at
from hpcm_scale.config.schema import Config, OnDivergence
from hpcm_scale.data.stream import Batch
from hpcm_scale.errors import Fault, UserError
from hpcm_scale.training.averages import Averages
from hpcm_scale.training.checkpoints import Saved, Saver
from hpcm_scale.training.diagnostics import StepContext, out_of_reach, profiling
from hpcm_scale.training.divergence import Diverged, LossHistory, limit_reached
from hpcm_scale.training.engines.base import Engine, FailedTogether
from hpcm_scale.training.evaluator import Evaluator
from hpcm_scale.training.optimizer import learning_rate
from hpcm_scale.training.recorder import BadPhotos, Meter, Recorder
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.signals import StopRequest, collecting_between_steps
from hpcm_scale.training.task import Task


class Agreed(NamedTuple):
    """What the processes tell each other once a step; sums over them."""

    means: dict[str, float]
    """Of the batch: loss and its parts; these are means."""
    grad_norm: float
    """Of the gradients before clipping; NaN where the engine tells it only after the step."""
    upscaled: float
    """Photos smaller than the crop."""
    bad: float
    """Photos of the next step that could not be read."""
    trouble: float
    """Processes that cannot get their images of the next step."""
    stopping: float
    """Processes that were asked to stop."""
    written: float
    """Processes that have written their file of the checkpoint."""
    unwritten: float
    """Processes that could not."""


@dataclass
class Trainer:
    """One run in one process: `train` goes from `step` to `last_step`, or until it is asked to stop."""

    config: Config
    engine: Engine
    task: Task
    folder: RunFolder
    recorder: Recorder
    tracker: ComputeTracker
    evaluator: Evaluator | None
    data_digest: str
    stop: StopRequest
    saver: Saver
    averages: Averages
    alive: Callable[[int], None]
    """Called with the step whenever there is progress."""
    rollbacks: int = 0
    step: int = 0
    skipped_in_a_row: int = 0
    upscaled: int = 0
    """Photos smaller than the crop so far."""
    failed_checkpoints: int = 0
    failed_evaluations: int = 0
    failed_in_a_row: int = 0
    """Of the newest evaluations."""
    unevaluated: bool = False
    """Whether the evaluation of this very step is due and not over."""
    meter: Meter = field(default_factory=Meter)
    log_meter: Meter = field(default_factory=Meter)
    """Of the steps since the last line on progress."""
    losses: LossHistory = field(default_factory=LossHistory)
    bad: BadPhotos = field(default_factory=BadPhotos)
    stopped: bool = False
    """Whether it was asked to stop, and did."""
    _batches: list[Batch] = field(default_factory=list)
    """The micro-batches of the next step, fetched while it is not yet needed, so that no process fails alone."""
    _trouble: str = ""
    """Why they could not be."""
    _evaluation: float | None = None
    """Evaluation loss at this very step."""
    _began: tuple[int, float] = (0, 0.0)
    """Step and seconds of training when this command began."""
    _saved: int | None = None
    """Step of the newest checkpoint that has been begun, or gone on from."""

    def train(self, stream: Iterator[Batch]) -> None:
        """Train on the stream; leaves a checkpoint of the last step done.

        Raises UserError, the same on all processes, when the run cannot go on; Diverged to have it go back.
        """
        last_step = self.config.train.stop_after or self.config.train.steps
        self.alive(self.step)
        self._began = self.step, self.tracker.seconds
        if self.unevaluated and self.evaluator:  # the processes were killed in it
            self.evaluate(last_step)
        if self.step < last_step:
            self.fetch(stream)
            self.count_bad()
            self.raise_trouble()
        profiled = self.config.train.profile_steps if self.engine.rank == 0 else []
        if missed := out_of_reach(profiled, self.step, last_step):
            self.recorder.say(missed)
        with (
            collecting_between_steps() as collect,
            profiling(profiled, self.engine.device, self.folder.path / "profile", self.say_of_profile) as in_profile,
        ):
            self.train_to(last_step, stream, collect, in_profile)

    def say_of_profile(self, text: str) -> None:
        """One line on the terminal; the time to write the profile is not rated as that of a step."""
        self.recorder.say(text)
        self.tracker.restart_clock()

    def train_to(
        self, last_step: int, stream: Iterator[Batch], collect: Callable[[int], None], in_profile: StepContext
    ) -> None:
        """Step after step, and what is due between them."""
        config = self.config
        while self.step < last_step:
            phase = phase_at(config, self.step)
            if self.step == phase.first_step > 0:
                self.recorder.say(f"step {self.step}: from here on {phase.batch_size} crops of {phase.crop}²")
            with in_profile(self.step + 1):
                agreed = self.train_step(stream, last=self.step + 1 == last_step)
            self.step += 1
            self.recorder.advance(agreed.means["loss"], self.status)
            self._evaluation = None
            self.alive(self.step)
            collect(self.step)
            if self.step % config.log.every == 0 or self.step == config.train.steps:
                self.log()
            self.unevaluated = self.evaluator is not None and self.evaluator.due(self.step)
            self.stopped = agreed.stopping > 0 and self.step < last_step
            ending = self.stopped or agreed.trouble > 0 or self.bad.too_many(config.data.max_corrupt_samples)
            due = self.step % config.train.checkpoint_every == 0 or self.step in config.train.keep_at
            if ending or due or self.step == last_step:
                self.checkpoint(last=ending or self.step == last_step)
            if self.unevaluated:
                self.evaluate(last_step)
            self.raise_trouble(agreed)
            if self.stopped:
                reason = f" ({self.stop.reason})" if self.stop.reason else ""
                self.recorder.say(f"asked to stop{reason}: checkpoint at step {self.step}; the same command goes on")
                return

    def train_step(self, stream: Iterator[Batch], last: bool) -> Agreed:
        """One optimizer step, and the images of the next one unless it is the `last`."""
        engine, rounds, names = self.engine, len(self._batches), self.task.objective.fields
        measured = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
        upscaled = sum(batch.upscaled for batch in self._batches)
        for batch in self._batches:
            result = self.task.loss(engine.module, batch, engine.device)
            engine.backward(result.loss.mean())
            measured += torch.stack([value.detach().double().mean() for value in result]) / rounds
        norm = engine.clip()
        self.bad.passed()
        waited = 0.0 if last else self.fetch(stream)
        bad = sum(len(batch.bad) for batch in self._batches)
        flags = (upscaled, bad, bool(self._trouble), self.stop.received(), *self.saver.flags())
        means = torch.cat([measured, norm.double()[None]]) / engine.world_size
        # Of all that a step computes, this alone is looked at; until now the device has had work ahead.
        told = engine.reduce(torch.cat([means, torch.tensor(flags).to(means)])).tolist()
        agreed = Agreed(dict(zip(names, told, strict=False)), *told[len(names) :])
        self.apply(agreed)
        self.upscaled += int(agreed.upscaled)
        self.tracker.step(phase_at(self.config, self.step).batch_size, waited)
        self.tell(self.saver.settle(agreed.written, agreed.unwritten))
        if agreed.bad:
            self.count_bad()
        return agreed

    def apply(self, agreed: Agreed) -> None:
        """Take the optimizer step, or leave it out, by what `train.on_divergence` says, for all processes alike."""
        train = self.config.train
        wrong = self.losses.verdict(agreed.means["loss"], train.loss_spike_factor)
        rate = learning_rate(self.config.schedule, self.step, train.steps)
        stepped = self.engine.step(rate, agreed.grad_norm, bool(wrong))
        if not stepped.skipped:
            self.averages.update()
        elif not wrong:
            wrong = "its gradient is not finite"
        for meter in (self.meter, self.log_meter):
            meter.add(agreed.means | {"grad_norm": stepped.grad_norm}, stepped.skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if wrong else 0
        if not wrong:
            self.losses.add(agreed.means["loss"])
            return
        step = self.step + 1
        if train.on_divergence == OnDivergence.skip:
            self.recorder.say(f"step {step} skipped: {wrong}")
            if self.skipped_in_a_row < train.max_skipped:
                return
        self.tell(self.saver.finish())  # the checkpoint that is being written still counts
        if train.on_divergence == OnDivergence.rollback:
            raise Diverged(step, wrong)
        if train.on_divergence == OnDivergence.stop:
            raise UserError(
                f"step {step} is left out and the run ends: {wrong}; train.on_divergence=skip or rollback goes on"
            )
        raise limit_reached(self.skipped_in_a_row, step)

    def fetch(self, stream: Iterator[Batch]) -> float:
        """Get the images of the next step; returns the seconds waited. Trouble is kept, for all to meet together."""
        before = time.perf_counter()
        try:
            self._batches = [next(stream) for _ in range(accumulation(self.config, self.engine.world_size))]
        except UserError as error:
            self._batches, self._trouble = [], str(error)
        return time.perf_counter() - before

    def count_bad(self) -> None:
        """Take note, on all processes alike, of photos that any of them could not read."""
        told = self.bad.told([photo for batch in self._batches for photo in batch.bad])
        for line in self.bad.add(self.engine.gather(told)):
            self.recorder.say(line)

    def raise_trouble(self, agreed: Agreed | None = None) -> None:
        """End all processes with one sentence if one of them cannot go on for want of images."""
        if self.bad.too_many(self.config.data.max_corrupt_samples):
            raise self.bad.error(self.config.data.max_corrupt_samples)
        if agreed is not None and not agreed.trouble:
            return
        trouble = next(filter(None, self.engine.gather(self._trouble)), None)
        if trouble is not None:
            raise UserError(trouble)

    def log(self) -> None:
        """One journal line: means over the steps since the last one."""
        means = self.meter.take([*self.task.objective.fields, "grad_norm"])
        rate = learning_rate(self.config.schedule, self.step - 1, self.config.train.steps)
        train = {f"train/{name}": value for name, value in means.items()}
        counts = {"learning_rate": rate, "upscaled": self.upscaled, "bad_photos": len(self.bad.reasons)}
        counts |= {"rollbacks": self.rollbacks, "failed_checkpoints": self.failed_checkpoints}
        counts |= {"failed_evaluations": self.failed_evaluations}
        train |= {f"train/{name}": value for name, value in counts.items()}
        self.recorder.line(self.position() | train | self.tracker.rates())

    def status(self) -> str:
        """A line on progress: means and rates over the steps since the last one."""
        means = self.log_meter.take(["loss", "bpp", "psnr"])
        rates, steps = self.tracker.rates("log"), self.config.train.steps
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
        """Evaluate the weights; after the checkpoint of this step where one is due, which does not depend on it.

        An evaluation that fails is skipped, said and counted. Raises UserError, the same on all processes, if too many
        in a row have failed and there are steps left to train; leaves a checkpoint then.
        """
        reason = self.measure()
        if not reason:
            self.failed_in_a_row = 0
        else:
            self.failed_evaluations += 1
            self.failed_in_a_row += 1
            self.recorder.warn(f"the evaluation of step {self.step} failed and is skipped: {reason}")
        in_a_row = self.failed_in_a_row
        ends = in_a_row >= self.config.eval.max_failed and self.step < last_step
        if ends:
            self.failed_in_a_row = 0  # the command that goes on may fail as often
        self.note_evaluation()
        self.tracker.restart_clock()
        if not ends:
            return
        if self._saved != self.step:
            self.checkpoint(last=True)
        raise UserError(
            f"{in_a_row} evaluations in a row failed, the last one at step {self.step} ({reason}); mend that, or set "
            "eval.images=null, and the same command goes on"
        )

    def measure(self) -> str:
        """Loss at λ, bpp and PSNR on the evaluation images, to journal and terminal; why not, if that fails."""
        try:
            means, reconstructions = self.evaluator.measure()
        except FailedTogether as failed:
            return str(failed)
        except Fault:
            self.failed_evaluations += 1
            self.note_evaluation(sole=True)  # whoever goes on is not to end here again
            raise
        self._evaluation = means["eval"]["loss"]
        self.recorder.pictures(self.step, reconstructions)
        line = {f"{group}/{name}": value for group, mean in means.items() for name, value in mean.items()}
        self.recorder.line(self.position() | line)
        mean, *averaged = means.values()
        losses = ", ".join(f"{average['loss']:.4f}" for average in averaged)
        self.recorder.say(
            f"step {self.step}: {self.tracker.pflops:.4g} PFLOPs, evaluation loss {mean['loss']:.4f}"
            f"{f' (averages of the weights: {losses})' if losses else ''}, {mean['bpp']:.4f} bpp, {mean['psnr']:.2f} dB"
        )
        return ""

    def note_evaluation(self, sole: bool = False) -> None:
        """The evaluation of this step is over: have its checkpoint, if it is there, tell how it ended.

        `sole`: this process alone calls it.
        """
        self.unevaluated = False
        if self._saved == self.step and (sole or self.engine.rank == 0):
            self.saver.amend(self.step, self.evaluated())

    def checkpoint(self, last: bool = False) -> None:
        """Begin to write what a resumed run needs; wait for it if it is the `last` of this call, or if an evaluation
        follows: whatever becomes of that, the checkpoint is there.

        Raises UserError if the last one cannot be written.
        """
        self._saved = self.step
        self.tell(self.saver.begin(self.state()))
        ended = self.saver.finish() if last or self.unevaluated else []
        self.tracker.restart_clock()
        self.alive(self.step)
        if not last:
            self.tell(ended)
        elif ended:
            kept = self.folder.checkpoints.reached()
            raise UserError(
                f"the checkpoint of step {self.step} could not be written ({ended[-1].error}); mend that, and the same "
                f"command goes on from step {kept}"
            )

    def tell(self, ended: list[Saved]) -> None:
        """Say aloud that a checkpoint could not be written; training goes on."""
        for saved in ended:
            self.failed_checkpoints += 1
            self.recorder.warn(
                f"the checkpoint of step {saved.step} could not be written ({saved.error}); training goes on, and the "
                "ones before are still there"
            )

    def position(self) -> dict[str, float]:
        """The keys that every journal line has."""
        return {"step": self.step} | self.tracker.position()

    def state(self) -> dict[str, Any]:
        """Everything outside the engine that a checkpoint needs; plain JSON values."""
        return {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "upscaled": self.upscaled,
            "failed_checkpoints": self.failed_checkpoints,
            **self.evaluated(),
            "tracker": self.tracker.state(),
            "meter": self.meter.state(),
            "losses": self.losses.losses,
            "bad": self.bad.reasons,
            "data": self.data_digest,
        }

    def evaluated(self) -> dict[str, Any]:
        """The part of the `state` that an evaluation changes."""
        return {
            "evaluation": self._evaluation,
            "unevaluated": self.unevaluated,
            "failed_evaluations": self.failed_evaluations,
            "failed_in_a_row": self.failed_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        self.upscaled, self.failed_checkpoints = state["upscaled"], state["failed_checkpoints"]
        self._saved, self.unevaluated = self.step, state.get("unevaluated", False)
        self.failed_evaluations = state.get("failed_evaluations", 0)
        self.failed_in_a_row = state.get("failed_in_a_row", 0)
        self.tracker.load_state(state["tracker"])
        self.meter = Meter(**state["meter"])
        self.losses = LossHistory(state["losses"])
        self.bad = BadPhotos(state["bad"])
