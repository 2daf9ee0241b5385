"""The quickstart and the scripts that start training, with stand-ins for the launcher and for Slurm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_shell import BASE_PATH, bash, program

from hpcm_scale.config.compose import compose


@pytest.fixture
def launcher(active: Path, tmp_path: Path) -> Path:
    """`deepspeed`, noting its arguments one a line."""
    return program(active / "bin/deepspeed", f'printf "%s\\n" "$@" >>"{tmp_path}/calls"')


def overrides(arguments: list[str]) -> list[str]:
    """What training is given: everything after its module's name."""
    return arguments[arguments.index("hpcm_scale.train") + 1 :]


def test_one_node_starts_a_run_that_can_be_configured(checkout, active, launcher, calls) -> None:
    script = checkout / "launch/one_node.sh"
    done = bash(script, "model=micro", "data.cache=a folder", cwd=checkout.parent, VIRTUAL_ENV=active)
    assert done.returncode == 0, done.stderr
    arguments = calls()[2:]  # pip comes first
    assert arguments[:2] == ["--module", "hpcm_scale.train"]
    config = compose(overrides(arguments))
    assert (config.model.name, config.data.cache, config.data.shards) == ("micro", "a folder", "shards")


def test_many_nodes_by_hostfile_with_and_without_ssh(checkout, active, launcher, calls) -> None:
    script = checkout / "launch/many_nodes.sh"
    missing = bash(script, cwd=checkout, VIRTUAL_ENV=active)
    assert missing.returncode == 1
    assert missing.stderr.startswith("many_nodes.sh: hostfile is missing; ")
    (checkout / "hostfile").write_text("first slots=8\nsecond slots=8\n", encoding="utf-8")

    program(active / "bin/pdsh", "exit 0")
    calls()
    assert bash(script, "train.seed=1", cwd=checkout, VIRTUAL_ENV=active).returncode == 0
    arguments = calls()
    assert arguments[:4] == ["--hostfile", "hostfile", "--module", "hpcm_scale.train"]
    config = compose(overrides(arguments))
    assert (config.model.name, config.engine.zero_stage, config.train.seed) == ("1b", 3, 1)

    (active / "bin/pdsh").unlink()
    if not shutil.which("pdsh", path=BASE_PATH):
        assert "pdsh is missing" in bash(script, cwd=checkout, VIRTUAL_ENV=active).stderr
    assert "MASTER_ADDR is not" in bash(script, cwd=checkout, VIRTUAL_ENV=active, NODE_RANK="1").stderr
    calls()
    bash(script, cwd=checkout, VIRTUAL_ENV=active, NODE_RANK="1", MASTER_ADDR="first")
    assert calls()[2:7] == ["--no_ssh", "--node_rank", "1", "--master_addr", "first"]


@pytest.fixture
def slurm(active: Path, tmp_path: Path) -> dict[str, str]:
    """Slurm's variables, an `srun` that starts one task after the other, and `scontrol`."""
    program(
        active / "bin/srun",
        'shift\nfor rank in 0 1 2 3; do SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || exit; done\n'
        '[ -z "${SIGNAL_THE_SCRIPT:-}" ] || kill -TERM $PPID',
    )
    program(
        active / "bin/scontrol",
        'case "$1 $2" in "show hostnames") printf "first\\nsecond\\n";; "show job") '
        'echo "JobState=${STATE:-RUNNING} Reason=";;\n'
        f'*) echo "scontrol $*" >>"{tmp_path}/calls";; esac',
    )
    training = (
        f'echo "rank $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR" >>"{tmp_path}/calls"\n'
        f'echo "$@" >"{tmp_path}/arguments"\n'
        'mkdir -p "$FOLDER"\n'
        'echo "{model: {name: 1b}, objective: {lmbda: 0.013}, train: {steps: 9}}" >"$FOLDER/config.yaml"\n'
        """printf '{"step": %s, "time": 1, "train/images": 1, "compute/pflops": 1}\\n' "$REACHES" """
        '>"$FOLDER/metrics.jsonl"\n'
        'exit "${TRAINING_FAILS:-0}"'
    )
    python = (active / "bin/python").read_text().removeprefix("#!/bin/bash\n")
    program(active / "bin/python", f'if [ "$1 $2" = "-m hpcm_scale.train" ]; then shift 2\n{training}\nfi\n{python}')
    return {
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "VIRTUAL_ENV": str(active),
    }


