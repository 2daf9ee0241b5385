"""The typed configuration: every key of a run with its type, unit, default and, for numbers, range."""

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
    OptimizerName,
    Parametrisation,
    Precision,
    Start,
    Target,
    WandbMode,
)
from hpcm_scale.errors import UserError
from hpcm_scale.files import without_secrets
from hpcm_scale.limits import COUNT, COUNT_OR_NONE, CROP, LAMBDA, Range, abbreviated, number

WIDTH = Range(least=1, most=16_384)
"""Channels."""
BLOCKS = Range(least=0, most=128)
"""Residual blocks in a row."""
IMAGES = Range(least=1, most=1_000_000)
"""Of a batch."""
WEIGHT = Range(least=0, most=1e9)
PART_OR_STEP = Range(above=0, most=COUNT.most)
"""Fraction of a run, or a step."""
AVERAGE = Range(least=0.001, below=12**-0.5)
"""Length of a moving average; 1/√12 would weigh all steps equally."""
LARGE = Range(above=0, most=1e30)
YEAR_MINUTES = 525_600


@dataclass
class PriorConfig:
    """Depth of one prior network of the context model (residual blocks of depthwise convolutions)."""

    before: int = number(2, BLOCKS)
    """Blocks before the channel scale q of the step."""
    after: int = number(1, BLOCKS)
    """Blocks between q and the 1×1 convolution to scales and means."""
    refine: int = number(0, BLOCKS)
    """Blocks after that convolution."""


@dataclass
class RateConfig:
    """Variable rate: one model for a range of λ, at log-spaced levels."""

    levels: int = number(1, Range(least=1, most=256))
    """Levels with learned gains, up to the 256 of a file's byte; 1: fixed rate."""
    lowest: float = number(0.0018, LAMBDA)
    """λ of level 0; default: the smallest of the paper."""
    highest: float = number(0.0483, LAMBDA)
    """λ of the last level."""
    reference: float = number(0.013, LAMBDA)
    """λ at which the initial gains are 1: that of the fixed-rate model that training starts from."""


@dataclass
class ModelConfig:
    """One HPCM; the sizes are in `conf/model/`."""

    name: str = "68m"
    family: str = "hpcm"
    """Blocks of the transforms: a file in hpcm_scale/model/families."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the family; its file lists them."""
    size: str | None = None
    """Number of parameters, 100k to 10b, from which widths, depths and attention_heads follow."""
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
    context_channels: int | None = number(None, WIDTH)
    """Channels of the prior networks, which the adaptors reduce 3M channels to; unset: 3M."""
    prior_s1_s2: PriorConfig = field(default_factory=PriorConfig)
    prior_s3: PriorConfig = field(default_factory=lambda: PriorConfig(before=3, after=2))
    adaptor_blocks: list[int] = number([0, 0, 0], BLOCKS)
    """Blocks of each step's adaptor at scales s1, s2, s3; 0: one 1×1 convolution."""
    fusion: Fusion = Fusion.attention
    attention_heads: int = number(32, WIDTH)
    """Heads of the window cross-attention over 2M channels."""
    partial_ratio: int = number(4, WIDTH)
    """r: the partial 3×3 convolution acts on the first C/r channels."""
    expansion: int = number(4, Range(least=1, most=64))
    """m: the residual blocks of the transforms widen C to mC."""
    hyper_placement: HyperPlacement = HyperPlacement.aligned
    start: Start = Start.klt
    """Initialization of a new model. Stored configurations without this key have random."""
    rate: RateConfig = field(default_factory=RateConfig)


@dataclass(frozen=True)
class ShardSet:
    """One entry of data.shards."""

    path: str
    """Folder, URL or `pipe:COMMAND`."""
    weight: float | None = None
    """Share in the training images, relative to the other weights. Sets without a weight count 1 on average, each in
    proportion to its number of images."""


