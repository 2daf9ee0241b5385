"""One training run, from a checked configuration to exported weights."""

from __future__ import annotations

from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hpcm_scale.compute.hardware import peak_flops
from hpcm_scale.compute.tracker import PETA, ComputeTracker, flops_of
from hpcm_scale.config.compose import to_dict, to_yaml
from hpcm_scale.config.schema import Config, DataConfig, EngineName, OnDivergence, Precision
from hpcm_scale.config.spec import RunSpec, run_directory
from hpcm_scale.data.stream import check_shared_memory
from hpcm_scale.devices import CUDA, device_kind
from hpcm_scale.distributed import processes
from hpcm_scale.distributed.rendezvous import facts, init_process_group, join, share_errors
from hpcm_scale.distributed.watchdog import LONG_LOST_SECONDS, LOST_SECONDS, Watchdog
from hpcm_scale.errors import UserError, is_first_process, translate_os_errors
from hpcm_scale.files import writing
from hpcm_scale.model.compiled import compile_regions
from hpcm_scale.model.layers import set_arithmetic
from hpcm_scale.model.public_checkpoints import needs_placement
from hpcm_scale.tracking.environment import environment
from hpcm_scale.training import diagnostics
from hpcm_scale.training.checkpoints import Checkpoint, Saver
from hpcm_scale.training.costs import costs_by_phase
from hpcm_scale.training.divergence import Diverged, Divergence, images_to_skip
from hpcm_scale.training.ema import EMA
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.loop import Trainer
from hpcm_scale.training.recorder import Recorder
from hpcm_scale.training.run_folder import RunFolder, RunLock
from hpcm_scale.training.signals import StopRequest, deterministic
from hpcm_scale.training.start import Resume, Start, find_resume, memory_remedies, prepare
from hpcm_scale.training.state_shards import load
from hpcm_scale.training.task import Task, batches, origin_of, task_of


class Outcome(NamedTuple):
    """How training ended, the same on all processes."""

    done: bool
    """Whether training reached its last step; if not, it stopped on a request."""
    asked: bool
    """Whether a stop was requested, even if too late: no other run may begin."""


def run(config: Config) -> Outcome:
    """Train, or resume training, in the folder `run.dir`; every process of the launch calls it.

    Raises UserError, before any process group is initialized, for every error that can be found by then.
    """
    processes.complete_environment()
    folder = RunFolder(run_directory(config.run, config.model.name))
    stop = StopRequest(folder.stop_file, config.train.max_hours, first=is_first_process())
    try:
        with deterministic(config.engine.deterministic):
            return _join_and_train(config, stop)
    finally:
        stop.close()


def _join_and_train(config: Config, stop: StopRequest) -> Outcome:
    with share_errors(), translate_os_errors():
        processes.choose_device()
        start = prepare(config, processes.world_size())
        if not start.finished:
            check_room(config.data, start.spec)
    group = join(facts(to_dict(config), start.index.digest), config.engine.init_timeout)
    group.compare({"run folder": {"finished": start.finished}})
    if start.finished:
        print_once(
            f"{start.folder.path} is finished at step {start.resume.step}; a larger train.steps would continue it"
        )
        return Outcome(done=True, asked=False)
    locks: list[RunLock] = []
    group.on_rank_zero(lambda: locks.append(RunLock(start.folder)))
    stop.listen()
    try:
        stalled = 60 * config.train.watchdog_timeout
        with (
            Watchdog(
                group, stalled, start.folder.stacks, lost_seconds(config.engine.compile), on_orphaned=stop.request
            ) as watch,
            translate_os_errors(local=True),
        ):
            init_process_group(group, config.train.watchdog_timeout)
            return _train(start, stop, watch)
    finally:
        for lock in locks:
            lock.release()


def lost_seconds(compiled: bool) -> float:
    """Seconds without a heartbeat after which a `Watchdog` declares a process lost."""
    return LONG_LOST_SECONDS if compiled or device_kind() == CUDA else LOST_SECONDS


def check_room(data: DataConfig, spec: RunSpec) -> None:
    """Raise UserError if the batches of the data workers of this node exceed its shared memory."""
    check_shared_memory(
        data,
        micro_batch_size=spec.micro_batch_size,
        crop=data.crop,
        processes=processes.local_world_size(),
    )


def print_once(text: str) -> None:
    """Print on rank 0."""
    if is_first_process():
        print(text, flush=True)


def _train(start: Start, stop: StopRequest, watch: Watchdog) -> Outcome:
    config = start.config
    engine = create_engine(config.engine, config.train, config.optimizer, start.spec)
    task = prepared_task(start, engine)
    training = _Training(start, engine, task, stop, watch)
    try:
        resume = training.choose()
        print_once(training.opening(resume))
        engine.barrier()  # all processes have read the folder
        if engine.rank == 0:
            origin = origin_of(start.origin) or start.folder.origin(config.run.cooldown_of)
            start.folder.record_start(to_yaml(config), origin)
        remedies = memory_remedies(config, engine.world_size)
        with diagnostics.explain_out_of_memory(remedies, engine.rank, start.folder.out_of_memory):
            while isinstance(ended := training.attempt(resume), Diverged):
                resume = training.roll_back(ended)
        return ended
    finally:
        engine.close()


