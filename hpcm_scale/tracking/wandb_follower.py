"""The process that mirrors a journal to wandb; started by `WandbView`, told what to do on its stdin.

wandb 0.31 starts a new file for every resumed offline run, and `wandb sync` lets the last one replace the
others; online, points logged after the checkpoint cannot be taken back. As the journal is the truth:

- offline, a resumed run is mirrored from its first line into a fresh file of the same run id, and the
  files that this supersedes are removed: one run, one file, one unbroken curve, on disk and when synced;
- online, the server is asked how far it got, and only what comes after is logged.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from json import loads
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any, TextIO

from PIL import Image

from hpcm_scale.files import utf_8_path
from hpcm_scale.streams import SHOWN
from hpcm_scale.tracking.journal import FILE_NAME, new_records

PICTURES = "reconstructions"
"""Folder in the run folder: one folder a step, PNG files with their caption as `Description`."""
AXES = ("compute/pflops", "train/images")
"""What curves are read against; the first unless the reader chooses."""
POLL_SECONDS = 1.0
FINISH_SECONDS = 3600
"""Longest life of this process after training."""


def picture_folder(run_dir: Path, step: int) -> Path:
    """Where the pictures of the evaluation of `step` are kept."""
    return run_dir / PICTURES / f"{step:08d}"


def off(error: BaseException, terminal: TextIO) -> None:
    """Say once, in one line, that there is no view from now on."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    terminal.write(f"hpcm: wandb is off for the rest of this run ({reason}); the journal goes on\n")
    terminal.flush()


class Trainer(Thread):
    """The training process, seen from here: it lives as long as the other end of stdin is open.

    A thread of its own, for wandb can block every other one for ever: then nothing outlives training by
    more than FINISH_SECONDS.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.exit_code = 1
        """What training ended with; 1 when it was killed and could not tell."""
        self.ended = Event()

    def run(self) -> None:
        self.exit_code = int(os.read(0, 16) or 1)
        self.ended.set()
        sleep(FINISH_SECONDS)
        os._exit(1)


def mirror(order: dict[str, Any], run_dir: Path, trainer: Trainer) -> None:
    """Mirror the journal until training has ended and its last whole line is shown."""
    wandb = load_wandb()
    offline = order["mode"] == "offline"
    (run_dir / "wandb").mkdir(exist_ok=True)  # where it cannot, wandb would quietly use the temporary folder
    superseded = list((run_dir / "wandb").glob(f"offline-run-*-{order['id']}*"))
    run = wandb.init(
        dir=str(run_dir),
        id=order["id"],
        name=order["name"],
        mode=order["mode"],
        project=order["project"],
        group=order["group"],
        config=order["config"],
        resume=None if offline else "allow",  # a file marked as resumed would be appended when synced
        settings=settings(wandb, order["trainer"]),
    )
    for axis in AXES:
        run.define_metric(axis)
    defined = set(AXES)
    shown = dict(run.summary) if run.resumed else {}

    with (run_dir / FILE_NAME).open("rb") as journal:
        ended = False
        while not ended:
            ended = trainer.ended.wait(POLL_SECONDS)
            for record in unseen(new_records(journal), shown):
                row = {key: value for key, value in record.items() if value is not None}
                if "eval/loss" in record:
                    row |= _pictures(wandb, run_dir, record["step"])
                for metric in sorted(row.keys() - defined):
                    if metric.startswith(("train/", "eval/", "eval_", "perf/")):
                        run.define_metric(metric, step_metric=AXES[0])
                        defined.add(metric)
                run.log(row)  # never with wandb's own step: it drops what goes back
            while superseded:
                shutil.rmtree(superseded.pop(), ignore_errors=True)
    run.finish(exit_code=trainer.exit_code)


def unseen(records: Iterator[dict[str, Any]], shown: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Records beyond `shown`, the last values that the server holds: those of later steps, and of its last
    step an evaluation that an interruption kept from it."""
    for record in records:
        step, evaluation = shown.get("step", -1), shown.get("eval/loss")
        if record["step"] > step or (record["step"] == step and record.get("eval/loss", evaluation) != evaluation):
            yield record


def load_wandb() -> Any:
    """The package, which without this looks up its maker's telemetry server even when offline (wandb 0.31)."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def settings(wandb: Any, trainer: int) -> Any:
    """Of a wandb run: silent; no code, no package list, no machine description: the journal's own facts are enough.

    `trainer` is the id of the process whose use of the machine is watched.
    """
    return wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_stats_pid=trainer,
    )


def _pictures(wandb: Any, run_dir: Path, step: int) -> dict[str, Any]:
    paths = sorted(picture_folder(run_dir, step).glob("*.png"))
    if not paths:
        return {}
    shown = []
    for path in paths:
        with Image.open(path) as picture:
            shown.append(wandb.Image(str(path), caption=picture.text["Description"]))
    return {"eval/reconstructions": shown}


def main() -> None:
    """Read the order from stdin, leave the training process's family, and mirror."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        order = loads(stdin.readline())
    # A launcher that stops a run signals every descendant of it; wandb's service would die of that before
    # the last lines are shown. So the follower is nobody's child; stdin tells it that training has ended,
    # and its hold on stdout tells the training process that it lives.
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    terminal, life = os.fdopen(os.dup(2), "w", errors=SHOWN), os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    trainer = Trainer()
    trainer.start()
    try:
        with utf_8_path(Path(order["run_dir"])) as run_dir:
            mirror(order, run_dir, trainer)
    except Exception as error:
        with suppress(OSError):
            off(error, terminal)
    os.close(life)
    sys.exit()


if __name__ == "__main__":
    main()
