"""The parts of training that need no other process: schedule, noise, meter, folders, checkpoints, costs."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from hpcm_scale.compute.flops import saved_bytes
from hpcm_scale.config.compose import compose, compose_model, to_dict
from hpcm_scale.config.schema import Config, Precision, ScheduleConfig
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective.rate_distortion import rate_distortion_loss
from hpcm_scale.training import estimate as estimates
from hpcm_scale.training.accelerate_engine import AccelerateEngine
from hpcm_scale.training.checkpoints import Checkpoints
from hpcm_scale.training.costs import activation_bytes, on_meta, training_flops_per_image
from hpcm_scale.training.engine import poisoned
from hpcm_scale.training.meter import Meter
from hpcm_scale.training.noise import image_noise
from hpcm_scale.training.optimizer import clip_and_guard, create_optimizer, set_learning_rate
from hpcm_scale.training.processes import without_launcher_arguments
from hpcm_scale.training.run import run_directory
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.schedule import learning_rate
from hpcm_scale.training.signals import StopRequest

# The learning rate


def test_the_papers_schedule_at_its_own_length():
    schedule, steps = ScheduleConfig(), 2_000_000
    expected = {0: 1e-4, 1_599_999: 1e-4, 1_600_000: 3e-5, 1_799_999: 3e-5, 1_800_000: 1e-5, 1_900_000: 1e-6}
    for step, rate in (expected | {1_999_999: 1e-6}).items():
        assert learning_rate(schedule, step, steps) == pytest.approx(rate, rel=1e-12), step


@pytest.mark.parametrize("steps", [20, 240, 1000, 12_345, 999_983])
def test_fractions_drop_at_the_first_step_at_or_after_them(steps):
    schedule = ScheduleConfig(1.0, [0.1, 0.7, 0.9], [4.0, 3.0, 2.0, 1.0])
    drops = [
        step
        for step in range(1, steps)
        if learning_rate(schedule, step, steps) != learning_rate(schedule, step - 1, steps)
    ]
    assert drops == [math.ceil(steps / 10), math.ceil(7 * steps / 10), math.ceil(9 * steps / 10)]


def test_boundaries_in_steps_do_not_move_with_the_length():
    schedule = ScheduleConfig(1.0, [10, 20], [1.0, 0.5, 0.25])
    for steps in (15, 30, 1000):
        rates = [learning_rate(schedule, step, steps) for step in (0, 9, 10, 19, 20, 29)]
        assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_warm_up_is_linear_and_multiplies():
    schedule = ScheduleConfig(2.0, [0.5], [1.0, 0.1], warmup=4)
    assert [learning_rate(schedule, step, 100) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(ScheduleConfig(2.0, [2], [1.0, 0.1], warmup=4), 2, 100) == pytest.approx(0.15)
    assert learning_rate(ScheduleConfig(2.0, [], [1.0]), 99, 100) == 2.0


# The noise of the likelihoods


@pytest.fixture(scope="module")
def nano() -> HPCM:
    torch.manual_seed(0)
    return HPCM(compose_model("nano"))


def noise_of(model: HPCM, indices: list[int], seed: int = 0):
    return image_noise(model, torch.zeros(len(indices), 3, 256, 256), torch.tensor(indices), seed)


def test_noise_belongs_to_the_image_not_to_the_batch(nano):
    together = noise_of(nano, [3, 4, 5, 6])
    apart = [noise_of(nano, indices) for indices in ([3], [6, 5], [4])]
    for kind in ("y", "z"):
        first, second, third = (getattr(noise, kind) for noise in apart)
        assert torch.equal(getattr(together, kind), torch.cat([first, third, second.flip(0)]))


def test_noise_is_uniform_independent_and_seeded(nano):
    noise = noise_of(nano, [0, 1, 2**40])
    assert noise.y.shape == (3, 16, 16, 16) and noise.z.shape == (3, 16, 4, 4)
    assert noise.y.dtype == noise.z.dtype == torch.float32
    assert noise.y.min() >= -0.5 and noise.y.max() < 0.5
    assert abs(noise.y.mean()) < 0.01 and noise.y.var() == pytest.approx(1 / 12, rel=0.03)
    other_seed = noise_of(nano, [0, 1, 2**40], seed=1)
    samples = torch.cat([noise.y.flatten(1), other_seed.y.flatten(1)])
    assert (torch.corrcoef(samples) - torch.eye(6)).abs().max() < 0.08
    assert torch.equal(noise_of(nano, [1]).y[0], noise.y[1])


# The meter


def test_the_meter_averages_finite_steps_and_counts_the_others():
    meter = Meter()
    meter.add({"loss": 2.0, "grad_norm": 1.0}, skipped=False)
    meter.add({"loss": math.nan, "grad_norm": None}, skipped=True)
    meter.add({"loss": 4.0, "grad_norm": 3.0}, skipped=False)
    resumed = Meter(**json.loads(json.dumps(meter.state())))
    assert resumed.take(["loss", "grad_norm"]) == {"loss": 3.0, "grad_norm": 2.0, "skipped": 1}
    assert resumed.take(["loss"]) == {"loss": None, "skipped": 0}
    assert meter.take(["loss"])["loss"] == 3.0


# Steps that must not be taken


def test_a_loss_that_is_not_finite_poisons_every_gradient():
    for value in (math.inf, -math.inf, math.nan):
        weights = torch.ones(3, requires_grad=True)
        poisoned((weights * torch.tensor([0.0, 1.0, 2.0])).sum() + value).backward()
        assert weights.grad.isnan().all()
    weights = torch.ones(3, requires_grad=True)
    poisoned((weights**2).sum()).backward()
    assert torch.equal(weights.grad, torch.full((3,), 2.0))


def test_the_guarded_adam_leaves_a_bad_step_out_and_goes_on():
    torch.manual_seed(0)
    reference, guarded = nn.Linear(4, 3), nn.Linear(4, 3)
    guarded.load_state_dict(reference.state_dict())
    train = Config().train
    optimizers = [create_optimizer(layer.parameters(), train) for layer in (reference, guarded)]
    x = torch.randn(5, 4)

    def step(layer, optimizer, scale: float) -> float:
        set_learning_rate(optimizer, 1e-2)
        (layer(x).square().sum() * scale).backward()
        norm = float(clip_and_guard(optimizer, clip_norm=1.0))
        optimizer.step()
        optimizer.zero_grad()
        return norm

    for _ in range(3):
        norms = [step(layer, optimizer, 1.0) for layer, optimizer in zip((reference, guarded), optimizers, strict=True)]
        assert norms[0] == norms[1] > 1
    assert not math.isfinite(step(guarded, optimizers[1], math.nan))
    assert optimizers[1].overflow
    for _ in range(3):
        assert step(reference, optimizers[0], 1.0) == step(guarded, optimizers[1], 1.0)
    assert not optimizers[1].overflow
    assert torch.equal(reference.weight, guarded.weight)


def test_sigterm_is_noted_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    assert not request.received
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.received
    request.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_launchers_argument_is_taken_out():
    arguments = ["--local_rank=3", "model=nano", "-m"]
    assert without_launcher_arguments(arguments) == ["model=nano", "-m"]


# Run folders


def started(path, config: Config | None = None) -> RunFolder:
    folder = RunFolder(path)
    folder.write_facts(config or compose(["model=nano"]))
    return folder


def checkpoint(folder: RunFolder, step: int, **changes) -> None:
    state = {"step": step, "world_size": 2, "data": "digest"} | changes
    path = folder.checkpoints.folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "complete.json").write_text(json.dumps(state))


def refused(folder: RunFolder, config: Config, world_size: int = 2, digest: str = "digest") -> str:
    before = sorted(folder.path.rglob("*")) if folder.path.is_dir() else None
    with pytest.raises(UserError) as error:
        folder.resume(config, world_size, digest)
    assert before == (sorted(folder.path.rglob("*")) if folder.path.is_dir() else None)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_run_takes_a_new_or_empty_folder(tmp_path):
    config = compose(["model=nano"])
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        resume = RunFolder(tmp_path / name).resume(config, 2, "digest")
        assert resume.checkpoint is None and resume.previous is None and resume.step == 0
    assert not (tmp_path / "new").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    (tmp_path / "file").write_text("")
    for name in ("photos", "file"):
        assert "is not a run; choose another run.dir" in refused(RunFolder(tmp_path / name), config)


def test_where_an_unnamed_run_goes():
    assert str(run_directory(compose(["model=nano"]))) == "runs/nano"
    assert str(run_directory(compose(["model=nano", "run.dir=a/b"]))) == "a/b"


def test_the_same_command_goes_on_from_the_newest_checkpoint(tmp_path):
    config = compose(["model=nano"])
    folder = started(tmp_path / "run")
    assert folder.resume(config, 2, "digest").step == 0
    for step in (40, 80):
        checkpoint(folder, step, meter={"steps": 3})
    (folder.checkpoints.folder / "step_00000120").mkdir()  # interrupted: no marker
    resume = folder.resume(config, 2, "digest")
    assert resume.step == 80 and resume.checkpoint.name == "step_00000080"
    assert resume.state["meter"] == {"steps": 3} and resume.previous == config


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "options"
        result |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return result


FREE = ["train.steps", "train.stop_after", "train.checkpoint_every", "train.keep_checkpoints", "train.max_skipped"]
FREE += ["data.shards", "data.workers", "data.prefetch", "data.cache", "data.retries", "data.timeout"]
FREE += ["eval.images", "eval.every", "eval.limit", "engine.world_size"]
FREE += ["log.every", "log.wandb", "log.project", "log.images", "run.dir", "run.sweep"]
OTHERS = {
    "data.shards": "elsewhere",
    "data.cache": "elsewhere",
    "eval.images": "elsewhere",
    "run.dir": "elsewhere",
    "run.sweep": "other",
    "model.name": "other",
    "model.fusion": "none",
    "model.hyper_placement": "upstream",
    "engine.name": "accelerate",
    "engine.precision": "bf16",
    "log.wandb": "disabled",
    "log.project": "other",
    "engine.options": {"seed": 1},
}


def other(key: str, value: object) -> object:
    """Some other value of the key's type."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [entry / 2 if isinstance(entry, float) else entry + 1 for entry in value]
    return value / 2 if isinstance(value, float) else (value or 0) + 1