def test_slurm_numbers_the_ranks_and_requeues_what_is_not_finished(checkout, calls, slurm, tmp_path) -> None:
    script = shutil.copy(checkout / "launch/slurm.sbatch", tmp_path / "slurm_script")  # as Slurm does
    ranks = [f"rank {rank} {rank % 2} 4 2 first" for rank in range(4)]

    def submit(*arguments: str, folder: str = "runs/1b", **variables: str) -> tuple[int, list[str]]:
        """The exit code and, after those of pip, the calls."""
        done = bash(script, *arguments, cwd=checkout, FOLDER=folder, **slurm | variables)
        assert not done.stderr, done.stderr
        return done.returncode, [call for call in calls() if not call.startswith("pip")]

    assert submit("train.seed=7", REACHES="5") == (0, [*ranks, "scontrol requeue 41"])
    config = compose((tmp_path / "arguments").read_text().split())
    assert (config.model.name, config.run.dir, config.train.seed) == ("1b", "runs/1b", 7)

    assert submit(REACHES="9") == (0, ranks)  # finished
    assert submit("run.dir=a b", folder="a b", REACHES="5") == (0, [*ranks, "scontrol requeue 41"])
    assert submit("train.stop_after=5", REACHES="5") == (0, ranks)  # stopped where it was asked to
    assert submit(REACHES="5", TRAINING_FAILS="3") == (3, ranks[:1])  # a mistake is not tried again
    assert submit(REACHES="5", SIGNAL_THE_SCRIPT="yes") == (0, [*ranks, "scontrol requeue 41"])
    assert submit(REACHES="5", SIGNAL_THE_SCRIPT="yes", STATE="COMPLETING") == (0, ranks)  # cancelled, say


def test_the_photos_of_the_quickstart(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    command = [sys.executable, str(project / "launch/quickstart_photos.py"), str(tmp_path)]
    subprocess.run(command, check=True)
    train, held_out = ({path.name: path for path in (tmp_path / part).iterdir()} for part in ("train", "held_out"))
    assert len(train) == 7 and len(held_out) == 2 and not train.keys() & held_out.keys()
    written = held_out["chelsea.png"].stat().st_mtime_ns
    subprocess.run(command, check=True)
    assert held_out["chelsea.png"].stat().st_mtime_ns == written


def test_the_quickstart_skips_what_is_done(checkout, active, calls, tmp_path) -> None:
    """Its order and its skipping; the commands themselves have their own tests."""
    log = f'echo "${{0##*/}} $*" >>"{tmp_path}/calls"'
    program(
        active / "bin/deepspeed", f"{log}\nmkdir -p runs/quickstart; cd runs/quickstart\ntouch $LEAVES metrics.jsonl"
    )
    outputs = 'case "$*" in *evaluate*) touch runs/quickstart/visual.png;; *curves*) touch "${@: -1}";; esac'
    program(active / "bin/hpcm", f"{log}\n{outputs}")
    python = (active / "bin/python").read_text().removeprefix("#!/bin/bash\n")
    program(active / "bin/python", f'case "$1" in -c) echo 0; exit;; launch/*) exit;; esac\n{python}')
    script = checkout / "launch/quickstart.sh"

    cut_off = bash(script, cwd=checkout, VIRTUAL_ENV=active, LEAVES="")
    assert cut_off.returncode == 1
    assert cut_off.stderr == "quickstart.sh: training stopped before its end; the same command goes on\n"
    calls()
    whole = bash(script, cwd=checkout, VIRTUAL_ENV=active, LEAVES="weights.safetensors")
    assert whole.returncode == 0, whole.stderr
    assert [line.split(" ")[:2] for line in calls()] == [
        ["hpcm", "shards"],
        ["deepspeed", "--quiet"],
        ["hpcm", "evaluate"],
        ["hpcm", "scaling"],
    ]
    again = bash(script, cwd=checkout, VIRTUAL_ENV=active)
    assert [line.split(" ")[:2] for line in calls()] == [["hpcm", "shards"]]
    assert again.stdout.partition("Look at")[2] == whole.stdout.partition("Look at")[2] != ""
    bash(script, "train.steps=9", cwd=checkout, VIRTUAL_ENV=active, LEAVES="weights.safetensors")
    lengthened = calls()
    assert len(lengthened) == 4 and lengthened[1].endswith(" train.steps=9")
