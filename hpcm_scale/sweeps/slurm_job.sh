# `under_slurm COMMAND …`, in a batch job: runs the command once a task, numbered as by any launcher, and returns its
# exit code. Is that 75 (stopped, with a checkpoint, to go on), the job goes back into the queue first.
under_slurm() {
    local code=0
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch

    # No launcher between Slurm and training: a signal to stop reaches every process at once, and nothing cuts short
    # the checkpoint that follows. Nor does srun: told to kill the others when the first process ends, it would turn
    # 75 into 143. A process that is still there ten minutes after the first one has ended hangs, and is killed.
    # Signals that come before training listens are ignored: ended by them, the job would count as failed. Slurm ends
    # it, and puts it back into the queue if that is what it wants, when its grace is over.
    trap : TERM # sent to this script too, it does not end it
    srun --kill-on-bad-exit=0 --wait=600 \
        bash -c 'trap "" TERM USR1; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' "$1" "$@" || code=$?

    # Unless Slurm is ending the job itself: cancelled, it is to stay away; preempted, it is in the queue already.
    if [ "$code" = 75 ] && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
