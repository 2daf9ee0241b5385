"""One training run, from a checked configuration to exported weights."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hpcm_scale.compute.hardware import peak_flops
from hpcm_scale.compute.tracker import PETA, ComputeTracker, flops_of
from hpcm_scale.config.checks import micro_batch_size
from hpcm_scale.config.phases import described, images_at
from hpcm_scale.config.schema import Config, EngineName, OnDivergence, Precision
from hpcm_scale.data.stream import check_shared_memory
from hpcm_scale.devices import CUDA, device_kind
from hpcm_scale.distributed import processes
from hpcm_scale.distributed.ranks import facts
from hpcm_scale.distributed.rendezvous import initialise, join, telling_refusals
from hpcm_scale.distributed.watch import LONG_LOST_SECONDS, LOST_SECONDS, Watch
from hpcm_scale.errors import UserError, is_first_process, refusals
from hpcm_scale.files import writing
from hpcm_scale.model.compiled import compile_regions
from hpcm_scale.model.layers import set_arithmetic
from hpcm_scale.model.public_checkpoints import needs_placement
from hpcm_scale.tracking.environment import environment
from hpcm_scale.training import diagnostics
from hpcm_scale.training.averages import Averages
from hpcm_scale.training.checkpoints import Checkpoint, Retention, Saver
from hpcm_scale.training.costs import costs_by_phase
from hpcm_scale.training.divergence import Diverged, Divergence, culprits
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.evaluator import Evaluator
from hpcm_scale.training.loop import Trainer
from hpcm_scale.training.recorder import Recorder
from hpcm_scale.training.run_folder import Resume, RunFolder, RunLock, run_directory
from hpcm_scale.training.signals import StopRequest, deterministic
from hpcm_scale.training.start import Start, prepare
from hpcm_scale.training.state_shards import fill
from hpcm_scale.training.task import Task, batches, origin_of, task_of


class Outcome(NamedTuple):
    """How training ended, the same on all processes."""

    done: bool
    """Whether it got as far as it was to; if not, it was asked to stop."""
    asked: bool
    """Whether it was asked to stop, be it too late to: nothing else is to begin."""


def run(config: Config) -> Outcome:
    """Train, or go on training, what the configuration describes, in the folder `run.dir`.

    Every process of the launch calls it. All that can be refused is refused before they start to talk to each other:
    UserError, one sentence.
    """
    processes.complete_environment()
    stop = StopRequest(RunFolder(run_directory(config)).stop_file, config.train.max_hours, first=is_first_process())
    try:
        with deterministic(config.engine.deterministic):
            return _join_and_train(config, stop)
    finally:
        stop.close()


def _join_and_train(config: Config, stop: StopRequest) -> Outcome:
    with telling_refusals(), refusals():
        processes.choose_device()
        start = prepare(config, processes.world_size())
        if not start.finished:
            check_room(config)
    group = join(facts(config, start.index.digest), config.engine.init_timeout)
    group.agree({"run folder": {"finished": start.finished}})
    if start.finished:
        tell(f"{start.folder.path} is finished at step {start.resume.step}; a larger train.steps would lengthen it")
        return Outcome(done=True, asked=False)
    locks: list[RunLock] = []
    group.first(lambda: locks.append(RunLock(start.folder.path)))
    stop.listen()
    try:
        stalled = 60 * config.train.watchdog_timeout
        with (
            Watch(group, stalled, start.folder.stacks, lost_seconds(config), on_orphaned=stop.request) as watch,
            refusals(local=True),
        ):
            initialise(group, config.train.watchdog_timeout)
            return _train(config, start, stop, watch)
    finally:
        for lock in locks:
            lock.release()


def lost_seconds(config: Config) -> float:
    """For how long a process may be silent before a `Watch` takes it for lost."""
    return LONG_LOST_SECONDS if config.engine.compile or device_kind() == CUDA else LOST_SECONDS


def check_room(config: Config) -> None:
    """Raise UserError if the images of this machine's data workers do not fit into its shared memory."""
    check_shared_memory(
        config.data,
        micro_batch_size=micro_batch_size(config, processes.world_size()),
        crop=config.data.crop,
        processes=processes.local_world_size(),
    )


def tell(text: str) -> None:
    """Say something to the user, once."""
    if is_first_process():
        print(text, flush=True)


def _train(config: Config, start: Start, stop: StopRequest, watch: Watch) -> Outcome:
    engine = create_engine(config)
    task = prepared_task(config, start, engine)
    training = _Training(config, start, engine, task, stop, watch)
    try:
        resume = training.choose()
        tell(training.opening(resume))
        engine.barrier()  # all have seen what the folder was like
        if engine.rank == 0:
            start.folder.write_facts(config, origin_of(start.origin) or start.folder.origin(config))
        report = start.folder.path / diagnostics.FOLDER
        with diagnostics.explaining(config, engine.world_size, engine.rank, report):
            while isinstance(ended := training.attempt(resume), Diverged):
                resume = training.go_back(ended)
        return ended
    finally:
        engine.close()


