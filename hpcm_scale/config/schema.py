"""The typed configuration: every key a run can be given, its type, unit and default.

Hydra composes these dataclasses from `conf/`; nothing below `config/` knows about Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class HyperPlacement(Enum):
    """Where the hyper parameters land on the half-resolution grid (s2) of the context model."""

    aligned = "aligned"
    """Where they belong."""
    upstream = "upstream"
    """Shifted as in the public implementation; needed for its checkpoints."""


class Fusion(Enum):
    """How the context network's output becomes the next step's context."""

    attention = "attention"
    """Window cross-attention from the new parameters to the old context."""
    none = "none"
    """The new parameters are the next context (phi-context and 1B models)."""


class Precision(Enum):
    """Arithmetic of convolutions and context networks; rates and distortions are fp32 always."""

    fp32 = "fp32"
    bf16 = "bf16"


class Checkpointing(Enum):
    """Which activations are computed a second time in the backward pass instead of being kept."""

    none = "none"
    """None: fastest."""
    blocks = "blocks"
    """Those within residual blocks."""
    steps = "steps"
    """Those within residual blocks of the transforms and within the steps of the coding order."""


class Viewer(Enum):
    """Who looks at the pictures, and so what counts as distortion."""

    people = "people"
    """255²·MSE."""
    machine = "machine"
    """What happens to the tokens of machine.receivers, besides."""


class Distortion(Enum):
    """How far a reconstruction is off, for people."""

    mse = "mse"
    """255²·MSE; λ of the papers: 0.0018 to 0.0483."""
    ms_ssim = "ms_ssim"
    """1 − MS-SSIM; the public λ: 2.4, 4.58, 8.73, 16.64, 31.73, 60.5."""


class Likelihood(Enum):
    """How the probability of a symbol is worked out in training."""

    survival = "survival"
    """From the tail's survival function: exact far out, too."""
    public = "public"
    """As in the public implementation: a difference of two numbers near 1, bounded from below; to compare with."""


class Parametrisation(Enum):
    """How initial weights and learning rates follow the width of a network."""

    standard = "standard"
    """One learning rate for all weights: the best one falls with the width."""
    mup = "mup"
    """Maximal update (arXiv 2203.03466): schedule.learning_rate is that of 450k's widths, and right for all widths."""


class EngineName(Enum):
    """Who runs the processes."""

    deepspeed = "deepspeed"
    accelerate = "accelerate"


class OnDivergence(Enum):
    """What follows a step whose loss or gradient is not finite, or whose loss leaps."""

    skip = "skip"
    """The step is left out, and its images with it."""
    rollback = "rollback"
    """Back to the last good checkpoint, and on from there without the images of that step."""
    stop = "stop"
    """The run ends."""


class WandbMode(Enum):
    """Where the wandb view of the journal goes."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class PriorConfig:
    """Depth of one prior network of the context model (residual blocks of depthwise convolutions)."""

    before: int = 2
    """Blocks before the step's channel scale q."""
    after: int = 1
    """Blocks between q and the 1×1 convolution to scales and means."""
    refine: int = 0
    """Blocks after that convolution."""


