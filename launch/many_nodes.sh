#!/usr/bin/env bash
# Trains on the GPUs of several machines, which see this folder under the same path and reach each other by ssh
# without a password: bash launch/many_nodes.sh [overrides], on one of them. Without ssh, type it on each:
#     NODE_RANK=0 MASTER_ADDR=first-node bash launch/many_nodes.sh
# with NODE_RANK counting up in the hostfile's order, after `bash launch/environment.sh` on one of them.
# The run's folder is runs/MODEL unless told otherwise. Stopped or cut off, the same command goes on; SIGTERM, SIGUSR1
# or Ctrl-C on any of the machines, without ssh: all leave a checkpoint, exit code 75.
set -euo pipefail

hostfile=hostfile # one line a machine: its name and its GPUs, as in `first-node slots=8`
model=1b          # hpcm models lists them
shards=shards     # folder or URL that `hpcm shards build` made
images=null       # folder of evaluation images; null: none
steps=2000000     # optimizer steps of the whole schedule
engine=zero3      # zero0 zero1 zero2 zero3 zero3_offload
precision=bf16    # arithmetic of the convolutions: bf16 or fp32

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
[ -f "$hostfile" ] || fail "$hostfile is missing; write one line a machine, such as: first-node slots=8"
. launch/under_deepspeed.sh
start=under_deepspeed launcher=(--hostfile "$hostfile")
if [ -n "${NODE_RANK:-}" ]; then
    [ -n "${MASTER_ADDR:-}" ] || fail "NODE_RANK is set and MASTER_ADDR is not; name the first machine"
    launcher+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
        --master_port "${MASTER_PORT:-29500}")
elif ! command -v pdsh >/dev/null; then
    fail "pdsh is missing, which starts the other machines; install it, or see the top of this script"
else
    start=deepspeed # it passes signals on itself, by pdsh
fi
"$start" "${launcher[@]}" --module hpcm_scale.train model="$model" data.shards="$shards" \
    eval.images="$images" train.steps="$steps" engine="$engine" engine.precision="$precision" "$@"
