"""What files tell of a run: its log, its state, the table, `hpcm sweep status`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from hpcm_scale.commands.sweep import main
from hpcm_scale.config.compose import compose
from hpcm_scale.formatting import duration
from hpcm_scale.scaling.filters import TRAINING, end
from hpcm_scale.scaling.runs import load_run
from hpcm_scale.sweeps.jobs import (
    FILE_NAME,
    Job,
    Mark,
    ended,
    last_error,
    last_mark,
    lives,
    log_of,
    read_plan,
    started,
    starting,
)
from hpcm_scale.sweeps.status import Follower, sentence


def long_ago(*paths) -> None:
    for path in paths:
        os.utime(path, (time.time() - 3600,) * 2)


def reported(folder, text: str) -> None:
    log_of(folder).write_text(text, encoding="utf-8")


ERRORS = {
    "hpcm: there are no shards at x; build them\n": "there are no shards at x; build them",
    'Traceback …:\n  File "a.py", line 3\nValueError: bad\nmore\n': "ValueError: bad",
    "[rank1]: torch.cuda.OutOfMemoryError: CUDA out of memory\n": "torch.cuda.OutOfMemoryError: CUDA out of memory",
    "[ERROR] ['python'] exits with return code = -9\n": "a process was killed by SIGKILL",
    "exits with return code = 3\n": "exit code 3",
    "hpcm sweep: ended with exit code -15\n": "a process was killed by SIGTERM",
    f"ValueError: said first\n{started(1)}": "ValueError: said first",
    "nothing\n": "it ended without an error message",
}


@pytest.mark.parametrize("text", ERRORS)
def test_why_a_run_failed(text):
    assert last_error(f"hpcm: of an earlier start\n{starting(['x'])}{text}") == ERRORS[text]


def test_a_run_whose_end_fails_is_not_finished(make_run):
    run = make_run("run", 10)  # the journal is whole, the export of the weights met a full disk
    reported(run, started(1) + "OSError: no space\n" + ended(1))
    assert Follower(run).look().state == "failed"


@pytest.mark.parametrize("torn", ["", "ended", "ended with exit code ", "started on ", "started on a as process group"])
def test_a_torn_mark_is_none(torn):
    mark = last_mark(starting(["x"]) + f"hpcm sweep: {torn}")
    assert mark is not None and mark.group is None and mark.kind != "ended"


def test_marks_come_back_from_a_log():
    assert last_mark("") is None and last_mark("step 3\n") is None
    assert last_mark(started(12) + "words\n") == Mark("started", group=12)
    assert last_mark(started(12) + "words\n" + ended(-9)) == Mark("ended", code=-9)
    assert last_mark("hpcm sweep: started on another.machine as process group 12\n") == Mark("started")
    assert last_mark("hpcm sweep: started in Slurm job 12\n") == Mark("started")


def test_only_processes_of_ours_are_alive():
    def living(*arguments: str) -> bool:
        command = [sys.executable, "-c", "print(flush=True); input()", *arguments]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, start_new_session=True)
        process.stdout.readline()  # its arguments can be read a moment after it has begun
        try:
            return lives(last_mark(started(process.pid)))
        finally:
            process.communicate(b"\n")

    assert living("hpcm_scale.train")
    assert not living("other")  # the number of a group that is no more
    assert not lives(None) and not lives(Mark("ended"))


def test_a_running_run(make_run):
    state = Follower(make_run("run", 4, evaluate=3)).look()
    assert (state.state, state.step, state.plan.steps, state.plan.model) == ("running", 4, 10, "nano")
    assert state.plan.parameters == 210_719
    assert (state.loss, state.bpp, state.psnr, state.evaluated) == (3.0, 0.4, 24.0, True)
    assert (state.pflops, state.seconds, state.seconds_left) == (0.04, 8.0, 12.0)


def test_before_the_first_evaluation_the_loss_is_of_training(make_run):
    state = Follower(make_run("run", 4)).look()
    assert (state.loss, state.psnr) == pytest.approx((2.5, 24.0)) and not state.evaluated


def test_the_training_loss_of_the_table_is_the_smoothed_one(make_run):
    """The last batch alone is far off; with a journal of one run a table and a law tell the same number."""
    run = make_run("run", 400, "train.steps=400")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["train/loss"] = 2.0 + 0.5 * (-1) ** line["step"]
    lines[3]["train/loss"] = None
    lines[-1]["train/loss"] = 4.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = Follower(run).look()
    assert state.loss == pytest.approx(2.0, abs=0.3) and not state.evaluated
    assert state.loss == pytest.approx(end(load_run(run), TRAINING, 400), rel=1e-12)
    job = Job(compose(["run.dir=run", "model=nano", "train.steps=400"]), ())
    assert f"training loss {state.loss:.4f} (smoothed)" in sentence(job, state)


def test_what_ended_is_told_from_what_runs(make_run):
    assert Follower(make_run("finished", 10)).look().state == "finished"
    quiet = make_run("quiet", 4)
    long_ago(*quiet.iterdir())
    assert Follower(quiet).look().state == "stopped"
    assert Follower(quiet).look().seconds_left is None

    failed = make_run("failed", 4)
    reported(failed, started(1) + "ValueError: bad\n" + ended(1))
    state = Follower(failed).look()
    assert state.state == "failed" and state.note == f"ValueError: bad (log: {log_of(failed)})"
    asked = make_run("asked", 4)
    reported(asked, started(1) + ended(0))
    assert Follower(asked).look().state == "stopped"
    gone = make_run("gone", 4)  # its launcher was killed, and its processes are not there
    reported(gone, started(2**22 + 1))
    assert Follower(gone).look().state == "stopped"


def test_a_log_older_than_the_journal_tells_of_an_earlier_start(make_run):
    run = make_run("run", 4)
    reported(run, started(1) + "ValueError: bad\n" + ended(1))
    long_ago(log_of(run))
    assert Follower(run).look().state == "running"


def test_a_run_that_takes_long_between_lines_is_not_taken_to_have_stopped(make_run):
    run = make_run("run", 4)
    lines = [json.loads(line) | {"time": 1000.0 * number} for number, line in enumerate((run / "metrics.jsonl").open())]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    long_ago(*run.iterdir())
    assert Follower(run).look().state == "running"


def test_a_follower_reads_on_and_starts_anew_when_a_run_is_resumed(make_run):
    run = make_run("run", 4)
    follower = Follower(run)
    assert follower.look().step == 4
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    with (run / "metrics.jsonl").open("a") as journal:
        journal.write(lines[-1].replace('"step": 4', '"step": 5') + '{"step": 6, "ti')
    assert follower.look().step == 5
    (run / "resumed").write_text("".join(lines[:2]))
    (run / "resumed").replace(run / "metrics.jsonl")
    assert follower.look().step == 2


def test_what_cannot_be_read_does_not_hide_the_others(make_run, tmp_path, capsys):
    make_run("whole", 4)
    (make_run("journal", 4) / "metrics.jsonl").write_text("no json\n")
    (make_run("config", 4) / "config.yaml").write_text("a: [")
    (make_run("foreign", 4) / "config.yaml").write_text("model: {name: x, width: 3}\ntrain: {steps: 7}")
    (make_run("steps", 4) / "config.yaml").write_text("model: {name: 3}\nobjective: {lmbda: a}\ntrain: {steps: null}")
    (make_run("modelless", 4) / "config.yaml").write_text("model: null")
    for name, line in {"list": "[1]", "number": "3", "stepless": '{"time": 1}', "timeless": '{"step": 1}'}.items():
        (make_run(name, 4) / "metrics.jsonl").write_text(line + "\n")
    make_run("[red]", 4)  # no markup
    main(["status", str(tmp_path)])
    output = capsys.readouterr().out
    assert all(f" {path.name} " in output for path in tmp_path.iterdir())
    assert "not JSON" in " ".join(output.split()) and output.count("has a line without step and time") == 4


def test_a_cooldown_is_a_run_like_any_other(make_run):
    run = make_run("trunk,cooldown_at=3,decay=0.4", 5, "run.cooldown_of=trunk", "run.cooldown_at=3", "train.steps=5")
    assert Follower(run).look().state == "finished"


def test_status_shows_what_waits_and_finds_runs_at_any_depth(make_run, tmp_path, capsys):
    make_run("sweep/model=nano", 10, evaluate=5)
    make_run("sweep/other/deep", 3)
    plan = {"model": "micro", "parameters": 1_094_877, "lmbda": 0.013, "steps": 10, "overrides": ["model=micro"]}
    (tmp_path / "sweep" / FILE_NAME).write_text(json.dumps({"runs": {"model=micro": plan}}))
    assert read_plan(tmp_path / "sweep")["model=micro"].overrides == ("model=micro",)
    main(["status", str(tmp_path)])
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in output.splitlines() if "/10" in line}
    assert rows["model=micro"] == ["model=micro", "micro", "1.09", "M", "0/10", "waiting"]
    assert rows["model=nano"][1:6] == ["nano", "0.21", "M", "10/10", "0.9000"] and rows["model=nano"][-1] == "finished"
    assert " elapsed " in output and " to go " in output  # `time` beside `left` reads as one heading
    assert rows["deep"][-1] == "running" and rows["deep"][5] == "3.333*" and "* smoothed training loss" in output


def test_a_column_that_repeats_names_is_left_out(make_run, tmp_path, capsys):
    make_run("sweep/model=nano,train.seed=0", 10)
    main(["status", str(tmp_path / "sweep")])
    assert "model " not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing", "empty", "damaged"])
def test_a_folder_that_tells_nothing_is_refused(tmp_path, capsys, name):
    if name != "missing":
        (tmp_path / name).mkdir()
    if name == "damaged":
        (tmp_path / name / FILE_NAME).write_text("{")
    with pytest.raises(SystemExit) as refused:
        main(["status", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and name in error


def test_watching_ends_when_all_runs_are_finished(make_run, tmp_path, capsys):
    make_run("run", 10)
    main(["status", "--watch", str(tmp_path)])
    assert "finished" in capsys.readouterr().out


def test_times_are_short():
    times = (None, 0.4, 59, 60, 3599, 3600, 86400, 172800, 1e6)
    assert [duration(time) for time in times] == [
        "",
        "0 s",
        "59 s",
        "1:00 min",
        "59:59 min",
        "1:00 h",
        "24:00 h",
        "2.0 d",
        "11.6 d",
    ]