@dataclass
class RateConfig:
    """Variable rate: one model for a range of λ, at levels that are log-spaced over it."""

    levels: int = 1
    """λ that the model has learned gains for; 1: fixed rate, and none of this."""
    lowest: float = 0.0018
    """λ of level 0; that of the paper's smallest files."""
    highest: float = 0.0483
    """λ of the last level."""
    reference: float = 0.013
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
    """Parameters, 100k to 10b: widths and depths follow from it by the family's rule, instead of the keys below."""
    channels: list[int] = field(default_factory=lambda: [96, 192, 384])
    """c1, c2, c3: channels of the transforms at 1/2, 1/4 and 1/8 resolution."""
    latent_channels: int = 320
    """M: channels of y, at 1/16 resolution; a multiple of 8 (the coding order's channel groups)."""
    hyper_latent_channels: int = 256
    """N: channels of z, at 1/64 resolution."""
    hyper_channels: int = 256
    """h: channels of the hyper transforms between y and z."""
    stem_kernel: int = 4
    """Kernel of the first and last convolution: 4 (stride 2, pad 1) or 2 (stride 2)."""
    g_a_blocks: list[int] = field(default_factory=lambda: [2, 2, 4, 0])
    """Residual blocks after each downsampling, fine to coarse: at c1, c2, c3, M."""
    g_s_blocks: list[int] = field(default_factory=lambda: [0, 4, 2, 2])
    """Residual blocks before each upsampling, coarse to fine: at M, c3, c2, c1."""
    hyper_blocks: list[int] = field(default_factory=lambda: [1, 3])
    """a, b: blocks of the hyper transforms at 1/16 and at 1/32 resolution."""
    prior_s1_s2: PriorConfig = field(default_factory=PriorConfig)
    prior_s3: PriorConfig = field(default_factory=lambda: PriorConfig(before=3, after=2))
    adaptor_blocks: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Blocks of each step's adaptor at scales s1, s2, s3; 0: one 1×1 convolution."""
    fusion: Fusion = Fusion.attention
    attention_heads: int = 32
    """Heads of the window cross-attention over 2M channels."""
    partial_ratio: int = 4
    """r: the partial 3×3 convolution sees the first C/r channels."""
    expansion: int = 4
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
    weights: list[float] = field(default_factory=list)
    """Shares of data.shards and of each of data.more_shards in what is trained on, relative; unset: by photos."""
    crop: int = 256
    """Side of the square training crop, pixels; a multiple of 128 (256 with fusion=attention)."""
    flip: bool = True
    """Mirror half of the crops, seeded per image."""
    downscale: float = 1.0
    """Smallest factor by which JPEG photos are scaled down before the crop, seeded per image; it takes off what their
    compression has left. 1: never."""
    workers: int = 2
    """Data worker processes per training process; 0 decodes in the training process."""
    prefetch: int = 4
    """Micro-batches each worker keeps ready."""
    cache: str | None = None
    """Folder that keeps whole shards fetched from a URL."""
    retries: int = 5
    """Tries for one read from a URL, with exponential back-off, before the run ends."""
    timeout: float = 30.0
    """Seconds before one read from a URL counts as failed."""
    max_bad: int = 100
    """Photos that may turn out to be unreadable, each replaced by another, before the run ends."""
    pipe: bool = False
    """Whether shards may be `pipe:COMMAND`, a shell command that writes the file {} to its standard output."""


@dataclass
class ObjectiveConfig:
    """Rate-distortion trade-off: λ·distortion + bits per pixel."""

    lmbda: float = 0.013
    """With variable rate every image has a λ of its own, and this is the one of evaluations while training."""
    viewer: Viewer = Viewer.people
    distortion: Distortion = Distortion.mse
    likelihood: Likelihood = Likelihood.survival


@dataclass
class PreEditorConfig:
    """The network in front of a codec for machine receivers: a U-Net of three scales that edits the image."""

    channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    """At 1/2, 1/4 and 1/8 resolution."""
    blocks: int = 1
    """Residual blocks at each scale, on the way down and on the way up."""
    tokens: str | None = None
    """Which of machine.receivers tells it what the receiver sees in the image; unset: it sees the image alone."""