NANO = compose(["model=nano"])
KEYS = flat(to_dict(NANO))


@pytest.fixture(scope="module")
def run_at_40(tmp_path_factory) -> RunFolder:
    folder = started(tmp_path_factory.mktemp("runs") / "run")
    checkpoint(folder, 40)
    return folder


@pytest.mark.parametrize("key", KEYS)
def test_what_may_change_when_a_run_goes_on(key, run_at_40):
    """Every key there is: those that would make it another run are refused by name, with both values."""
    structured = OmegaConf.structured(NANO)
    OmegaConf.update(structured, key, other(key, KEYS[key]))
    config = OmegaConf.to_object(structured)
    assert flat(to_dict(config))[key] != KEYS[key]
    if key in FREE:
        assert run_at_40.resume(config, 2, "digest").step == 40
    else:
        text = refused(run_at_40, config)
        assert key in text and "choose another run.dir" in text


def test_another_launch_or_other_photos_are_refused(run_at_40):
    config = compose(["model=nano"])
    assert "was trained by 2 processes, not 4; start as many" in refused(run_at_40, config, world_size=4)
    assert "data.shards" in refused(run_at_40, config, digest="other")
    shorter = compose(["model=nano", "train.steps=39"])
    assert "has 40 steps already, more than train.steps=39" in refused(run_at_40, shorter)
    longer = compose(["model=nano", "train.steps=40"])
    assert run_at_40.resume(longer, 2, "digest").previous.train.steps == 2_000_000


