"""The typed configuration: every key a run can be given, its type, unit and default, and of numbers the range.

Hydra composes these dataclasses from `conf/`; nothing below `config/` knows about Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpcm_scale.config.choices import (
    Checkpointing,
    Distortion,
    EngineName,
    Fusion,
    HyperPlacement,
    Likelihood,
    OnDivergence,
    Parametrisation,
    Precision,
    Target,
    WandbMode,
)
from hpcm_scale.limits import COUNT, COUNT_OR_NONE, CROP, LAMBDA, Range, number

WIDTH = Range(least=1, most=16_384)
"""Channels."""
BLOCKS = Range(least=0, most=128)
"""Residual blocks in a row."""
IMAGES = Range(least=1, most=1_000_000)
"""Of a batch; processes have at least one each."""
WEIGHT = Range(least=0, most=1e9)
PART_OR_STEP = Range(above=0, most=COUNT.most)
"""Part of a run, or one of its steps."""
AVERAGE = Range(least=0.001, below=12**-0.5)
"""Length of an average; at 1/√12 all weights so far count alike."""
LARGE = Range(above=0, most=1e30)
YEAR_MINUTES = 525_600


@dataclass
class PriorConfig:
    """Depth of one prior network of the context model (residual blocks of depthwise convolutions)."""

    before: int = number(2, BLOCKS)
    """Blocks before the step's channel scale q."""
    after: int = number(1, BLOCKS)
    """Blocks between q and the 1×1 convolution to scales and means."""
    refine: int = number(0, BLOCKS)
    """Blocks after that convolution."""


@dataclass
class RateConfig:
    """Variable rate: one model for a range of λ, at levels that are log-spaced over it."""

    levels: int = number(1, Range(least=1, most=256))
    """λ that the model has learned gains for, as many as a file's byte tells apart; 1: fixed rate, and none of this."""
    lowest: float = number(0.0018, LAMBDA)
    """λ of level 0; that of the paper's smallest files."""
    highest: float = number(0.0483, LAMBDA)
    """λ of the last level."""
    reference: float = number(0.013, LAMBDA)
    """λ at which the gains start at 1: that of the fixed-rate model that training starts from."""


@dataclass
class ModelConfig:
    """One HPCM; the sizes are in `conf/model/`."""

    name: str = "68m"
    family: str = "hpcm"
    """What the transforms are made of: a file in hpcm_scale/model/families."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the family's own; the same file lists them."""
    size: str | None = None
    """Parameters, 100k to 10b: widths, depths and attention_heads follow from it by the family's rule."""
    channels: list[int] = number([96, 192, 384], WIDTH)
    """c1, c2, c3: channels of the transforms at 1/2, 1/4 and 1/8 resolution."""
    latent_channels: int = number(320, Range(least=8, most=16_384))
    """M: channels of y, at 1/16 resolution; a multiple of 8 (the coding order's channel groups)."""
    hyper_latent_channels: int = number(256, WIDTH)
    """N: channels of z, at 1/64 resolution."""
    hyper_channels: int = number(256, WIDTH)
    """h: channels of the hyper transforms between y and z."""
    stem_kernel: int = number(4, Range(least=2, most=4))
    """Kernel of the first and last convolution: 4 (stride 2, pad 1) or 2 (stride 2)."""
    g_a_blocks: list[int] = number([2, 2, 4, 0], BLOCKS)
    """Residual blocks after each downsampling, fine to coarse: at c1, c2, c3, M."""
    g_s_blocks: list[int] = number([0, 4, 2, 2], BLOCKS)
    """Residual blocks before each upsampling, coarse to fine: at M, c3, c2, c1."""
    hyper_blocks: list[int] = number([1, 3], BLOCKS)
    """a, b: blocks of the hyper transforms at 1/16 and at 1/32 resolution."""
    prior_s1_s2: PriorConfig = field(default_factory=PriorConfig)
    prior_s3: PriorConfig = field(default_factory=lambda: PriorConfig(before=3, after=2))
    adaptor_blocks: list[int] = number([0, 0, 0], BLOCKS)
    """Blocks of each step's adaptor at scales s1, s2, s3; 0: one 1×1 convolution."""
    fusion: Fusion = Fusion.attention
    attention_heads: int = number(32, WIDTH)
    """Heads of the window cross-attention over 2M channels."""
    partial_ratio: int = number(4, WIDTH)
    """r: the partial 3×3 convolution sees the first C/r channels."""
    expansion: int = number(4, Range(least=1, most=64))
    """m: the residual blocks of the transforms widen C to mC."""
    hyper_placement: HyperPlacement = HyperPlacement.aligned
    rate: RateConfig = field(default_factory=RateConfig)