def prepared_task(start: Start, engine: Engine) -> Task:
    """The task of a run, with its model built, prepared by the engine and compiled; every process calls it."""
    config = start.config
    set_arithmetic(config.engine.precision)
    torch.manual_seed(config.train.seed)
    remedies = memory_remedies(config, engine.world_size)
    with diagnostics.explain_out_of_memory(remedies, engine.rank, folder=None):  # there may be no run folder yet
        with nullcontext() if config.machine.freeze_codec else engine.building():  # a frozen codec is not sharded
            task = task_of(config, start.origin, start.receivers)
        engine.prepare(task.module)
        task.place(engine.device)
    if config.engine.compile:
        compile_regions(nn.ModuleList([task.module, task.codec]))  # a frozen codec is not part of the module
    return task


@dataclass
class _Training:
    """One run; each rollback after a divergence begins another attempt."""

    start: Start
    engine: Engine
    task: Task
    stop: StopRequest
    watch: Watchdog

    def __post_init__(self) -> None:
        start = self.start
        config = start.config
        costs = costs_by_phase(start.spec.phases, config.model, config.machine, config.optimizer, start.receivers)
        self.costs = {image: of_phase.training_flops_per_image for image, of_phase in costs.items()}
        self.parameters = costs[0].parameters
        self.described = {"parameters": self.parameters, "parameters_by_part": costs[0].parameters_by_part}
        self.described |= {"environment": environment()}
        self.averages = EMA(self.engine, config.train.ema)

    def choose(self) -> Resume:
        """The checkpoint to resume from; the processes have verified every byte of it together."""
        engine, folder = self.engine, self.start.folder

        def examine(checkpoint: Checkpoint) -> str:
            flaw = checkpoint.flaw(hashes=True, rank=engine.rank, world_size=engine.world_size)
            return next(filter(None, engine.gather(flaw)), "")

        found = set(engine.gather(folder.checkpoints.reached()))
        if len(found) > 1:
            raise UserError(
                "unshared-run-dir",
                "run.dir",
                f"some processes find step {max(found)} in run.dir={folder.path} and others do not; put it on a file "
                "system shared by all nodes",
            )
        return find_resume(folder, self.start.config, self.start.spec, self.start.index.digest, examine)

    def attempt(self, resume: Resume) -> Outcome | Diverged:
        """Train from `resume` on; returns Diverged, on all processes, for a rollback."""
        config, spec, engine, folder = self.start.config, self.start.spec, self.engine, self.start.folder
        divergences = self.divergences()
        peak = peak_flops(engine.device, config.engine.precision == Precision.bf16)
        tracker = ComputeTracker(self.costs, engine.device, peak and peak * engine.world_size)
        recorder = Recorder(
            folder,
            config.log,
            config.run,
            to_dict(config),
            steps=config.train.steps,
            first=engine.rank == 0,
            step=resume.step,
            unevaluated=self.is_unevaluated(resume),
            facts=self.described,
        )
        saver = Saver(engine, folder.checkpoints, config.train, recorder.sync, self.averages.state_shards())
        trainer = Trainer(
            train_config=config.train,
            schedule=config.schedule,
            spec=spec,
            log_config=config.log,
            eval_config=config.eval,
            max_corrupt_samples=config.data.max_corrupt_samples,
            engine=engine,
            task=self.task,
            folder=folder,
            recorder=recorder,
            tracker=tracker,
            images=self.start.images,
            data_digest=self.start.index.digest,
            images_in_set=self.start.index.images,
            stop=self.stop,
            saver=saver,
            averages=self.averages,
            alive=self.watch.progress,
            rollbacks=len(divergences),
        )
        try:
            with ExitStack() as ending:
                ending.push(lambda kind, *_: recorder.close(exit_code=int(kind not in (None, Diverged))))
                ending.callback(saver.close)
                self._load(resume, trainer)
                stream = batches(
                    config.data,
                    config.train.seed,
                    spec,
                    trainer.step,
                    rank=engine.rank,
                    index=self.start.index,
                    left_out=[range(noted.first, noted.last + 1) for noted in divergences],
                )
                ending.enter_context(closing(stream))
                if resume.choice is None and config.train.on_divergence == OnDivergence.rollback:
                    trainer.checkpoint()  # for a rollback of the first steps
                tracker.start_clock()
                trainer.train(stream)
                self._finish(trainer)
                asked = float(engine.reduce(torch.tensor([float(self.stop.received())])))
                return Outcome(done=not trainer.stopped, asked=asked > 0)
        except Diverged as diverged:
            return diverged.with_traceback(None)  # which would keep the tensors of this attempt alive

    def divergences(self) -> list[Divergence]:
        """Those recorded so far, as rank 0 reads them: a shared file system may show them late elsewhere."""
        return self.engine.gather(self.start.folder.divergences() if self.engine.rank == 0 else [])[0]

    def roll_back(self, diverged: Diverged) -> Resume:
        """The checkpoint to resume from, without the images of the step that diverged."""
        folder, train = self.start.folder, self.start.config.train
        before = self.divergences()
        if len(before) >= train.max_rollbacks:
            raise UserError(
                "too-many-rollbacks",
                "train.max_rollbacks",
                f"{diverged}, after train.max_rollbacks={train.max_rollbacks} rollbacks; start a new run with a lower "
                "schedule.learning_rate, or allow more",
            )
        resume = self.choose()
        if resume.choice is None:
            raise UserError(
                "no-rollback-checkpoint",
                "run.dir",
                f"{diverged}, and no checkpoint could be written to roll back to; correct the cause and start again",
            )
        first, last = images_to_skip(diverged.step, resume.step, before, self.start.spec.images_at)
        if self.engine.rank == 0:
            folder.note_divergence(Divergence(diverged.step, diverged.reason, first, last))
        for damaged in resume.choice.damaged:
            print_once(f"skipped: {damaged}")
        print_once(
            f"{diverged}: rolled back to step {resume.step}, continuing without the images {first:,} to {last:,}"
        )
        return resume

    def opening(self, resume: Resume) -> str:
        """Summary of the run and of its costs."""
        config, spec, engine, folder = self.start.config, self.start.spec, self.engine, self.start.folder
        stage = f"ZeRO {config.engine.zero_stage}" if config.engine.name == EngineName.deepspeed else "accelerate"
        lines = [
            f"{folder.path}: {config.model.name}, {self.parameters:,} parameters, {self.task.aim}, "
            f"{stage} on {engine.world_size} × {engine.device.type}, {config.train.steps:,} steps of "
            f"{spec.batch}, {flops_of(self.costs, spec.images) / PETA:.4g} PFLOPs"
        ]
        if resume.previous_steps is None and needs_placement(config.model):
            lines.append(
                "the public implementation cannot load its weights: `hpcm export` needs model.hyper_placement=upstream"
            )
        if self.start.origin:
            lines.append(f"starting from {self.start.origin.path}")
        if resume.choice:
            checkpoint = resume.choice.checkpoint
            lines += [f"skipped: {damaged}" for damaged in resume.choice.damaged]
            if checkpoint.folder.parent == folder.checkpoints.folder:
                lines.append(f"resuming from step {resume.step} ({checkpoint.folder.name})")
            else:
                lines.append(f"cooldown of {config.run.cooldown_of} from step {resume.step}")
        if resume.previous_steps not in (None, config.train.steps):
            crops = " and the crop schedule" if config.schedule.crops else ""
            lines.append(
                f"train.steps changes from {resume.previous_steps} to {config.train.steps}: the learning-rate "
                f"schedule{crops}, if given in fractions of the run, changes with it"
            )
        return "\n".join(lines)

    def _load(self, resume: Resume, trainer: Trainer) -> None:
        if resume.choice is None:
            return
        checkpoint, state, _ = resume.choice
        files, _ = checkpoint.read()
        try:
            load(
                [checkpoint.folder / name for name in files],
                [*self.engine.state_shards(), *self.averages.state_shards()],
            )
        except ValueError as error:
            raise UserError(
                "other-model-checkpoint",
                "run.dir",
                f"{checkpoint.folder} does not fit this model ({error}); choose another run.dir",
            ) from error
        self.engine.load_master_weights(state["updates"])
        self.averages.load(state["updates"])
        trainer.load_state(state | {"unevaluated": self.is_unevaluated(resume)})

    def is_unevaluated(self, resume: Resume) -> bool:
        """Whether the run was interrupted in the evaluation after its own checkpoint."""
        choice, own = resume.choice, self.start.folder.checkpoints.folder
        return bool(choice and choice.checkpoint.folder.parent == own and choice.state.get("unevaluated"))

    def _finish(self, trainer: Trainer) -> None:
        """Export the weights of a finished run, or print how a stopped one is resumed."""
        config, folder, step = self.start.config, self.start.folder, trainer.step
        if step < config.train.steps:
            if not trainer.stopped:
                trainer.recorder.print(
                    f"stopped at step {step} of {config.train.steps}; without train.stop_after the command continues"
                )
            return
        spent = {"step": step, "images": trainer.tracker.images, "pflops": trainer.tracker.pflops}
        for length in self.averages.lengths:
            with self.averages.in_place(length):
                self._export(folder.ema_file(length), spent | {"ema": length})
        self._export(folder.weights_file, spent)  # last: it marks the run as finished
        trainer.recorder.print(f"finished at step {step}: {folder.weights_file}")

    def _export(self, path: Path, spent: dict[str, Any]) -> None:
        """Export the current weights; every process calls it."""
        state = self.engine.weights()
        if state is not None:
            with writing(path):
                self.task.save(path, state, spent, self.start.folder.origin(self.start.config.run.cooldown_of))
