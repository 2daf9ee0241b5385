#!/usr/bin/env bash
# From images to a curve of loss against compute: bash launch/quickstart.sh [overrides, such as train.steps=480].
# Installs missing packages first. Run again, it resumes and skips finished steps.
set -euo pipefail
run=runs/quickstart       # results
data=runs/quickstart_data # images and shards

extras=quickstart
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
started=$SECONDS

echo "== images and shards: $data"
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
        export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: fewer page faults
        processes=(--num_gpus 2) # two processes on the CPU
        overrides=()
    fi
    . launch/under_deepspeed.sh
    under_deepspeed ${processes[@]+"${processes[@]}"} --module hpcm_scale.train experiment=quickstart \
        data.shards="$data/shards" eval.images="$data/photos/held_out" run.dir="$run" \
        ${overrides[@]+"${overrides[@]}"} "$@"
    [ -f "$run/weights.safetensors" ] || fail "training stopped early; the same command resumes it"
fi

echo "== evaluation on the held-out images"
if [ "$run/weights.safetensors" -nt "$run/visual.png" ]; then # also if visual.png is missing
    hpcm evaluate --weights "$run/weights.safetensors" --images "$data/photos/held_out" --out "$run" \
        --against jpeg,webp
fi
if [ "$run/metrics.jsonl" -nt "$run/loss_vs_compute.png" ]; then
    hpcm scaling curves "$run" --out "$run/loss_vs_compute.png"
fi

cat <<END

Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. Look at
  $run/visual.png            held-out images beside their reconstructions and JPEGs of the same rate
  $run/evaluation.md         their rates and PSNR, and bits relative to JPEG and WebP at equal PSNR
  $run/loss_vs_compute.png   its loss against compute
  $run/metrics.jsonl         the journal, one JSON object per line
  $run/weights.safetensors   the weights
and run, in $project,
  . ${VIRTUAL_ENV#"$project/"}/bin/activate
  wandb leet run $run/wandb/latest-run   # every curve, offline, in this terminal (h: help, q: quit)
  hpcm models                                 # the sizes to choose from
  hpcm shards build IMAGES --out shards       # shards from your own images
  bash launch/one_node.sh                     # train on them; see its first lines
END
