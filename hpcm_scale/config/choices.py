"""The choices of configuration keys that take one of a few words."""

from __future__ import annotations

from enum import Enum


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


class Target(Enum):
    """Receiver of the decoded images, which decides what counts as distortion."""

    human = "human"
    """255²·MSE."""
    vision_model = "vision_model"
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
