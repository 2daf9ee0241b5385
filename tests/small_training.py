"""Networks and trainings so small that they take a fraction of the time of `nano`."""

from __future__ import annotations

FEW_BLOCKS = (
    *("model.g_a_blocks=[1,0,0,0]", "model.g_s_blocks=[0,0,0,1]", "model.hyper_blocks=[0,0]"),
    *("model.prior_s1_s2={before: 1, after: 0}", "model.prior_s3={before: 1, after: 0}"),
)
"""One block of each kind, where presets have several."""
SMALL = (
    "model=nano",
    *FEW_BLOCKS,
    "model.fusion=none",
    "data.crop=128",
    "data.workers=0",
    "train.batch_size=4",
    "schedule.learning_rate=1e-3",
    "log.wandb=disabled",
)
"""The training that most tests run: a step takes a tenth of the compute of nano's own."""
TINY = (
    *("model=nano", "model.fusion=none", "model.channels=[8,8,16]", "model.latent_channels=8", "data.crop=128"),
    *FEW_BLOCKS,
)
"""The least that can be trained and has a block of each kind."""
SHALLOW = (
    *("model=nano", "model.fusion=none", "model.hyper_blocks=[0,0]"),
    *("model.g_a_blocks=[0,0,0,0]", "model.g_s_blocks=[0,0,0,0]"),
    *("model.prior_s1_s2={before: 0, after: 0}", "model.prior_s3={before: 0, after: 0}"),
)
"""No residual blocks: fewest operations, for estimates that do not depend on the network."""
ALL_SHARDED = tuple(
    f"+engine.options.zero_optimization.stage3_{key}=0" for key in ("param_persistence_threshold", "max_reuse_distance")
)
"""For ZeRO 3, which keeps small tensors, and those used again soon, whole: of these networks, all."""
