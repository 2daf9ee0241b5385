"""The quickstart and the scripts that start training, with stand-ins for the launcher and for Slurm."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_shell import BASE_PATH, bash, program
from PIL import Image

from hpcm_scale.config.compose import compose
from hpcm_scale.errors import STOPPED

pytestmark = pytest.mark.launch


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
    assert arguments[:4] == ["--log_level", "critical", "--module", "hpcm_scale.train"]
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
        assert "pdsh, which starts the other nodes, is missing" in bash(script, cwd=checkout, VIRTUAL_ENV=active).stderr
    assert "MASTER_ADDR is not" in bash(script, cwd=checkout, VIRTUAL_ENV=active, NODE_RANK="1").stderr
    calls()
    bash(script, cwd=checkout, VIRTUAL_ENV=active, NODE_RANK="1", MASTER_ADDR="first", MASTER_PORT="41000")
    where = ["--master_addr", "first", "--master_port", "41000"]
    assert calls()[2:11] == ["--hostfile", "hostfile", "--no_ssh", "--node_rank", "1", *where]


def test_exit_codes_and_signals_pass_through(checkout, active, tmp_path, exit_codes) -> None:
    """`deepspeed`, its launcher and a training process that takes its time to stop, as programs of the shell."""
    training = (
        f'trap "sleep 1; echo stopped; exit {STOPPED}" USR1; touch "{tmp_path}/trains"; while :; do sleep 0.1; done'
    )
    program(tmp_path / "training", training)
    program(tmp_path / "launcher", f'trap "echo killed; exit 1" USR1; "{tmp_path}/training" & wait $!')
    program(active / "bin/deepspeed", f'"{tmp_path}/launcher"; exit')
    environment = {"PATH": BASE_PATH, "VIRTUAL_ENV": str(active)}
    command = ["bash", checkout / "launch/one_node.sh"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "trains").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=400)
    assert (process.returncode, output.splitlines()[-1], errors) == (STOPPED, "stopped", "")

    program(active / "bin/deepspeed", "exit $((256 - 9))")  # as when a process was killed
    killed = bash(checkout / "launch/one_node.sh", cwd=checkout, VIRTUAL_ENV=active)
    assert (killed.returncode, killed.stderr) == (247, "one_node.sh: a training process was killed by signal 9\n")
    assert "one_node.sh" in exit_codes["256 − signal"]


@pytest.fixture
def slurm(active: Path, tmp_path: Path) -> dict[str, str]:
    """Slurm's variables, an `srun` that starts one task after the other, and `scontrol`."""
    program(
        active / "bin/srun",
        "code=0; while [[ $1 == -* ]]; do shift; done\n"
        'for rank in 0 1 2 3; do SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || code=$?; done\n'
        '[ -z "${SIGNAL_THE_SCRIPT:-}" ] || kill -TERM $PPID\nexit $code',
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
        'exit "$ENDS_WITH"'
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


def test_slurm_numbers_the_ranks_and_requeues_what_was_stopped(checkout, project, calls, slurm, tmp_path) -> None:
    """A real Slurm is in test_launch_slurm.py; this is for machines without one."""
    script = shutil.copy(checkout / "launch/slurm.sbatch", tmp_path / "slurm_script")  # as Slurm does
    (checkout / "hpcm_scale").symlink_to(project / "hpcm_scale")
    ranks = [f"rank {rank} {rank % 2} 4 2 first" for rank in range(4)]
    again = "scontrol requeue 41"

    def submit(code: int, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """The exit code and, after those of pip, the calls; training ends with `code`."""
        done = bash(script, *arguments, cwd=checkout, ENDS_WITH=str(code), **slurm | variables)
        assert not done.stderr, done.stderr
        return done.returncode, [call for call in calls() if not call.startswith("pip")]

    assert submit(0, "train.seed=7") == (0, ranks)
    config = compose((tmp_path / "arguments").read_text().split())
    assert (config.model.name, config.train.seed) == ("1b", 7)
    assert submit(2) == (2, ranks)  # a mistake is not tried again
    assert submit(STOPPED) == (STOPPED, [*ranks, again])
    assert submit(STOPPED, SIGNAL_THE_SCRIPT="yes") == (STOPPED, [*ranks, again])
    assert submit(STOPPED, STATE="COMPLETING") == (STOPPED, ranks)  # cancelled, or in the queue already


def test_the_photos_of_the_quickstart(project: Path, tmp_path: Path) -> None:
    """Each image once, large enough for a crop of 256 in training, written only once; a missing package is named."""
    pytest.importorskip("mvtbdata")
    script = str(project / "launch/quickstart_photos.py")
    subprocess.run([sys.executable, script, str(tmp_path)], check=True)
    train, held_out = ({path.name: path for path in (tmp_path / part).iterdir()} for part in ("train", "held_out"))
    assert len(train) == 44 and len(held_out) == 5 and not train.keys() & held_out.keys()
    for path in train.values():
        with Image.open(path) as image:
            assert min(image.size) >= 256 and max(image.size) <= 1100
    written = held_out["chelsea.png"].stat().st_mtime_ns
    subprocess.run([sys.executable, script, str(tmp_path)], check=True)
    assert held_out["chelsea.png"].stat().st_mtime_ns == written
    without = "import runpy, sys; sys.modules['mvtbdata'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", without, script], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("hpcm: mvtb-data is not installed")
        and done.stderr.count("\n") == 1
    )


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
    assert cut_off.stderr == "quickstart.sh: training stopped early; the same command resumes it\n"
    calls()
    whole = bash(script, cwd=checkout, VIRTUAL_ENV=active, LEAVES="weights.safetensors")
    assert whole.returncode == 0, whole.stderr
    assert [line.split(" ")[:2] for line in calls()] == [
        ["hpcm", "shards"],
        ["deepspeed", "--log_level"],
        ["hpcm", "evaluate"],
        ["hpcm", "scaling"],
    ]
    again = bash(script, cwd=checkout, VIRTUAL_ENV=active)
    assert [line.split(" ")[:2] for line in calls()] == [["hpcm", "shards"]]
    assert again.stdout.partition("Look at")[2] == whole.stdout.partition("Look at")[2] != ""
    bash(script, "train.steps=9", cwd=checkout, VIRTUAL_ENV=active, LEAVES="weights.safetensors")
    lengthened = calls()
    assert len(lengthened) == 4 and lengthened[1].endswith(" train.steps=9")
