#!/usr/bin/env bash
# The runs of ../start.md, in an empty folder; kodak: the 24 Kodak images. One thread per run. Finished runs are skipped.
set -euo pipefail
export OMP_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
project=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." && pwd)

[ -d photos ] || python "$project/launch/quickstart_photos.py" photos
[ -d shards ] || hpcm shards build photos/train --out shards

train() { # FOLDER STEPS KEYS
    [ -f "$1/weights.safetensors" ] || hpcm train experiment=quickstart engine=accelerate engine.precision=bf16 \
        train.steps="$2" train.checkpoint_every=100 eval.every=100000 data.shards=shards eval.images=kodak \
        log.wandb=disabled run.dir="$1" "${@:3}" # evaluated at the end
}

shape() { # NAME STEPS KEYS
    train "shapes/$1" "$2" model=micro optimizer=muon schedule.learning_rate=3e-3 "${@:3}"
}
wide=(model.latent_channels=120 model.context_channels=64 model.channels=[16,32,64] model.fusion=none
    model.hyper_blocks=[0,3])
shallow=(model.context_channels=64 model.fusion=none model.g_a_blocks=[0,2,4,0] model.g_s_blocks=[0,4,2,0])
shape micro 330
shape wide 330 "${wide[@]}"
shape shallow_40 600 "${shallow[@]}"
shape shallow_64 600 "${shallow[@]}" model.latent_channels=64 # the preset 800k

arm() { # START OPTIMIZER RATE SEED
    declare -A steps=([adam]=315 [muon]=300 [soap]=310) # of equal compute, 0.00798 PFLOPs
    train "arms/$1_$2_$3_$4" "${steps[$2]}" model.start="$1" optimizer="$2" schedule.learning_rate="$3" train.seed="$4"
}
for rate in 1.5e-3 3e-3 6e-3 1.2e-2; do
    for optimizer in adam muon soap; do
        for start in random klt; do
            arm "$start" "$optimizer" "$rate" 0 || [ "$start $optimizer $rate" = "klt adam 1.2e-2" ] # this one diverges
        done
    done
done
arm klt muon 2.4e-2 0
for seed in 1 2; do # the best rate of each
    arm random adam 3e-3 "$seed"
    arm random muon 6e-3 "$seed"
    arm random soap 6e-3 "$seed"
    arm klt adam 6e-3 "$seed"
    arm klt muon 1.2e-2 "$seed"
    arm klt soap 6e-3 "$seed"
done

# The length of the quickstart
train quick/adam_6e-3 588 optimizer=adam schedule.learning_rate=6e-3
train quick/muon_6e-3 560 optimizer=muon schedule.learning_rate=6e-3
train quick/muon_1.2e-2 560 optimizer=muon schedule.learning_rate=1.2e-2
train quick/soap_6e-3 579 optimizer=soap schedule.learning_rate=6e-3

# Latent channels at λ = 0.013
latent() { # NAME STEPS KEYS
    train "latent/$1" "$2" objective.lmbda=0.013 schedule.learning_rate=6e-3 "${@:3}"
}
narrow() { # M PRIOR HYPER STEPS KEYS
    latent "M$1" "$4" model.channels=[16,32,64] model.latent_channels="$1" model.context_channels="$2" \
        model.hyper_latent_channels="$3" model.hyper_channels="$3" "${@:5}"
}
latent 2m 200 model=2m
narrow 64 176 32 215
narrow 96 136 48 266
narrow 128 88 48 332
m128=(model.channels=[16,32,64] model.latent_channels=128 model.context_channels=96)
latent m128_soap 317 "${m128[@]}"
latent m128_adam 323 "${m128[@]}" optimizer=adam
latent m128_random_muon 310 "${m128[@]}" model.start=random optimizer=muon
