#!/usr/bin/env bash
# The runs of ../start.md, in an empty folder; kodak: the 24 Kodak images. One thread per run. Finished runs are skipped.
set -euo pipefail
export OMP_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
project=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." && pwd)

[ -d photos ] || python "$project/launch/quickstart_photos.py" photos
[ -d shards ] || hpcm shards build photos/train --out shards

shape() { # NAME STEPS KEYS
    [ -f "shapes/$1/weights.safetensors" ] || hpcm train experiment=quickstart engine=accelerate engine.precision=bf16 \
        model=micro train.steps="$2" train.checkpoint_every="$2" eval.every="$2" data.shards=shards eval.images=kodak \
        log.wandb=disabled run.dir="shapes/$1" "${@:3}"
}
wide=(model.latent_channels=120 model.context_channels=64 model.channels=[16,32,64] model.fusion=none
    model.hyper_blocks=[0,3])
shallow=(model.context_channels=64 model.fusion=none model.g_a_blocks=[0,2,4,0] model.g_s_blocks=[0,4,2,0])
shape micro 330
shape wide 330 "${wide[@]}"
shape shallow_40 600 "${shallow[@]}"
shape shallow_64 600 "${shallow[@]}" model.latent_channels=64 # the preset 800k
