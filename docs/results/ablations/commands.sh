#!/usr/bin/env bash
# What was typed for ../ablations.md. photos: 122 real photos; kodak: the 24 Kodak images. One thread a run.
set -euo pipefail
export OMP_NUM_THREADS=1

python tiles.py photos/train tiles # 504 tiles of 512², which decode sooner than whole photos
hpcm shards build tiles --out shards

common=(engine=accelerate data.shards=shards eval.images=kodak eval.every=100000 objective.lmbda=0.013 schedule=wsd
    train.checkpoint_every=100000 data.workers=0 log.every=50 log.wandb=disabled)

# Equal compute, three seeds.
arm() { # NAME SEED KEYS
    hpcm train model=450k "${common[@]}" engine.precision=bf16 train.steps=1500 train.batch_size=4 \
        schedule.learning_rate=3e-3 schedule.warmup=50 train.seed="$2" run.dir="runs/$1_$2" "${@:3}"
}
for seed in 0 1 2; do
    arm plain $seed train.ema=[0.05,0.1]
    [ $seed = 2 ] || arm constant $seed schedule.decay=0 train.ema=[0.05,0.1]
    arm upstream $seed model.hyper_placement=upstream
    arm phi $seed model.fusion=none train.steps=1609
    arm public $seed objective.likelihood=public
    hpcm evaluate --weights runs/public_$seed/weights.safetensors --images kodak --estimate --visual 0 \
        --out evaluations/public_$seed # by the likelihood of the others
done
python ../../../benchmarks/ablations.py plain='runs/plain_*' upstream='runs/upstream_*' phi='runs/phi_*' \
    public='runs/public_*' ema_0.05='runs/plain_*:eval_ema_0.05/loss' ema_0.1='runs/plain_*:eval_ema_0.1/loss'

# Does the best learning rate of the smallest size hold at 16 times its parameters?
for size in 100k 1600k; do
    for rate in 2e-3 2.8e-3 4e-3 5.6e-3 8e-3 1.1e-2; do
        hpcm train model=hpcm model.size=$size model.fusion=none data.crop=128 "${common[@]}" eval.limit=8 \
            train.parametrisation=mup train.steps=400 train.batch_size=8 schedule.learning_rate=$rate schedule.warmup=20 \
            run.dir=transfer/${size}_$rate
    done
done

# Another λ from a finished model: 25 % of the steps.
micro=(hpcm train model=micro engine=accelerate engine.precision=bf16 data.shards=whole_photos eval.images=kodak eval.every=375
    train.batch_size=8 schedule.learning_rate=1.25e-3 schedule.warmup=50 data.workers=1 log.every=25 log.wandb=disabled)
"${micro[@]}" schedule=constant train.steps=1500 run.dir=lambda/trunk # λ = 0.013; ../machine/commands.sh
"${micro[@]}" schedule=wsd objective.lmbda=0.0483 init_from=lambda/trunk train.steps=375 run.dir=lambda/tuned
"${micro[@]}" schedule=wsd objective.lmbda=0.0483 train.steps=1500 run.dir=lambda/nothing

# Ladders.
ladder=(engine=accelerate data.shards=shards eval.images=kodak eval.every=250 eval.limit=8 train.steps=750 train.batch_size=4
    train.checkpoint_every=250 data.workers=0 log.every=10 log.wandb=disabled)
hpcm train experiment=best "${ladder[@]}"
hpcm train -m model=hpcm model.size=100k,400k,1600k schedule=paper \
    'schedule.learning_rate="${divide:0.03,${model.channels.1}}"' schedule.warmup=50 engine.precision=bf16 \
    run.sweep=paper_like "${ladder[@]}"
for ladder in best paper_like; do
    hpcm scaling collect runs/$ladder --out journals/$ladder
    hpcm scaling fit journals/$ladder --out $ladder
done
hpcm scaling curves journals/best journals/paper_like --out ladders.png
