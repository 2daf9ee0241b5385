#!/usr/bin/env bash
# What README.md beside this file reports, from photos to tables: bash docs/results/machine/commands.sh PHOTOS KODAK
# About two hours of one core each for training and evaluation. Called again, it goes on.
set -euo pipefail
photos=$1 kodak=$2
export OMP_NUM_THREADS=1

[ -d text ] || python - <<'PYTHON' # pages to train on; evaluation has others
from pathlib import Path

from PIL import Image

from hpcm_scale.evaluation.task.rendered_text import RenderedText

Path("text").mkdir()
pages = RenderedText(60, seed=8)
for index in range(len(pages)):
    Image.fromarray(pages.load(index).permute(1, 2, 0).numpy()).save(f"text/{index:03d}.png")
PYTHON
hpcm shards build "$photos" --out shards
hpcm shards build "$photos" text --out shards_mix

train() { # name, what differs …
    hpcm train model=micro engine=accelerate engine.precision=bf16 data.workers=0 log.every=10 log.wandb=disabled \
        run.dir="runs/$1" "${@:2}"
}

# A fixed-rate model for all to start from; then one λ after the other, and all of them in one model, at equal compute.
train trunk data.shards=shards train.steps=1500 train.batch_size=8 schedule=constant schedule.learning_rate=1.25e-3 \
    schedule.warmup=50 objective.lmbda=0.013
rates=(init_from=runs/trunk data.shards=shards train.steps=600 train.batch_size=8 schedule=wsd
    schedule.learning_rate=1.25e-3 schedule.warmup=20 schedule.decay=0.4)
for lmbda in 0.0018 0.0035 0.0067 0.013 0.025 0.0483; do
    train "fixed_$lmbda" "${rates[@]}" objective.lmbda=$lmbda
done
train variable "${rates[@]}" model.rate.levels=6

# For networks: all from the variable-rate model, 250 steps of 4 crops (600 for the longer pair).
short=(data.shards=shards_mix train.steps=250 train.batch_size=4 schedule=wsd schedule.learning_rate=6e-4
    schedule.warmup=20 schedule.decay=0.5)
variable=(init_from=runs/variable model.rate.levels=6)
machine=(objective.target=vision_model "machine.receivers=[efficientnet-lite0]")
editor=("${machine[@]}" machine.edit=true machine.pre_editor.tokens=efficientnet-lite0)
train mse "${short[@]}" "${variable[@]}"
train joint "${short[@]}" "${variable[@]}" "${editor[@]}"
train no_rank "${short[@]}" "${variable[@]}" "${editor[@]}" machine.token_rank_weight=0
train rank_only "${short[@]}" "${variable[@]}" "${editor[@]}" machine.token_distortion_weight=0
train no_condition "${short[@]}" "${variable[@]}" "${machine[@]}" machine.edit=true
train no_editor "${short[@]}" "${variable[@]}" "${machine[@]}"
train editor_only "${short[@]}" "${variable[@]}" "${editor[@]}" machine.freeze_codec=true
train fixed_mse "${short[@]}" init_from=runs/fixed_0.013
train fixed_joint "${short[@]}" init_from=runs/fixed_0.013 "${editor[@]}"
train mse_long "${short[@]}" "${variable[@]}" train.steps=600
train joint_long "${short[@]}" "${variable[@]}" "${editor[@]}" train.steps=600
train text "${short[@]}" "${variable[@]}" "${editor[@]}" "machine.receivers=[efficientnet-lite0,pp-ocrv4]" train.steps=150

weights() { for name; do printf '%s=runs/%s/weights.safetensors ' "$name" "$name"; done; }

train variable_long "${rates[@]}" init_from=runs/variable model.rate.levels=6 # as long again

hpcm evaluate --weights $(for lmbda in 0.0018 0.0035 0.0067 0.013 0.025 0.0483; do
    printf 'fixed=runs/fixed_%s/weights.safetensors ' "$lmbda"
done) $(weights variable variable_long) --images "$kodak" --set kodak --visual 0 --out rates
hpcm bd-rate rates --anchor rates --anchor-curve fixed
hpcm evaluate --weights mse=runs/mse_long/weights.safetensors joint=runs/joint_long/weights.safetensors \
    --images "$kodak" --limit 12 --qualities 0 25 50 75 100 --visual 0 --task agreement --against jpeg,webp,avif,vvc \
    --out agreement
hpcm evaluate --weights $(weights mse joint no_rank no_condition no_editor editor_only rank_only fixed_mse fixed_joint) \
    --images "$kodak" --limit 8 --qualities 0 33 66 100 --visual 0 --task agreement --out ablations
hpcm evaluate --weights $(weights mse joint text) --task text --text-images 1 --qualities 0 50 100 --visual 0 --out text
