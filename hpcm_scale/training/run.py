"""One training run, from a checked configuration to exported weights."""

from __future__ import annotations

import torch

from hpcm_scale.compute.hardware import peak_flops
from hpcm_scale.compute.tracker import PETA, ComputeTracker
from hpcm_scale.config.checks import micro_batch_size
from hpcm_scale.config.schema import Config, EngineName, Precision
from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.data.index import ShardIndex
from hpcm_scale.data.stream import open_stream
from hpcm_scale.errors import UserError, is_first_process
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.shapes import on_meta, parameter_count, parameters_by_part
from hpcm_scale.model.weights import save_weights
from hpcm_scale.tracking.environment import environment
from hpcm_scale.training import processes
from hpcm_scale.training.costs import training_flops_per_image
from hpcm_scale.training.engine import Engine, create_engine
from hpcm_scale.training.loop import Trainer
from hpcm_scale.training.recorder import Recorder
from hpcm_scale.training.run_folder import Resume, RunFolder
from hpcm_scale.training.signals import StopRequest
from hpcm_scale.training.start import prepare


def run(config: Config) -> None:
    """Train, or go on training, what the configuration describes, in the folder `run.dir`.

    Every process of the launch calls it. All that can be refused is refused before they start to talk to
    each other: UserError, one sentence.
    """
    start = prepare(config, processes.world_size())
    if start.finished:
        tell(f"{start.folder.path} is finished at step {start.resume.step}; a larger train.steps would lengthen it")
        return
    processes.complete_environment()
    _train(config, start.folder, start.resume, start.images, start.index)


def tell(text: str) -> None:
    """Say something to the user, once."""
    if is_first_process():
        print(text, flush=True)


def _train(config: Config, folder: RunFolder, resume: Resume, images: ImageSet | None, index: ShardIndex) -> None:
    shapes = on_meta(config.model)
    flops = training_flops_per_image(shapes, config.data.crop)
    parameters = parameter_count(shapes)
    engine = create_engine(config)
    if engine.reduce(torch.tensor([float(resume.step)])).item() != resume.step * engine.world_size:
        raise UserError(
            f"some processes find step {resume.step} in run.dir={folder.path} and others do not; "
            "put it on a file system that all machines share"
        )
    torch.backends.cudnn.allow_tf32 = False  # what is to be fp32 is fp32
    torch.manual_seed(config.train.seed)
    model = HPCM(config.model, precision=config.engine.precision)
    engine.prepare(model)
    peak = peak_flops(engine.device, config.engine.precision == Precision.bf16)
    tracker = ComputeTracker(flops, engine.device, peak and peak * engine.world_size)
    tell(_opening(config, folder, resume, engine, parameters, flops))
    if engine.rank == 0:
        folder.write_facts(config)
    facts = {"parameters": parameters, "parameters_by_part": parameters_by_part(shapes)}
    facts |= {"environment": environment()}
    recorder = Recorder(folder, config, first=engine.rank == 0, step=resume.step, facts=facts)
    trainer = Trainer(config, engine, model, folder, recorder, tracker, images, index.digest, StopRequest())
    stream = None
    failed = True
    try:
        if resume.checkpoint:
            engine.load(resume.checkpoint)
            trainer.load_state(resume.state)
        stream = open_stream(
            config.data,
            seed=config.train.seed,
            first_image=trainer.step * config.train.batch_size,
            last_image=None,
            batch_size=config.train.batch_size,
            micro_batch_size=micro_batch_size(config, engine.world_size),
            rank=engine.rank,
            world_size=engine.world_size,
            index=index,
        )
        tracker.start_clock()
        trainer.train(stream)
        _finish(trainer, engine)
        failed = False
    finally:
        trainer.stop.close()
        if stream is not None:
            stream.close()
        recorder.close(exit_code=int(failed))
        engine.close()


def _finish(trainer: Trainer, engine: Engine) -> None:
    """Export the weights of a finished run, or say how a stopped one goes on."""
    config, folder, step = trainer.config, trainer.folder, trainer.step
    if step < config.train.steps:
        if config.train.stop_after is not None and step >= config.train.stop_after:
            trainer.recorder.say(
                f"stopped at step {step} of {config.train.steps}; without train.stop_after the same command goes on"
            )
        return
    state = engine.weights()
    if state is not None:
        facts = {
            "lmbda": config.objective.lmbda,
            "precision": config.engine.precision.value,
            "step": step,
            "images": trainer.tracker.images,
            "pflops": trainer.tracker.pflops,
        }
        save_weights(folder.weights_file, state, config.model, facts)
    trainer.recorder.say(f"finished at step {step}: {folder.weights_file}")


def _opening(config: Config, folder: RunFolder, resume: Resume, engine: Engine, parameters: int, flops: int) -> str:
    """What is about to happen, and what it will cost."""
    stage = f"ZeRO {config.engine.zero_stage}" if config.engine.name == EngineName.deepspeed else "accelerate"
    lines = [
        f"{folder.path}: {config.model.name}, {parameters:,} parameters, λ = {config.objective.lmbda}, {stage} on "
        f"{engine.world_size} × {engine.device.type}, {config.train.steps:,} steps of "
        f"{config.train.batch_size} images, {config.train.steps * config.train.batch_size * flops / PETA:.4g} PFLOPs"
    ]
    if resume.checkpoint and resume.checkpoint.parent == folder.checkpoints.folder:
        lines.append(f"going on from step {resume.step} ({resume.checkpoint.name})")
    elif resume.checkpoint:
        lines.append(f"branching off {config.run.branch_of} at step {resume.step}")
    if resume.previous and resume.previous.train.steps != config.train.steps:
        lines.append(
            f"train.steps changes from {resume.previous.train.steps} to {config.train.steps}: the learning-rate "
            "schedule, where it is in fractions of the run, changes with it"
        )
    return "\n".join(lines)
