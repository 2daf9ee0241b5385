"""The processes of a job end as a whole; those of an earlier call are left alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from hpcm_scale.config.compose import compose
from hpcm_scale.errors import STOPPED
from hpcm_scale.sweeps.jobs import Job, ended, group_members, last_error, last_mark, log_of, make_job, started, tail
from hpcm_scale.sweeps.local import AtOnce, JobProcess, Share
from hpcm_scale.sweeps.status import summary


def wait(process: JobProcess) -> int:
    deadline = time.monotonic() + 300
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


@pytest.fixture
def start(tmp_path):
    """`start(script, grace=…)`: a job whose processes are a shell's, once it has said `ready`."""

    def run(script: str, grace: float = 30.0) -> JobProcess:
        log = tmp_path / "runs" / "job.log"
        process = JobProcess(["bash", "-c", f"{script}"], log, os.environ, grace)
        deadline = time.monotonic() + 300
        while "ready\n" not in tail(log) or "as process group" not in tail(log):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    run.log = tmp_path / "runs" / "job.log"
    return run


def group(log) -> int:
    """The process group that a log tells of."""
    [line] = [line for line in tail(log).splitlines() if "as process group" in line]
    return last_mark(line).group


def test_the_log_of_a_failed_job_has_the_reason(start):
    assert wait(start("echo ready; echo 'ValueError: bad' >&2; exit 3")) == 3
    text = tail(start.log)
    assert last_mark(text).code == 3 and last_error(text) == "ValueError: bad"
    assert wait(start("echo ready; exit 0")) == 0  # started again, in the same log
    assert last_mark(tail(start.log)).code == 0 and tail(start.log).count("ready\n") == 2


def test_a_command_may_have_words_that_are_not_utf_8(tmp_path):
    log = tmp_path / "caf\udce9.log"
    assert wait(JobProcess(["test", "-d", str(tmp_path), "-a", "-n", "run.dir=caf\udce9"], log, os.environ, 30)) == 0
    assert last_mark(tail(log)).code == 0


def test_the_log_of_a_run_that_stopped_has_its_exit_code(start):
    process = start(f"trap 'exit {STOPPED}' TERM; echo ready; sleep 60 & wait")
    process.stop()
    assert wait(process) == STOPPED
    assert tail(start.log).endswith(f"ended with exit code {STOPPED}, as asked\n")
    assert not last_mark(tail(start.log)).failed
    assert wait(start(f"exit {STOPPED}")) == STOPPED  # by itself, for example for train.max_hours
    assert tail(start.log).endswith(f"ended with exit code {STOPPED}\n")
    assert not last_mark(tail(start.log)).failed


def test_asked_to_stop_a_job_may_finish_what_it_does(start):
    process = start("trap 'sleep 0.3; echo checkpoint; exit 0' TERM; echo ready; sleep 60 & wait")
    process.stop()
    assert wait(process) == 0
    assert "checkpoint" in tail(start.log) and last_mark(tail(start.log)).code == 0
    assert group_members(group(start.log)) == []


def test_a_job_that_does_not_stop_is_killed_after_its_grace(start):
    process = start("trap '' TERM; sleep 60 & echo ready; wait; wait", grace=0.5)
    began = time.monotonic()
    process.stop()
    assert wait(process) == -9 and time.monotonic() - began >= 0.5
    assert group_members(group(start.log)) == []
    assert last_mark(tail(start.log)).code == -9 and not last_mark(tail(start.log)).failed  # it was asked to end


def test_a_job_can_be_killed_at_once(start):
    process = start("trap '' TERM; sleep 60 & echo ready; wait; wait")
    process.stop()
    process.kill()
    assert wait(process) == -9 and group_members(group(start.log)) == []


def test_what_outlives_its_launcher_is_ended_and_reported_as_a_failure(start):
    process = start("sleep 60 & echo ready; kill -KILL $$")
    assert wait(process) == -9 and group_members(group(start.log)) == []
    assert last_error(tail(start.log)) == "a process was killed by SIGKILL"


def test_what_outlives_its_launcher_is_asked_once(start):
    """Asked again, training takes it for a second signal, which ends it without a checkpoint."""
    stays = "trap 'asked=$((asked+1))' TERM; echo ready; kill -KILL $$; for i in {1..9}; do sleep 0.1; done"
    process = start(f"({stays}; echo asked $asked) & wait")
    assert wait(process) == -9
    assert "asked 1\n" in tail(start.log)


def test_a_run_that_another_call_trains_is_left_to_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    job = make_job(compose(["model=nano"]), ["model=nano"], ["model"])
    other = JobProcess(["sleep", "60"], job.log, os.environ, 1)
    try:
        other._log.close()  # as if that call were dead: its processes live on
        assert AtOnce([job], [Share(1, ())], cores=1, grace=1).train() is None
    finally:
        os.killpg(other._process.pid, signal.SIGKILL)
        other._process.wait()
    assert "is being trained by another command" in capfd.readouterr().out and not job.folder.exists()
    again = JobProcess(["true"], job.log, os.environ, 1)
    assert wait(again) == 0