@dataclass
class DataConfig:
    """Where the training photos come from and how they are cut."""

    shards: str | None = None
    """Folder or URL (http, https, any fsspec scheme) that holds index.json and the shards."""
    more_shards: list[str] = field(default_factory=list)
    """Further such sets, mixed in."""
    weights: list[float] = number([], WEIGHT)
    """Shares of data.shards and of each of data.more_shards in what is trained on, relative; unset: by photos."""
    crop: int = number(256, CROP)
    """Side of the square training crop, pixels; a multiple of 128 (256 with fusion=attention)."""
    flip: bool = True
    """Mirror half of the crops, seeded per image."""
    downscale: float = number(1.0, Range(above=0, most=1))
    """Smallest factor by which JPEG photos are scaled down before the crop, seeded per image; it takes off what their
    compression has left. 1: never."""
    workers: int = number(2, Range(least=0, most=1024))
    """Data worker processes per training process; 0 decodes in the training process."""
    prefetch: int = number(4, Range(least=1, most=1024))
    """Micro-batches each worker keeps ready."""
    cache: str | None = None
    """Folder that keeps whole shards fetched from a URL."""
    retries: int = number(5, Range(least=1, most=1000))
    """Tries for one read from a URL, with exponential back-off, before the run ends."""
    timeout: float = number(30.0, Range(above=0, most=86_400))
    """Seconds before one read from a URL counts as failed."""
    max_corrupt_samples: int = number(100, COUNT_OR_NONE)
    """Photos that may turn out to be unreadable, each replaced by another, before the run ends."""
    pipe: bool = False
    """Whether shards may be `pipe:COMMAND`, a shell command that writes the file {} to its standard output."""


@dataclass
class ObjectiveConfig:
    """Rate-distortion trade-off: λ·distortion + bits per pixel."""

    lmbda: float = number(0.013, LAMBDA)
    """With variable rate every image has a λ of its own, and this is the one of evaluations while training."""
    target: Target = Target.human
    distortion: Distortion = Distortion.mse
    likelihood: Likelihood = Likelihood.survival


@dataclass
class PreEditorConfig:
    """The network in front of a codec for machine receivers: a U-Net of three scales that edits the image."""

    channels: list[int] = number([16, 32, 64], Range(least=4, most=16_384))
    """At 1/2, 1/4 and 1/8 resolution."""
    blocks: int = number(1, BLOCKS)
    """Residual blocks at each scale, on the way down and on the way up."""
    tokens: str | None = None
    """Which of machine.receivers tells it what the receiver sees in the image; unset: it sees the image alone."""