@dataclass
class DataConfig:
    """Source of the training images and of their crops."""

    shards: Any = None
    """Folder or URL (http, https, any fsspec scheme) of index.json and the shards; or a list of sets to mix: folders,
    URLs, or {path, weight}. Without weights, the sets are mixed by number of images; see `ShardSet`."""
    crop: int = number(256, CROP)
    """Side of the square training crop, pixels; a multiple of 128 (256 with fusion=attention)."""
    flip: bool = True
    """Flip half of the crops horizontally, seeded per image."""
    downscale: float = number(1.0, Range(above=0, most=1))
    """Smallest factor by which JPEG images are downscaled before the crop, seeded per image, to remove compression
    artifacts. 1: never."""
    workers: int = number(2, Range(least=0, most=1024))
    """Data workers per training process; 0: decode in the training process."""
    prefetch: int = number(4, Range(least=1, most=1024))
    """Micro-batches prefetched by each worker."""
    cache: str | None = None
    """Folder that caches shards from a URL."""
    retries: int = number(5, Range(least=1, most=1000))
    """Attempts for one read from a URL, with exponential back-off, before the run ends."""
    timeout: float = number(30.0, Range(above=0, most=86_400))
    """Seconds before one read from a URL counts as failed."""
    max_corrupt_samples: int = number(100, COUNT_OR_NONE)
    """Corrupt images, each replaced by another, before the run ends."""
    pipe: bool = False
    """Allow shards that are `pipe:COMMAND`, a shell command that writes the file {} to its standard output."""

    @property
    def sets(self) -> list[ShardSet]:
        """`shards` as a list, empty if unset. Raises UserError if an entry is neither a path nor {path, weight}."""
        entries = self.shards if isinstance(self.shards, list) else [] if self.shards is None else [self.shards]
        return [_shard_set(entry) for entry in entries]


def _shard_set(entry: Any) -> ShardSet:
    if isinstance(entry, str | int | float):  # a folder may be named 2026
        return ShardSet(str(entry))
    if not (isinstance(entry, dict) and "path" in entry and entry.keys() <= {"path", "weight"}):
        raise UserError(
            "shards-entry",
            "data.shards",
            f"the entry {abbreviated(without_secrets(str(entry)))} of data.shards is neither a folder or URL nor "
            "{path: FOLDER, weight: NUMBER}; correct it",
        )
    weight = entry.get("weight")
    if isinstance(weight, bool | str | list | dict):
        raise UserError(
            "shards-weight",
            "data.shards",
            f"data.shards has the weight {abbreviated(weight)} for {without_secrets(str(entry['path']))}; give a "
            "number, or omit it",
        )
    WEIGHT.check("data.shards.weight", weight)
    return ShardSet(str(entry["path"]), weight)


@dataclass
class ObjectiveConfig:
    """Rate-distortion trade-off: λ·distortion + bits per pixel."""

    lmbda: float = number(0.013, LAMBDA)
    """λ. With variable rate every image has its own λ, and this is the λ of evaluations while training."""
    target: Target = Target.human
    distortion: Distortion = Distortion.mse
    likelihood: Likelihood = Likelihood.survival


@dataclass
class PreEditorConfig:
    """The network in front of a codec for vision models: a U-Net of three scales that edits the image."""

    channels: list[int] = number([16, 32, 64], Range(least=4, most=16_384))
    """At 1/2, 1/4 and 1/8 resolution."""
    blocks: int = number(1, BLOCKS)
    """Residual blocks at each scale of encoder and decoder."""
    tokens: str | None = None
    """The one of machine.receivers whose tokens are a second input; unset: the image is the only input."""