def test_runs_of_one_name_in_several_folders_are_kept_apart(tmp_path, monkeypatch, capfd):
    """Each is waited for, and here reported as failed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    jobs = [Job(compose([f"run.dir={size}/trial", "model=nano"]), ()) for size in ("a", "b")]
    assert AtOnce(jobs, [Share(1, ())] * 2, cores=1, grace=1).train() is None
    output = capfd.readouterr().out
    assert "a/trial: failed: " in output and "b/trial: failed: " in output
    assert summary(jobs, jobs) == 1
    rows = [line.split()[0] for line in capfd.readouterr().out.splitlines() if " nano " in line]
    assert rows == ["a/trial", "b/trial"]


@pytest.mark.launch
def test_jobs_are_seen_to_their_end_when_nobody_reads_what_is_said():
    """As of `… | tee log` after Ctrl-C: tee is gone first. A command opens its streams so that they outlive it."""
    program = """
from hpcm_scale.errors import open_streams
open_streams()
from hpcm_scale.sweeps.local import _tell
_tell("a job has ended")
print("the summary", flush=True)
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=writer, timeout=400)
    os.close(writer)
    assert done.returncode == 0


def test_the_exit_code_of_a_sweep_tells_how_its_runs_ended(make_run, tmp_path, monkeypatch, exit_codes):
    monkeypatch.chdir(tmp_path)

    def job(name: str, done: int, end: str = "") -> Job:
        make_run(name, done)
        log_of(tmp_path / name).write_text(started(1) + end)
        return Job(compose([f"run.dir={name}", "model=nano", "train.steps=10"]), ())

    finished = job("finished", 10, ended(0))
    stopped, killed = job("stopped", 3, ended(STOPPED)), job("killed", 3, ended(-9, asked=True))
    failed = job("failed", 10, ended(3))
    assert summary([finished], [finished]) == 0
    assert summary([finished, stopped, killed], [finished, stopped, killed]) == STOPPED
    assert summary([stopped, failed, finished], [stopped, failed, finished]) == 1
    assert summary([failed, finished], []) == 0  # the log tells of an earlier start: there was nothing left to train
    assert all("sweep" in exit_codes[str(code)] or exit_codes[str(code)].strip() == "all" for code in (0, 1, STOPPED))


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """`interrupted(training, *words)`: what `AtOnce.train` returns for two runs, and the runs; each is a shell's, below
    another one in the place of `deepspeed`. Once both have said a word, the next Ctrl-C comes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hpcm_scale.sweeps.local.ONCE_SECONDS", 0)
    program = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(program))
    jobs = [Job(compose([f"run.dir={name}", "model=nano"]), ()) for name in "ab"]

    def train(training: str, *words: str) -> tuple[int | None, list[Job]]:
        program.write_text(f'#!/bin/bash\nbash -c "{training}" & wait $!\n')
        program.chmod(0o755)

        def interrupt() -> None:
            for word in words:
                while not all(f"{word}\n" in tail(job.log) for job in jobs):
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        return AtOnce(jobs, [Share(1, ())] * 2, cores=1, grace=600).train(), jobs

    return train


def test_a_signal_stops_all_runs_of_a_sweep(interrupted):
    number, jobs = interrupted(f"trap 'exit {STOPPED}' TERM; echo ready; sleep 60 & wait", "ready")
    assert number is None
    assert all(tail(job.log).endswith(f"ended with exit code {STOPPED}, as asked\n") for job in jobs)


def test_with_fail_fast_a_failure_stops_the_other_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "program"
    failing = 'case "$*" in *run.dir=\\"a\\"*) while [ ! -e ready ]; do sleep 0.02; done; exit 3;; esac'
    training = f"trap 'exit {STOPPED}' TERM; touch ready; sleep 60 & wait"
    program.write_text(f'#!/bin/bash\n{failing}\nbash -c "{training}" & wait $!\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    jobs = [make_job(compose([f"run.dir={name}", "model=nano"]), [f"run.dir={name}"], ["model"]) for name in "abc"]
    training = AtOnce(jobs, [Share(1, ())] * 2, cores=1, grace=600, fail_fast=True)
    assert training.train() is None and training.stopped
    assert tail(jobs[1].log).endswith(f"ended with exit code {STOPPED}, as asked\n") and not jobs[2].log.exists()
    assert "a: failed: " in capfd.readouterr().out and summary(jobs, jobs) == 1


def test_a_second_signal_ends_a_sweep_at_once(interrupted):
    """Each run takes a minute to stop."""
    training = "trap 'echo stopping; sleep 60' TERM; echo ready; sleep 60 & wait"
    number, jobs = interrupted(training, "ready", "stopping")
    assert number == signal.SIGINT
    assert all(tail(job.log).endswith("ended with exit code -9, as asked\n") for job in jobs)


def test_how_far_a_run_is_does_not_hang_on_the_journals_interval(tmp_path, monkeypatch, capfd):
    """Stopped at step 3, as asked, with a line of the journal every 10 steps."""
    monkeypatch.chdir(tmp_path)
    job = Job(compose(["run.dir=run", "model=nano", "train.stop_after=3", "log.every=10"]), ())
    (job.folder / "checkpoints" / "step_00000003").mkdir(parents=True)
    (job.folder / "checkpoints" / "step_00000003" / "complete.json").write_text("{}")
    assert summary([job], [job]) == 0 and " 3/2,000,000 " in capfd.readouterr().out
