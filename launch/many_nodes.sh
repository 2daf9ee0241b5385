#!/usr/bin/env bash
# Trains on the GPUs of several nodes, which share this folder under the same path and reach each other by ssh without
# a password. On one of them: bash launch/many_nodes.sh [overrides]. Without ssh, run on each node:
#     NODE_RANK=0 MASTER_ADDR=first-node bash launch/many_nodes.sh
# where NODE_RANK counts in the order of the hostfile, after `bash launch/environment.sh` on one of them.
# The default run folder is runs/MODEL. The same command resumes an interrupted run. Without ssh, SIGTERM, SIGUSR1 or
# Ctrl-C on any node makes all of them write a checkpoint and exit with code 75.
set -euo pipefail

hostfile=hostfile # one line per node: its name and its GPUs, such as `first-node slots=8`
model=1b          # hpcm models lists them
shards=shards     # folder or URL written by `hpcm shards build`
images=null       # folder of evaluation images; null: none
steps=2000000     # optimizer steps of the whole schedule
engine=zero3      # zero0 zero1 zero2 zero3 zero3_offload
precision=bf16    # arithmetic of the convolutions: bf16 or fp32

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
[ -f "$hostfile" ] || fail "$hostfile is missing; write one line per node, such as: first-node slots=8"
. launch/under_deepspeed.sh
start=under_deepspeed launcher=(--hostfile "$hostfile")
if [ -n "${NODE_RANK:-}" ]; then
    [ -n "${MASTER_ADDR:-}" ] || fail "NODE_RANK is set but MASTER_ADDR is not; set it to the first node"
    launcher+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
        --master_port "${MASTER_PORT:-29500}")
elif ! command -v pdsh >/dev/null; then
    fail "pdsh, which starts the other nodes, is missing; install it, or see the top of this script"
else
    start=deepspeed # it forwards signals itself, with pdsh
fi
"$start" "${launcher[@]}" --module hpcm_scale.train model="$model" data.shards="$shards" \
    eval.images="$images" train.steps="$steps" engine="$engine" engine.precision="$precision" "$@"