@dataclass
class MachineConfig:
    """Training with objective.target=vision_model (after arXiv 2407.17060): the distortion of tokens."""

    receivers: list[str] = field(default_factory=list)
    """Vision models whose tokens are preserved (hpcm_scale/machine/receivers.py lists them)."""
    mse: float = number(1.0, WEIGHT)
    """Weight of 255²·MSE."""
    token_distortion_weight: float = number(100.0, WEIGHT)
    """Weight of the token distortion, averaged over the receivers."""
    token_rank_weight: float = number(10.0, WEIGHT)
    """Weight of the difference of token rank, averaged over the receivers."""
    layers: dict[str, float] = number({}, WEIGHT)
    """Relative weights of layers, by `receiver/layer`; default: 1."""
    edit: bool = False
    """Put a pre-editor in front of the codec."""
    pre_editor: PreEditorConfig = field(default_factory=PreEditorConfig)
    freeze_codec: bool = False
    """Train only the pre-editor: files are decoded with the original codec."""
    fixed_rate: str | None = None
    """For conf/stage: run folder or weights of the fixed-rate model of the first stage."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run: an optional linear warm-up, piecewise constant, an optional decay to zero."""

    learning_rate: float = number(1e-4, Range(least=1e-12, most=1000))
    boundaries: list[float] = number([0.8, 0.9, 0.95], PART_OR_STEP)
    """Where the learning rate drops: fractions of train.steps (all ≤ 1) or steps (all > 1)."""
    factors: list[float] = number([1.0, 0.3, 0.1, 0.01], Range(least=0, most=1000))
    """Multiples of learning_rate before, between and after the boundaries."""
    warmup: int = number(0, COUNT_OR_NONE)
    """Steps of linear warm-up from 0."""
    decay: float = number(0.0, COUNT_OR_NONE)
    """Length of the final decay to zero as 1 − √: a fraction of train.steps (≤ 1) or steps (> 1)."""
    crops: list[int] = number([], CROP)
    """Sides of later crops, pixels; the batch shrinks so that a step costs the same."""
    crop_boundaries: list[float] = number([], PART_OR_STEP)
    """Where each of schedule.crops begins: fractions of train.steps (all < 1) or steps (all ≥ 1)."""


