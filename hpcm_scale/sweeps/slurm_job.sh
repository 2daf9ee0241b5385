# `under_slurm COMMAND …`, in a batch job: runs the command as every task, with the variables of a launcher, and returns
# its exit code. After exit code 75 (stopped with a checkpoint) it requeues the job.
under_slurm() {
    local code=0
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it from sbatch

    # No launcher between Slurm and training, so that signals reach every process at once and nothing interrupts the
    # checkpoint. srun must not kill the other processes when the first one exits, which would turn 75 into 143;
    # processes that are left ten minutes after the first one has exited are killed. Signals are ignored until training
    # handles them, since a process that they end would fail the job; after the grace period Slurm ends or requeues it.
    trap : TERM # Slurm sends it to this script as well
    srun --kill-on-bad-exit=0 --wait=600 \
        bash -c 'trap "" TERM USR1; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' "$1" "$@" || code=$?

    # Not if Slurm ends the job: a cancelled job must not return, and a preempted one is already in the queue.
    if [ "$code" = 75 ] && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
