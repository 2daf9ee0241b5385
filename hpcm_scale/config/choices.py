"""Enumerations of the configuration."""

from __future__ import annotations

from enum import Enum


class HyperPlacement(Enum):
    """Alignment of the hyperprior on the half-resolution grid (s2) of the context model."""

    aligned = "aligned"
    """Correct alignment."""
    upstream = "upstream"
    """Shifted as in the public implementation; needed for its checkpoints."""


class Fusion(Enum):
    """Update of the context after a step of the coding order."""

    attention = "attention"
    """Window cross-attention from the new parameters to the old context."""
    none = "none"
    """The new parameters are the next context (phi-context and 1B models)."""


class Start(Enum):
    """Initialization of a new model."""

    random = "random"
    """Random weights that preserve variance."""
    klt = "klt"
    """The Karhunen–Loève transform of a model of images (`model.start`)."""


class Precision(Enum):
    """Arithmetic of convolutions and context networks; rates and distortions are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Checkpointing(Enum):
    """Activation checkpointing: which activations are recomputed in the backward pass."""

    none = "none"
    """None: fastest."""
    blocks = "blocks"
    """Those within residual blocks."""
    steps = "steps"
    """Those within residual blocks of the transforms and within the steps of the coding order."""


class OptimizerName(Enum):
    """Update rule of the weights of convolutions and linear layers; all other parameters have Adam."""

    adam = "adam"
    """Adam, or AdamW with weight decay."""
    muon = "muon"
    """Momentum, orthogonalized by Newton-Schulz iterations."""
    soap = "soap"
    """Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321)."""


class Target(Enum):
    """Receiver of the decoded images, which determines the distortion."""

    human = "human"
    """255²·MSE."""
    vision_model = "vision_model"
    """255²·MSE and the distortion of the tokens of machine.receivers."""


class Distortion(Enum):
    """Distortion for human viewers."""

    mse = "mse"
    """255²·MSE; λ of the papers: 0.0018 to 0.0483."""
    ms_ssim = "ms_ssim"
    """1 − MS-SSIM; the public λ: 2.4, 4.58, 8.73, 16.64, 31.73, 60.5."""


class Likelihood(Enum):
    """Computation of the probability of a symbol in training."""

    survival = "survival"
    """From the survival function: exact in the tails, too."""
    public = "public"
    """As in the public implementation, for comparison: a difference of two numbers near 1, bounded from below."""


class Parametrisation(Enum):
    """Scaling of initial weights and learning rates with the width of a network."""

    standard = "standard"
    """One learning rate for all weights; the optimum decreases with the width."""
    mup = "mup"
    """Maximal update (arXiv 2203.03466): schedule.learning_rate is that of the widths of 450k, and fits all widths."""


class EngineName(Enum):
    """Library for distributed training."""

    deepspeed = "deepspeed"
    accelerate = "accelerate"


class OnDivergence(Enum):
    """Reaction to a step with a loss spike, or a loss or gradient that is not finite."""

    skip = "skip"
    """Skip the step and its images."""
    rollback = "rollback"
    """Return to the last good checkpoint, and continue without the images of that step."""
    stop = "stop"
    """End the run."""


class WandbMode(Enum):
    """Mode of wandb."""

    online = "online"
    offline = "offline"
    disabled = "disabled"