@dataclass
class OptimizerConfig:
    """Update rule; the learning rate is in `schedule`, and gradient clipping in train.clip_norm.

    Matrices are the weights of convolutions and linear layers. Depthwise kernels, layers from or to the three colours,
    biases and all other parameters are none: they always have Adam.
    """

    name: OptimizerName = OptimizerName.adam
    betas: list[float] = number([0.9, 0.999], Range(least=0, below=1))
    """Of Adam's averages of the gradient and of its square."""
    momentum: float = number(0.95, Range(least=0, below=1))
    """Of Muon's Nesterov momentum; of all of SOAP's averages."""
    weight_decay: float = number(0.0, Range(least=0, most=1000))
    """Decoupled weight decay of matrices: each step subtracts the scheduled learning rate times this times the
    weights, independent of the factors of muP."""
    basis_every: int = number(10, COUNT)
    """Steps between two updates of SOAP's eigenbases."""
    max_state: float = number(4.0, Range(least=2, most=1e6))
    """Most elements of SOAP's state per element of a matrix: it has an eigenbasis for both sides, for the smaller one,
    or none (Adam), so as not to exceed this. Two square sides need 6."""
    max_dimension: int = number(8192, Range(least=1, most=1_000_000))
    """Largest side of a matrix that has an eigenbasis in SOAP."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = number(2_000_000, COUNT)
    """Optimizer steps of the whole schedule."""
    stop_after: int | None = number(None, COUNT)
    """Stop, with a checkpoint, at this step; the schedule stays that of `steps`."""
    batch_size: int = number(32, IMAGES)
    """Images per optimizer step over all processes and accumulation rounds."""
    micro_batch_size: int | None = number(None, IMAGES)
    """Images per process and forward pass; unset: batch_size / processes, no accumulation."""
    seed: int = number(0, Range(least=0, most=2**63 - 1))
    parametrisation: Parametrisation = Parametrisation.standard
    ema: list[float] = number([], AVERAGE)
    """Lengths of moving averages of the weights to evaluate and export: standard deviations of their power-function
    profiles relative to the training so far, 0 to 0.28 (arXiv 2312.02696, section 3.1)."""
    clip_norm: float = number(1.0, LARGE)
    """Largest global gradient norm."""
    on_divergence: OnDivergence = OnDivergence.skip
    """Reaction to a step with a loss spike, or a loss or gradient that is not finite."""
    loss_spike_factor: float | None = number(10.0, LARGE)
    """A loss greater than this multiple of the median of the last 100 is a spike; unset: never."""
    max_skipped: int = number(10, COUNT)
    """Steps skipped in a row before the run ends."""
    max_rollbacks: int = number(10, COUNT_OR_NONE)
    """Rollbacks after which another divergence stops the run."""
    checkpoint_every: int = number(5000, COUNT)
    """Steps between resumable checkpoints; one is always written when training ends or stops."""
    keep_checkpoints: int = number(2, COUNT)
    """Newest checkpoints to keep."""
    keep_at: list[int] = number([], COUNT)
    """Steps whose checkpoints are never removed, for `hpcm cooldown`."""
    keep_every: int | None = number(None, COUNT)
    """Checkpoints at multiples of this step are never removed."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest evaluation loss, among those at evaluated steps."""
    max_hours: float | None = number(None, Range(above=0, most=YEAR_MINUTES // 60))
    """Hours after which this command stops with a checkpoint, as on SIGTERM."""
    watchdog_timeout: float = number(30.0, Range(above=0, most=YEAR_MINUTES))
    """Minutes without a step after which the run ends, with stack traces of all processes."""
    profile_steps: list[int] = number([], COUNT)
    """First and last step that rank 0 profiles to profile/ in the run folder; unset: none."""


@dataclass
class EvalConfig:
    """Evaluation while training."""

    images: str | None = None
    """Folder of images; unset: no evaluation."""
    every: int = number(5000, COUNT)
    """Steps between evaluations; the last step is evaluated, too."""
    limit: int | None = number(None, COUNT)
    """Number of images, the first in name order; unset: all."""
    max_failed: int = number(3, COUNT)
    """Consecutive failed evaluations, each skipped, before the run ends."""


@dataclass
class EngineConfig:
    """Processes, sharding and arithmetic."""

    name: EngineName = EngineName.deepspeed
    zero_stage: int = number(2, Range(least=0, most=3))
    """DeepSpeed ZeRO shards: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep optimizer state and weights in host memory (stage 3)."""
    precision: Precision = Precision.fp32
    compile: bool = False
    """Compile the parts of the network with torch.compile: faster steps after minutes at the start."""
    deterministic: bool = False
    """Use only deterministic algorithms, bit-reproducible on a GPU, too; slower steps."""
    activation_checkpointing: Checkpointing = Checkpointing.none
    """Activations to recompute in the backward pass, to save device memory."""
    world_size: int | None = number(None, IMAGES)
    """Processes: training checks it against the launcher, `hpcm estimate` assumes it."""
    init_timeout: float = number(10.0, Range(above=0, most=YEAR_MINUTES))
    """Minutes that processes wait for each other at the start."""
    options: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's configuration, for options without a key here."""


@dataclass
class LogConfig:
    """Journal and wandb."""

    every: int = number(1, COUNT)
    """Steps per journal line, which has their means."""
    print_seconds: float = number(30.0, Range(above=0, most=86_400))
    """Seconds between progress lines on stderr if it is not a terminal."""
    wandb: WandbMode = WandbMode.offline
    project: str = "hpcm_scale"
    images: int = number(4, Range(least=0, most=1000))
    """Reconstructions in wandb per evaluation."""


@dataclass
class RunConfig:
    """The run folder."""

    dir: str | None = None
    """Unset: runs/<model.name>, or runs/<sweep>/<swept keys> in a multirun."""
    sweep: str | None = None
    """Name of the sweep of this run; wandb's group."""
    cooldown_of: str | None = None
    """Folder of the constant-rate run that a cooldown starts from; `hpcm cooldown` sets it."""
    cooldown_at: int | None = number(None, COUNT)
    """Step of the checkpoint that the cooldown starts from."""


@dataclass
class Config:
    """One run."""

    init_from: str | None = None
    """Run folder or weights.safetensors that a new run starts from, with a new optimizer and schedule."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)
