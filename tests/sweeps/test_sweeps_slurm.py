"""What a sweep submits to Slurm, with stand-ins for its programs; tests/launch has a real Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hpcm_scale.errors import STOPPED
from hpcm_scale.sweeps.status import Follower

pytestmark = pytest.mark.launch

COMMON = ("train.batch_size=2", "train.checkpoint_every=1", "log.wandb=disabled", "data.workers=0", "engine=accelerate")


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def test_what_is_not_in_the_queue_is_submitted_and_its_progress_is_printed(shards, train, tmp_path, monkeypatch):
    """sbatch runs the script at once, its output appended where the script says."""
    variables = "SLURM_JOB_ID=41 SLURM_JOB_NODELIST=n SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE=1 SLURM_CPUS_PER_TASK=1"
    program(
        tmp_path / "bin" / "sbatch",
        f'log=$(sed -n "s/^#SBATCH --output=//p" "$2"); {variables} bash "$2" >>"$log" 2>&1; echo "41;cluster"',
    )
    srun = tmp_path / "bin" / "srun"
    program(srun, 'while [[ $1 == -* ]]; do shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 "$@"')
    program(tmp_path / "bin" / "squeue", 'case "$*" in *hpcm_model=450k_*) echo 57;; esac')
    program(
        tmp_path / "bin" / "scontrol",
        f'case "$1 $2" in "show hostnames") echo 127.0.0.1;; "show job") echo JobState=${{STATE:-RUNNING}};; '
        f'*) echo "$*" >>"{tmp_path}/calls";; esac',
    )
    sweep, requeued = tmp_path / "runs" / "sweep_model", tmp_path / "calls"
    call = ("-m", "model=nano,450k", "train.steps=2", "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    code, output, errors = train(*call, f"data.shards={shards}", *COMMON)
    assert code == 0, output + errors
    assert "model=nano: Slurm job 41, log: " in output
    assert "model=450k: already in the queue as Slurm job 57" in output
    assert not (sweep / "model=450k").exists() and not requeued.exists()
    nano = sweep / "model=nano"
    assert Follower(nano).look().state == "finished" and Follower(nano).look().step == 2

    journal = nano / "metrics.jsonl"
    first, _ = journal.read_text().splitlines(keepends=True)

    def submit(code: int, steps: str, **variables: str) -> tuple[str, bool]:
        """The run's state, and whether its job was requeued, after training ended with `code`."""
        program(srun, f"echo '{steps}' >'{journal}'; exit {code}")
        requeued.unlink(missing_ok=True)
        submission = [str(tmp_path / "bin" / "sbatch"), "--parsable", f"{nano}.sbatch"]
        subprocess.run(submission, check=True, timeout=400, env=os.environ | variables, capture_output=True)
        return Follower(nano).look().state, requeued.exists()

    assert submit(3, first.strip()) == ("failed", False)  # a mistake is not tried again
    assert submit(STOPPED, first.strip()) == ("stopped", True)
    assert submit(STOPPED, first.strip(), STATE="COMPLETING") == ("stopped", False)  # cancelled, say