@dataclass
class MachineConfig:
    """Training with objective.viewer=machine (after arXiv 2407.17060): distortion is what happens to tokens."""

    receivers: list[str] = field(default_factory=list)
    """Networks whose tokens are to survive (`hpcm_scale/machine/receivers.py` lists them)."""
    mse: float = 1.0
    """Weight of 255²·MSE."""
    token: float = 100.0
    """Weight of the token distortion, averaged over the receivers."""
    rank: float = 10.0
    """Weight of the difference in token rank, averaged over the receivers."""
    layers: dict[str, float] = field(default_factory=dict)
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

    learning_rate: float = 1e-4
    boundaries: list[float] = field(default_factory=lambda: [0.8, 0.9, 0.95])
    """Where the rate drops: fractions of train.steps (all ≤ 1) or steps (all > 1)."""
    factors: list[float] = field(default_factory=lambda: [1.0, 0.3, 0.1, 0.01])
    """Multiples of learning_rate before, between and after the boundaries."""
    warmup: int = 0
    """Steps of linear warm-up from 0."""
    decay: float = 0.0
    """Length of the fall to zero, as 1 − √, at the end of the run: a fraction of train.steps (≤ 1) or steps (> 1)."""
    crops: list[int] = field(default_factory=list)
    """Sides of later crops, pixels, instead of data.crop; the batch shrinks so that a step costs the same."""
    crop_boundaries: list[float] = field(default_factory=list)
    """Where each of them begins: fractions of train.steps (all < 1) or steps (all ≥ 1)."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 2_000_000
    """Optimizer steps of the whole schedule."""
    stop_after: int | None = None
    """Stop, with a checkpoint, at this step; the schedule is still that of `steps`."""
    batch_size: int = 32
    """Images per optimizer step over all processes and accumulation rounds."""
    micro_batch_size: int | None = None
    """Images per process and forward pass; unset: batch_size / processes, no accumulation."""
    seed: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    parametrisation: Parametrisation = Parametrisation.standard
    ema: list[float] = field(default_factory=list)
    """Lengths of moving averages of the weights that are kept beside them, evaluated and exported: standard deviations
    of their power-function profiles relative to the training so far, 0 to 0.28 (arXiv 2312.02696, section 3.1)."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    on_divergence: OnDivergence = OnDivergence.skip
    """What to do with a step whose loss or gradient is not finite, or whose loss leaps."""
    spike: float | None = 10.0
    """A loss leaps if it is more than so many times the median of the last 100; unset: never."""
    max_skipped: int = 10
    """Steps skipped in a row before the run ends."""
    max_rollbacks: int = 10
    """Rollbacks of the whole run before it ends."""
    checkpoint_every: int = 5000
    """Steps between resumable checkpoints; one is always written when training ends or stops."""
    keep_checkpoints: int = 2
    """The newest so many are kept."""
    keep_at: list[int] = field(default_factory=list)
    """Steps after which a checkpoint is left for good, for `hpcm branch`."""
    keep_every: int | None = None
    """Checkpoints of every so many steps are kept for good, too."""
    keep_best: bool = True
    """Keep, besides, of the checkpoints at whose steps there was an evaluation, the one with the lowest loss."""
    max_hours: float | None = None
    """Hours from its start after which this command stops, with a checkpoint, as if it had been asked to."""
    stall_minutes: float = 30.0
    """Minutes without a step after which the run ends, with the stack traces of all its processes."""


@dataclass
class EvalConfig:
    """Evaluation while training."""

    images: str | None = None
    """Folder of images; unset: no evaluation."""
    every: int = 5000
    """Steps between evaluations; the last step is always evaluated."""
    limit: int | None = None
    """Use only the first so many images, in name order."""


@dataclass
class EngineConfig:
    """Processes, sharding and arithmetic."""

    name: EngineName = EngineName.deepspeed
    zero_stage: int = 2
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights sharded."""
    offload: bool = False
    """Keep optimizer state and weights in host memory (stage 3)."""
    precision: Precision = Precision.fp32
    compile: bool = False
    """Compile the parts of the network with torch.compile; minutes at the start of a run, faster steps."""
    checkpoint: Checkpointing = Checkpointing.none
    """Activations to compute again in the backward pass; lets larger models or batches into a device's memory."""
    world_size: int | None = None
    """Processes; training checks it against the launcher, `hpcm estimate` plans for it."""
    join_minutes: float = 10.0
    """Minutes that the processes of a run wait for each other at its start."""
    options: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's own configuration, for what has no key here."""


@dataclass
class LogConfig:
    """Journal and wandb."""

    every: int = 1
    """Steps per journal line; the line holds the mean over them."""
    wandb: WandbMode = WandbMode.offline
    project: str = "hpcm_scale"
    images: int = 4
    """Reconstructions shown in wandb at each evaluation."""


@dataclass
class RunConfig:
    """The run folder."""

    dir: str | None = None
    """Unset: runs/<model.name>, or runs/<sweep>/<what was swept> in a multirun."""
    sweep: str | None = None
    """Name of the sweep this run belongs to: wandb's group."""
    branch_of: str | None = None
    """Folder of the run that this one branches off; `hpcm branch` sets it."""
    branch_at: int | None = None
    """Step of the checkpoint it branches off at."""


@dataclass
class Config:
    """One run."""

    init_from: str | None = None
    """Run folder or weights.safetensors whose weights a new run starts from; with another λ, say, or as the next stage
    of training. Its optimizer and its schedule are new."""
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