@dataclass
class MachineConfig:
    """Training with objective.target=vision_model (after arXiv 2407.17060): distortion is what happens to tokens."""

    receivers: list[str] = field(default_factory=list)
    """Networks whose tokens are to survive (`hpcm_scale/machine/receivers.py` lists them)."""
    mse: float = number(1.0, WEIGHT)
    """Weight of 255²·MSE."""
    token_distortion_weight: float = number(100.0, WEIGHT)
    """Weight of the token distortion, averaged over the receivers."""
    token_rank_weight: float = number(10.0, WEIGHT)
    """Weight of the difference in token rank, averaged over the receivers."""
    layers: dict[str, float] = number({}, WEIGHT)
    """Weights of layers, `receiver/layer`, relative to each other; those not named: 1."""
    edit: bool = False
    """Whether there is a pre-editor in front of the codec."""
    pre_editor: PreEditorConfig = field(default_factory=PreEditorConfig)
    freeze_codec: bool = False
    """Train the pre-editor alone: files are decoded by the codec as it was."""
    fixed_rate: str | None = None
    """For conf/stage: run folder or weights of the fixed-rate model that the first stage starts from."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run: an optional linear warm-up, piecewise constant, an optional decay to zero."""

    learning_rate: float = number(1e-4, Range(least=1e-12, most=1000))
    boundaries: list[float] = number([0.8, 0.9, 0.95], PART_OR_STEP)
    """Where the rate drops: fractions of train.steps (all ≤ 1) or steps (all > 1)."""
    factors: list[float] = number([1.0, 0.3, 0.1, 0.01], Range(least=0, most=1000))
    """Multiples of learning_rate before, between and after the boundaries."""
    warmup: int = number(0, COUNT_OR_NONE)
    """Steps of linear warm-up from 0."""
    decay: float = number(0.0, COUNT_OR_NONE)
    """Length of the fall to zero, as 1 − √, at the end of the run: a fraction of train.steps (≤ 1) or steps (> 1)."""
    crops: list[int] = number([], CROP)
    """Sides of later crops, pixels, instead of data.crop; the batch shrinks so that a step costs the same."""
    crop_boundaries: list[float] = number([], PART_OR_STEP)
    """Where each of them begins: fractions of train.steps (all < 1) or steps (all ≥ 1)."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = number(2_000_000, COUNT)
    """Optimizer steps of the whole schedule."""
    stop_after: int | None = number(None, COUNT)
    """Stop, with a checkpoint, at this step; the schedule is still that of `steps`."""
    batch_size: int = number(32, IMAGES)
    """Images per optimizer step over all processes and accumulation rounds."""
    micro_batch_size: int | None = number(None, IMAGES)
    """Images per process and forward pass; unset: batch_size / processes, no accumulation."""
    seed: int = number(0, Range(least=0, most=2**63 - 1))
    betas: list[float] = number([0.9, 0.999], Range(least=0, below=1))
    parametrisation: Parametrisation = Parametrisation.standard
    ema: list[float] = number([], AVERAGE)
    """Lengths of moving averages of the weights that are kept beside them, evaluated and exported: standard deviations
    of their power-function profiles relative to the training so far, 0 to 0.28 (arXiv 2312.02696, section 3.1)."""
    clip_norm: float = number(1.0, LARGE)
    """Largest global gradient norm."""
    on_divergence: OnDivergence = OnDivergence.skip
    """What to do with a step whose loss or gradient is not finite, or whose loss leaps."""
    loss_spike_factor: float | None = number(10.0, LARGE)
    """A loss leaps if it is more than so many times the median of the last 100; unset: never."""
    max_skipped: int = number(10, COUNT)
    """Steps skipped in a row before the run ends."""
    max_rollbacks: int = number(10, COUNT_OR_NONE)
    """Rollbacks of the whole run before it ends."""
    checkpoint_every: int = number(5000, COUNT)
    """Steps between resumable checkpoints; one is always written when training ends or stops."""
    keep_checkpoints: int = number(2, COUNT)
    """The newest so many are kept."""
    keep_at: list[int] = number([], COUNT)
    """Steps after which a checkpoint is left for good, for `hpcm cooldown`."""
    keep_every: int | None = number(None, COUNT)
    """Checkpoints of every so many steps are kept for good, too."""
    keep_best: bool = True
    """Keep, besides, of the checkpoints at whose steps there was an evaluation, the one with the lowest loss."""
    max_hours: float | None = number(None, Range(above=0, most=YEAR_MINUTES // 60))
    """Hours from its start after which this command stops, with a checkpoint, as if it had been asked to."""
    watchdog_timeout: float = number(30.0, Range(above=0, most=YEAR_MINUTES))
    """Minutes without a step after which the run ends, with the stack traces of all its processes."""
    profile_steps: list[int] = number([], COUNT)
    """First and last step whose profile process 0 writes to the run folder (profile/), both included; unset: none."""


@dataclass
class EvalConfig:
    """Evaluation while training."""

    images: str | None = None
    """Folder of images; unset: no evaluation."""
    every: int = number(5000, COUNT)
    """Steps between evaluations; the last step is always evaluated."""
    limit: int | None = number(None, COUNT)
    """Use only the first so many images, in name order."""
    max_failed: int = number(3, COUNT)
    """Evaluations in a row that may fail, each of them skipped, before the run ends."""


@dataclass
class EngineConfig:
    """Processes, sharding and arithmetic."""

    name: EngineName = EngineName.deepspeed
    zero_stage: int = number(2, Range(least=0, most=3))
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights sharded."""
    offload: bool = False
    """Keep optimizer state and weights in host memory (stage 3)."""
    precision: Precision = Precision.fp32
    compile: bool = False
    """Compile the parts of the network with torch.compile; minutes at the start of a run, faster steps."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that a GPU, too, gives the same digits every time; slower steps."""
    activation_checkpointing: Checkpointing = Checkpointing.none
    """Activations to compute again in the backward pass; lets larger models or batches into a device's memory."""
    world_size: int | None = number(None, IMAGES)
    """Processes; training checks it against the launcher, `hpcm estimate` plans for it."""
    init_timeout: float = number(10.0, Range(above=0, most=YEAR_MINUTES))
    """Minutes that the processes of a run wait for each other at its start."""
    options: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's own configuration, for what has no key here."""


@dataclass
class LogConfig:
    """Journal and wandb."""

    every: int = number(1, COUNT)
    """Steps per journal line; the line holds the mean over them."""
    print_seconds: float = number(30.0, Range(above=0, most=86_400))
    """Seconds between lines on stderr while training, where it is no terminal."""
    wandb: WandbMode = WandbMode.offline
    project: str = "hpcm_scale"
    images: int = number(4, Range(least=0, most=1000))
    """Reconstructions shown in wandb at each evaluation."""


@dataclass
class RunConfig:
    """The run folder."""

    dir: str | None = None
    """Unset: runs/<model.name>, or runs/<sweep>/<what was swept> in a multirun."""
    sweep: str | None = None
    """Name of the sweep this run belongs to: wandb's group."""
    cooldown_of: str | None = None
    """Folder of the run that this one branches off; `hpcm cooldown` sets it."""
    cooldown_at: int | None = number(None, COUNT)
    """Step of the checkpoint it branches off at."""


@dataclass
class Config:
    """One run."""

    init_from: str | None = None
    """Run folder or weights.safetensors whose weights a new run starts from; its optimizer and schedule are new."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)
