"""Every test runs a training process, its follower and wandb for real; what wandb kept is read back with
wandb's own reader (`wandb leet inspect`)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hpcm_scale.tracking.journal import read_journal
from hpcm_scale.tracking.wandb_view import unseen

pytestmark = pytest.mark.launch

TRAIN = """
import os, sys, time
from pathlib import Path
import numpy as np
import torch
from hpcm_scale.config.schema import LogConfig, RunConfig, WandbMode
from hpcm_scale.tracking.journal import Journal
from hpcm_scale.tracking.wandb_view import WandbView

run_dir, start, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
end, mode = sys.argv[4], sys.argv[5]
journal = Journal(run_dir / "metrics.jsonl")
journal.resume(start)
log, run = LogConfig(wandb=WandbMode(mode), project="codecs"), RunConfig(sweep="ladder")
facts = {"parameters": 251_904, "git_commit": "0123abcd"}
opened = time.monotonic()
view = WandbView(run_dir, log, run, config={"model": {"name": "nano"}}, metadata=facts)
print("opened in", time.monotonic() - opened)
generator = np.random.default_rng(start)
for step in range(start + 1, stop + 1):
    axes = {"step": step, "time": step / 2, "train/images": 8 * step, "compute/pflops": 0.003 * step}
    psnr = float("nan") if step == 7 else 30.0
    journal.append(axes | {"train/loss": 10 / step, "train/psnr": psnr, "perf/step_seconds": 0.5})
    if step % 10 == 0:
        height, width = 24, 40
        pixels = torch.from_numpy(generator.integers(256, size=(2, 3, height, width), dtype=np.uint8))
        captions = {"kodak/kodim01.png": f"kodim01 after {step}: 0.5 bpp", "kodim02": "kodim02"}
        pictures = [(name, image, caption) for image, (name, caption) in zip(pixels, captions.items())]
        view.images(step, pictures)
        journal.append(axes | {"eval/loss": 11 / step, "eval_ema_0.05/loss": 10 / step})
    time.sleep(0.002)
print("trained", flush=True)
if end == "killed":
    os.kill(os.getpid(), 9)
if end == "waits":
    sys.stdin.readline()
