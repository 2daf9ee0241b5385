"""A Slurm cluster of one machine: its real daemons, with all their files in one folder."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
FINAL = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
"""States in which a job stays."""
KILL_WAIT = 10
"""Seconds between Slurm's SIGTERM and SIGKILL."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2
PartitionName=spare Nodes=localhost Default=YES PriorityTier=1 GraceTime=60
PartitionName=hasty Nodes=localhost PriorityTier=1 GraceTime=2
PartitionName=urgent Nodes=localhost PriorityTier=2
"""
"""The credentials of a job expire soon, because it waits that long in the queue before it starts again."""


def missing() -> list[str]:
    """Which of Slurm's programs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """What is asked of a running cluster; jobs see `environment`."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str | Path, cwd: Path | None = None, check: bool = True, **variables: str | Path) -> str:
        """What one of Slurm's programs prints; `variables` are added to its environment."""
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        words = list(map(str, command))
        answer = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert answer.returncode == 0 or not check, answer.stdout + answer.stderr
        return answer.stdout.strip()

    def submit(self, *arguments: str | Path, cwd: Path, **variables: str | Path) -> str:
        """The number of a new batch job."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, **variables)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol` says of a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def preempt(self) -> None:
        """Submit a job of greater weight that needs the whole machine, for a moment."""
        self.submit("--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=Path("/"))

    def wait(self, number: str, state: str, reported: Callable[[], object], seconds: float = 400) -> dict[str, str]:
        """The job, once it is in a state; `reported` is in the error if it does not get there, or ends in another."""

        def there() -> bool:
            now = self.job(number)["JobState"]
            assert now == state or now not in FINAL, reported()
            return now == state

        await_that(there, reported, seconds)
        return self.job(number)

    def jobs(self) -> str:
        """The numbers of the jobs that have not ended."""
        return self.call("squeue", "--noheader", "--format=%i", check=False)

    def clear(self) -> None:
        """Cancel all jobs, and wait until they have ended."""
        self.call("scancel", "--me")
        await_that(lambda: not self.jobs(), self.jobs, KILL_WAIT + 120)


def await_that(condition: Callable[[], object], reported: Callable[[], object], seconds: float = 400) -> None:
    """Wait for a condition; `reported` is in the error if it does not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, reported()
        time.sleep(0.1)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start munged, slurmctld and slurmd; in the end cancel what is in the queue, and stop them."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = {"controller_port": first.getsockname()[1], "node_port": second.getsockname()[1]}
    text = CONFIGURATION.format(folder=folder, user=getpass.getuser(), kill_wait=KILL_WAIT, **ports)
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    running = Cluster(folder)

    def logs() -> str:
        return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))

    def start(*command: str) -> AbstractContextManager[None]:
        return _daemon(command, folder / f"{command[0]}.log", running.environment)

    munge_files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "seed"}
    munge_options = [f"--{option}={folder / name}" for option, name in munge_files.items()]
    with ExitStack() as daemons:
        daemons.enter_context(start("munged", "--foreground", "--force", *munge_options))
        await_that((folder / "munge.socket").exists, logs)
        daemons.enter_context(start("slurmctld", "-D"))
        daemons.enter_context(start("slurmd", "-D", "-N", "localhost"))
        state = ("sinfo", "--noheader", "--partition=spare", "--format=%T")
        await_that(lambda: running.call(*state, check=False) == "idle", logs)
        yield running
        running.clear()


@contextmanager
def _daemon(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
