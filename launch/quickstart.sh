#!/usr/bin/env bash
# From photos to a loss-against-compute curve: bash launch/quickstart.sh [overrides, such as train.steps=480].
# Installs first what is missing; called again, it goes on where it was, and skips what is done.
set -euo pipefail
run=runs/quickstart       # what is worth keeping
data=runs/quickstart_data # photos and shards

extras=quickstart
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
started=$SECONDS

echo "== photos and shards: $data"
python launch/quickstart_photos.py "$data/photos"
hpcm shards build "$data/photos/train" --out "$data/shards"

echo "== training: $run"
if [ -f "$run/weights.safetensors" ] && [ $# -eq 0 ]; then
    echo "$run is already finished"
else
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -gt 0 ]; then
        processes=() # the launcher takes every visible GPU
        overrides=(train.batch_size=$((8 * gpus)))
    else
        export DS_ACCELERATOR=cpu
        processes=(--num_gpus 2) # two processes on the CPU
        overrides=()
    fi
    . launch/under_deepspeed.sh
    under_deepspeed ${processes[@]+"${processes[@]}"} --module hpcm_scale.train experiment=quickstart \
        data.shards="$data/shards" eval.images="$data/photos/held_out" run.dir="$run" \
        ${overrides[@]+"${overrides[@]}"} "$@"
    [ -f "$run/weights.safetensors" ] || fail "training stopped before its end; the same command goes on"
fi

echo "== evaluation on the photos held out"
if [ "$run/weights.safetensors" -nt "$run/visual.png" ]; then # also where there is none yet
    hpcm evaluate --weights "$run/weights.safetensors" --images "$data/photos/held_out" --out "$run"
fi
if [ "$run/metrics.jsonl" -nt "$run/loss_vs_compute.png" ]; then
    hpcm scaling curves "$run" --out "$run/loss_vs_compute.png"
fi

cat <<END

Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. Look at
  $run/visual.png            photos the model has never seen, beside what it makes of them
  $run/evaluation.md         the size of their files, and how far they are off
  $run/loss_vs_compute.png   its loss against compute
  $run/metrics.jsonl         the journal that the curve comes from, one JSON object a line
  $run/weights.safetensors   the weights
and type, in $project,
  . ${VIRTUAL_ENV#"$project/"}/bin/activate
  wandb leet run $run/wandb/latest-run   # every curve, offline, in this terminal (h: help, q: quit)
  hpcm models                                 # the sizes to choose from
  hpcm shards build PHOTOS --out shards       # shards from photos of your own
  bash launch/one_node.sh                     # training on them, as its top lines say
END