def test_a_damaged_configuration_is_told(tmp_path):
    folder = started(tmp_path / "run")
    folder.config_file.write_text("train: {steps: 10")
    assert "config.yaml is damaged" in refused(folder, compose(["model=nano"]))


def test_the_folder_records_every_start(tmp_path):
    folder = started(tmp_path / "run")
    folder.write_facts(compose(["model=nano", "train.steps=7"]))
    starts = json.loads(folder.environment_file.read_text())
    assert len(starts) == 2 and all("torch" in start["packages"] for start in starts)
    assert folder.resume(compose(["model=nano", "train.steps=7"]), 2, "digest").previous.train.steps == 7
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "environment.json"]


# Checkpoints


@pytest.fixture(scope="module")
def engine() -> AccelerateEngine:
    """A real engine with a real, small model: one process, no group."""
    engine = AccelerateEngine(compose(["model=nano", "engine=accelerate"]))
    torch.manual_seed(0)
    engine.prepare(nn.Linear(4, 4))
    return engine


def train_step(engine: AccelerateEngine) -> float:
    loss = engine.module(torch.arange(8.0, device=engine.device).view(2, 4)).square().mean()
    engine.backward(loss)
    engine.step(1e-2)
    return loss.item()


def test_retention_and_marker(engine, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    (checkpoints.folder / "step_00000005").mkdir(parents=True)  # of a save that never finished
    for step in (10, 20, 30):
        checkpoints.save(engine, {"step": step, "note": "λ"}, keep=2)
        path, state = checkpoints.newest()
        assert path.name == f"step_{step:08d}" and state == {"step": step, "note": "λ"}
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_00000020", "step_00000030"]
    checkpoints.save(engine, {"step": 100_000_000}, keep=1)
    assert [path.name for path in checkpoints.complete()] == ["step_100000000"]


def test_training_goes_on_from_a_checkpoint_bit_for_bit(engine, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for _ in range(3):
        train_step(engine)
    checkpoints.save(engine, {"step": 3}, keep=1)
    losses = [train_step(engine) for _ in range(3)]
    engine.load(checkpoints.newest()[0])
    assert [train_step(engine) for _ in range(3)] == losses
    assert losses[0] > losses[1] > losses[2]


def test_an_interrupted_save_leaves_the_last_one_valid(engine, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, {"step": 10}, keep=1)

    def fails(folder) -> None:
        (folder / "engine.pt").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(engine, "save", fails)
        checkpoints.save(engine, {"step": 20}, keep=1)
    assert checkpoints.newest()[1] == {"step": 10}
    checkpoints.save(engine, {"step": 20}, keep=1)
    assert checkpoints.newest()[1] == {"step": 20}
    engine.load(checkpoints.newest()[0])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]


def test_a_damaged_marker_is_told_with_its_mend(engine, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, {"step": 10}, keep=1)
    (tmp_path / "step_00000010" / "complete.json").write_text("{")
    with pytest.raises(UserError, match=r"step_00000010.* is damaged; remove .*step_00000010"):
        checkpoints.newest()


# What a run costs


@pytest.mark.parametrize("precision", Precision)
def test_activations_on_fake_tensors_are_those_of_a_real_pass(precision, nano):
    model = HPCM(compose_model("nano"), precision=precision)
    x = torch.rand(2, 3, 256, 256)
    noise = noise_of(nano, [0, 1])

    def forward() -> torch.Tensor:
        coded = model(x, noise)
        return rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean()

    assert activation_bytes(model.config, precision, 256, 2) == saved_bytes(forward)


def test_activations_grow_with_the_crops_and_shrink_with_precision():
    config = compose_model("nano")
    one, two = (activation_bytes(config, Precision.fp32, 256, images) for images in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    assert activation_bytes(config, Precision.fp32, 512, 1) == pytest.approx(4 * one, rel=0.01)
    assert 0.5 * one < activation_bytes(config, Precision.bf16, 256, 1) < 0.85 * one


@pytest.fixture(autouse=True, scope="module")
def worked_out_once():
    """The same activations and FLOPs are asked for by many tests below, and take a second each."""
    known: dict[str, int] = {}

    def once(function):
        def answer(*arguments) -> int:
            key = repr((function.__name__, arguments))
            if key not in known:
                known[key] = function(*arguments)
            return known[key]

        return answer

    with pytest.MonkeyPatch.context() as patched:
        for name in ("activation_bytes", "training_flops_per_image"):
            patched.setattr(estimates, name, once(getattr(estimates, name)))
        yield


def needs(*overrides: str, world_size: int = 1) -> estimates.Estimate:
    """The estimate of a run of micro."""
    return estimates.estimate(compose(["model=micro", "train.batch_size=8", *overrides]), world_size)


# Bytes per parameter: weights, gradients, optimizer. Measured as tensors alive after a step of a real engine of
# DeepSpeed 0.19.8 on one process, which shards nothing away: stages 1 and 2 keep a second, flat copy of the weights
# for the optimizer; stage 3 a flat copy beside the gathered ones.
ONE_PROCESS = {
    "accelerate": (4, 4, 8),
    "zero0": (4, 4, 8),
    "zero1": (4, 4, 12),
    "zero2": (4, 4, 12),
    "zero3": (8, 4, 8),
}


@pytest.mark.parametrize("engine_name", ONE_PROCESS)
def test_memory_on_one_process(engine_name):
    result = needs(f"engine={engine_name}")
    memory, expected = result.memory, ONE_PROCESS[engine_name]
    measured = memory.weights, memory.gradients, memory.optimizer
    assert [value / result.parameters for value in measured] == pytest.approx(expected)
    assert memory.host == 0
    assert memory.activations == activation_bytes(compose_model("micro"), Precision.fp32, 256, 8)
    assert memory.device >= sum(measured) + memory.activations


# What is divided over the processes: nothing, the optimizer, also the gradients, also the weights.
@pytest.mark.parametrize(("engine_name", "shared"), [("zero0", ""), ("zero1", "o"), ("zero2", "og"), ("zero3", "ogw")])
def test_memory_on_eight_processes(engine_name, shared):
    alone, memory = needs(f"engine={engine_name}").memory, needs(f"engine={engine_name}", world_size=8).memory
    assert memory.gradients == pytest.approx(alone.gradients / (8 if "g" in shared else 1), rel=1e-5)
    assert memory.optimizer == pytest.approx(alone.optimizer / (8 if "o" in shared else 1), rel=1e-5)
    if "w" in shared:  # a share, and the layers gathered at a time: all of them for so small a model
        assert memory.weights == pytest.approx(alone.weights / 2 * (1 + 1 / 8), rel=1e-5)
    else:
        assert memory.weights == alone.weights
    assert memory.activations == pytest.approx(alone.activations / 8, rel=0.05)


def test_offload_keeps_the_state_in_host_memory():
    memory = needs("engine=zero3_offload", world_size=2).memory
    assert memory.gradients == memory.optimizer == 0
    assert memory.host == pytest.approx((4 + 4 + 12) * needs().parameters / 2, rel=1e-5)


def test_accumulation_costs_no_memory():
    whole, parts = needs(), needs("train.micro_batch_size=1")
    assert parts.memory.activations < whole.memory.activations / 7
    assert parts.pflops == whole.pflops


def test_flops_and_time_of_a_run():
    result = needs("train.steps=1000")
    flops = training_flops_per_image(on_meta(compose_model("micro")), 256)
    assert result.images == 8000 and result.flops_per_image == flops
    assert result.pflops == pytest.approx(8000 * flops / 1e15)
    assert result.seconds(peak=1e15, mfu=0.5) == pytest.approx(2 * result.pflops)
