#!/usr/bin/env bash
# Trains on all GPUs of this node (or those in CUDA_VISIBLE_DEVICES): bash launch/one_node.sh [overrides, such as
# train.batch_size=64 run.dir=runs/other]. The default run folder is runs/MODEL. The same command resumes an interrupted
# run. On SIGTERM, SIGUSR1 or Ctrl-C it writes a checkpoint and exits with code 75.
set -euo pipefail

model=68m         # hpcm models lists them
shards=shards     # folder or URL written by `hpcm shards build`
images=null       # folder of evaluation images; null: none
steps=2000000     # optimizer steps of the whole schedule
engine=zero2      # zero0 zero1 zero2 zero3 zero3_offload
precision=bf16    # arithmetic of the convolutions: bf16 or fp32

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
. launch/under_deepspeed.sh
under_deepspeed --module hpcm_scale.train model="$model" data.shards="$shards" eval.images="$images" \
    train.steps="$steps" engine="$engine" engine.precision="$precision" "$@"