def prepared_task(config: Config, start: Start, engine: Engine) -> Task:
    """The task of a run, with its model made, handed to the engine and compiled; every process calls it."""
    set_arithmetic(config.engine.precision)
    torch.manual_seed(config.train.seed)
    # There may be no run folder yet.
    with diagnostics.explaining(config, engine.world_size, engine.rank, folder=None):
        with nullcontext() if config.machine.freeze_codec else engine.building():  # a frozen codec stays whole
            task = task_of(config, start.origin, start.receivers)
        engine.prepare(task.module)
        task.place(engine.device)
    if config.engine.compile:
        compile_regions(nn.ModuleList([task.module, task.codec]))  # a frozen codec is no part of the module
    return task


@dataclass
class _Training:
    """What the attempts at one run have in common: more than one where it is taken back for a divergence."""

    config: Config
    start: Start
    engine: Engine
    task: Task
    stop: StopRequest
    watch: Watch

    def __post_init__(self) -> None:
        costs = costs_by_phase(self.config, self.start.receivers)
        self.costs = {image: of_phase.training_flops_per_image for image, of_phase in costs.items()}
        self.parameters = costs[0].parameters
        self.described = {"parameters": self.parameters, "parameters_by_part": costs[0].parameters_by_part}
        self.described |= {"environment": environment()}
        self.averages = Averages(self.engine, self.config.train.ema)

    def choose(self) -> Resume:
        """The checkpoint to go on from, every byte of which has been looked at by one process or another."""
        engine, folder = self.engine, self.start.folder

        def examine(checkpoint: Checkpoint) -> str:
            flaw = checkpoint.flaw(hashes=True, rank=engine.rank, world_size=engine.world_size)
            return next(filter(None, engine.gather(flaw)), "")

        found = {int(step) for step in engine.gather(str(folder.checkpoints.reached()))}
        if len(found) > 1:
            raise UserError(
                f"some processes find step {max(found)} in run.dir={folder.path} and others do not; "
                "put it on a file system that all machines share"
            )
        return folder.resume(self.config, self.start.index.digest, examine)

    def attempt(self, resume: Resume) -> Outcome | Diverged:
        """Train from `resume` on; Diverged, on all processes, if it has to go back."""
        config, engine, folder = self.config, self.engine, self.start.folder
        divergences = self.divergences()
        peak = peak_flops(engine.device, config.engine.precision == Precision.bf16)
        tracker = ComputeTracker(self.costs, engine.device, peak and peak * engine.world_size)
        recorder = Recorder(
            folder,
            config,
            first=engine.rank == 0,
            step=resume.step,
            unevaluated=self.is_unevaluated(resume),
            facts=self.described,
        )
        images, alive = self.start.images, self.watch.alive
        evaluator = Evaluator(config, images, engine, self.task, self.averages, alive) if images else None
        saver = Saver(engine, folder.checkpoints, Retention.of(config.train), recorder.sync, self.averages.pieces())
        trainer = Trainer(
            config=config,
            engine=engine,
            task=self.task,
            folder=folder,
            recorder=recorder,
            tracker=tracker,
            evaluator=evaluator,
            data_digest=self.start.index.digest,
            stop=self.stop,
            saver=saver,
            averages=self.averages,
            alive=alive,
            rollbacks=len(divergences),
        )
        stream = None
        failed = True
        try:
            self._load(resume, trainer)
            stream = batches(
                config,
                trainer.step,
                rank=engine.rank,
                world_size=engine.world_size,
                index=self.start.index,
                left_out=[range(noted.first, noted.last + 1) for noted in divergences],
            )
            if resume.choice is None and config.train.on_divergence == OnDivergence.rollback:
                trainer.checkpoint()  # something to go back to from the first step on
            tracker.start_clock()
            trainer.train(stream)
            self._finish(trainer)
            asked = float(engine.reduce(torch.tensor([float(self.stop.received())])))
            failed = False
        except Diverged as diverged:
            failed = False  # it goes on
            return diverged.with_traceback(None)  # which would keep all that is of this attempt
        finally:
            saver.close()
            if stream is not None:
                stream.close()
            recorder.close(exit_code=int(failed))
        return Outcome(done=not trainer.stopped, asked=asked > 0)

    def divergences(self) -> list[Divergence]:
        """Those noted so far, the same on all processes, however late a shared file system shows them."""
        noted = json.dumps(self.start.folder.divergences()) if self.engine.rank == 0 else ""
        return [Divergence(*values) for values in json.loads(self.engine.gather(noted)[0])]

    def go_back(self, diverged: Diverged) -> Resume:
        """The checkpoint to go on from, without the images of the step that diverged."""
        folder, train = self.start.folder, self.config.train
        before = self.divergences()
        if len(before) >= train.max_rollbacks:
            raise UserError(
                f"{diverged}, after train.max_rollbacks={train.max_rollbacks} rollbacks; start anew with a lower "
                "schedule.learning_rate, or allow more"
            )
        resume = self.choose()
        if resume.choice is None:
            raise UserError(f"{diverged}, and no checkpoint could be written to go back to; mend that, and start anew")
        first, last = culprits(diverged.step, resume.step, before, partial(images_at, self.config))
        if self.engine.rank == 0:
            folder.note_divergence(Divergence(diverged.step, diverged.reason, first, last))
        for damaged in resume.choice.damaged:
            tell(f"passed over: {damaged}")
        tell(f"{diverged}: back to step {resume.step}, and on without the images {first:,} to {last:,} of the run")
        return resume

    def opening(self, resume: Resume) -> str:
        """What is about to happen, and what it will cost."""
        config, engine, folder = self.config, self.engine, self.start.folder
        stage = f"ZeRO {config.engine.zero_stage}" if config.engine.name == EngineName.deepspeed else "accelerate"
        lines = [
            f"{folder.path}: {config.model.name}, {self.parameters:,} parameters, {self.task.aim}, "
            f"{stage} on {engine.world_size} × {engine.device.type}, {config.train.steps:,} steps of "
            f"{described(config)}, {flops_of(self.costs, images_at(config, config.train.steps)) / PETA:.4g} PFLOPs"
        ]
        if resume.previous is None and needs_placement(config.model):
            lines.append(
                "its weights cannot go to the public implementation: `hpcm export` needs model.hyper_placement=upstream"
            )
        if self.start.origin:
            lines.append(f"starting from {self.start.origin.path}")
        if resume.choice:
            checkpoint = resume.choice.checkpoint
            lines += [f"passed over: {damaged}" for damaged in resume.choice.damaged]
            if checkpoint.folder.parent == folder.checkpoints.folder:
                lines.append(f"going on from step {resume.step} ({checkpoint.folder.name})")
            else:
                lines.append(f"branching off {config.run.cooldown_of} at step {resume.step}")
        if resume.previous and resume.previous.train.steps != config.train.steps:
            crops = " and that of crops" if config.schedule.crops else ""
            lines.append(
                f"train.steps changes from {resume.previous.train.steps} to {config.train.steps}: the learning-rate "
                f"schedule{crops}, where it is in fractions of the run, changes with it"
            )
        return "\n".join(lines)

    def _load(self, resume: Resume, trainer: Trainer) -> None:
        if resume.choice is None:
            return
        checkpoint, state, _ = resume.choice
        files, _ = checkpoint.read()
        try:
            fill([checkpoint.folder / name for name in files], [*self.engine.pieces(), *self.averages.pieces()])
        except ValueError as error:
            raise UserError(f"{checkpoint.folder} does not fit this model ({error}); choose another run.dir") from error
        self.engine.take_over(state["updates"])
        self.averages.load(state["updates"])
        trainer.load_state(state | {"unevaluated": self.is_unevaluated(resume)})

    def is_unevaluated(self, resume: Resume) -> bool:
        """Whether the run was cut off in the evaluation after its checkpoint; that of a trunk is not for its branch."""
        own = resume.choice and resume.choice.checkpoint.folder.parent == self.start.folder.checkpoints.folder
        return bool(own and resume.choice.state.get("unevaluated"))

    def _finish(self, trainer: Trainer) -> None:
        """Export the weights of a finished run, or say how a stopped one goes on."""
        config, folder, step = self.config, self.start.folder, trainer.step
        if step < config.train.steps:
            if not trainer.stopped:
                trainer.recorder.say(
                    f"stopped at step {step} of {config.train.steps}; without train.stop_after the same command goes on"
                )
            return
        spent = {"step": step, "images": trainer.tracker.images, "pflops": trainer.tracker.pflops}
        for length in self.averages.lengths:
            with self.averages.in_place(length):
                self._export(folder.averaged_file(length), spent | {"ema": length})
        self._export(folder.weights_file, spent)  # the last one: with it the run is finished
        trainer.recorder.say(f"finished at step {step}: {folder.weights_file}")

    def _export(self, path: Path, spent: dict[str, Any]) -> None:
        """Write what the model has for weights now; every process calls it."""
        state = self.engine.weights()
        if state is not None:
            with writing(path):
                self.task.save(path, state, spent, self.start.folder.origin(self.config))