view.close(timeout=float(os.environ.get("HPCM_TEST_TIMEOUT", 60)))
print("closed", flush=True)
"""


def command(run_dir: Path, start: int, stop: int, end: str = "closes", mode: str = "offline") -> list[str]:
    return [sys.executable, "-c", TRAIN, str(run_dir), str(start), str(stop), end, mode]


def train(*arguments, expect: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=400, env=environment | variables)
    assert done.returncode == expect, done.stderr
    return done


def records(run_dir: Path) -> list[dict]:
    """Everything in the one file that wandb keeps of the run."""
    [file] = (run_dir / "wandb").glob("*run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(inspect, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(run_dir: Path) -> list[dict]:
    return [record["history"]["item"] for record in records(run_dir) if record["type"] == "history"]


def wait_until(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ended(run_dir: Path) -> bool:
    """Whether the file of a run that nobody waited for has its last record."""
    files = list((run_dir / "wandb").glob("*run-*/*.wandb"))
    return len(files) == 1 and any(record["type"] == "exit" for record in records(run_dir))


def test_a_resumed_offline_run_is_one_run_with_one_unbroken_curve(tmp_path: Path) -> None:
    run_dir = tmp_path / "nano"
    first = train(run_dir, 0, 40)
    assert first.stderr == ""
    run_id = (run_dir / "wandb_id").read_text().strip()

    train(run_dir, 20, 60, "killed", expect=-signal.SIGKILL)  # 21 to 40 are trained again
    wait_until(lambda: ended(run_dir))
    assert (run_dir / "wandb_id").read_text().strip() == run_id

    everything = records(run_dir)
    [run] = [record["run"] for record in everything if record["type"] == "run"]
    assert (run["run_id"], run["run_group"], run["project"]) == (run_id, "ladder", "codecs")
    assert run["display_name"] == "nano"
    assert run["config"]["update"]["model"] == {"name": "nano"}
    assert run["config"]["update"]["parameters"] == 251_904
    assert run["config"]["update"]["git_commit"] == "0123abcd"
    assert not run.get("resume")  # or `wandb sync` would append this whole curve to what it sent before

    metrics = [record["metric"] for record in everything if record["type"] == "metric"]
    axis_of = {metric["name"]: metric.get("step_metric") for metric in metrics}
    assert axis_of.pop("compute/pflops") is None
    assert axis_of.pop("train/images") is None
    assert {"train/loss", "train/psnr", "eval/loss", "eval_ema_0.05/loss", "perf/step_seconds"} <= axis_of.keys()
    assert set(axis_of.values()) == {"compute/pflops"}

    history = [record["history"]["item"] for record in everything if record["type"] == "history"]
    journal = read_journal(run_dir / "metrics.jsonl")
    for curve, steps in (("train/loss", range(1, 61)), ("eval/loss", range(10, 61, 10))):
        points = [(row["compute/pflops"], row[curve]) for row in history if curve in row]
        assert points == [(line["compute/pflops"], line[curve]) for line in journal if curve in line]
        assert [x for x, _ in points] == [0.003 * step for step in steps]
    assert "train/psnr" not in history[6]

    shown = [row for row in history if "eval/reconstructions.count" in row]
    assert [row["eval/loss"] for row in shown] == [11 / step for step in range(10, 61, 10)]
    assert shown[0]["eval/reconstructions.captions"] == ["kodim01 after 10: 0.5 bpp", "kodim02"]
    files = run_dir / "wandb" / "latest-run" / "files"
    assert all((files / name).is_file() for row in shown for name in row["eval/reconstructions.filenames"])


def test_offline_tells_the_network_nothing_and_keeps_no_code(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        names = ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")
        done = train(tmp_path, 0, 10, HPCM_TEST_SECRET="hunter2", **dict.fromkeys(names, address))
        with pytest.raises(TimeoutError):
            server.accept()
    assert done.stderr == ""
    kept = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {".wandb", ".log", ".png"}
    assert not any(secret in path.read_bytes() for path in kept for secret in (b"hunter2", b"time.sleep"))
    assert len(rows(tmp_path)) == 11


@pytest.mark.parametrize("case", ["folder", "account", "disabled"])
def test_without_wandb_training_goes_on(tmp_path: Path, case: str) -> None:
    if case == "folder":
        (tmp_path / "wandb").write_text("a file where wandb wants a folder")
    done = train(tmp_path, 0, 20, "closes", {"folder": "offline", "account": "online", "disabled": "disabled"}[case])
    assert "closed" in done.stdout
    assert len(read_journal(tmp_path / "metrics.jsonl")) == 22
    if case == "disabled":
        assert done.stderr == ""
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    else:
        assert done.stderr.count("\n") == 1
        assert "wandb is disabled" in done.stderr


def test_a_server_that_never_answers_costs_no_training_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = threading.Thread(target=server.accept, daemon=True)
        listener.start()
        done = train(
            *(tmp_path, 0, 20, "closes", "online"),
            WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}",
            WANDB_API_KEY="0" * 40,
            WANDB_INIT_TIMEOUT="15",
            HPCM_TEST_TIMEOUT="0.5",
        )
    assert float(done.stdout.split()[2]) < 15 / 2
    assert "closed" in done.stdout
    assert "continues in the background" in done.stderr
    assert len(read_journal(tmp_path / "metrics.jsonl")) == 22


def test_a_launcher_that_stops_every_descendant_leaves_the_view_whole(tmp_path: Path) -> None:
    def no_descendant_left() -> bool:
        children = psutil.Process(trainer.pid).children(recursive=True)
        return all(child.status() == psutil.STATUS_ZOMBIE for child in children)

    trainer = subprocess.Popen(command(tmp_path, 0, 30, "waits"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_until(lambda: (tmp_path / "wandb" / "latest-run").exists())
    wait_until(no_descendant_left)
    trainer.terminate()
    trainer.communicate()
    wait_until(lambda: ended(tmp_path))
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == list(range(1, 31))


def test_online_only_what_the_server_has_not_seen_is_shown() -> None:
    journal = [{"step": 1}, {"step": 2}, {"step": 2, "eval/loss": 1.5}, {"step": 3}]
    assert list(unseen(iter(journal), {})) == journal
    assert list(unseen(iter(journal), {"step": 2, "eval/loss": 1.7})) == journal[2:]
    assert list(unseen(iter(journal), {"step": 2, "eval/loss": 1.5})) == journal[3:]
    assert list(unseen(iter(journal), {"step": 9, "eval/loss": 1.5})) == []
