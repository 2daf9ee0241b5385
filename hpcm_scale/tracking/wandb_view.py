"""wandb as a view of the journal, kept by a process of its own.

The training process never calls wandb: it starts a follower (`wandb_follower`) that reads the journal
and mirrors it. So a wandb that fails, hangs or uploads slowly costs the view and nothing else (inside
the training process, a stopped wandb service blocks `run.log` and the end of the program for ever).
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from json import loads
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any, TextIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hpcm_scale.config.schema import LogConfig, RunConfig, WandbMode
from hpcm_scale.errors import SHOWN, is_first_process, shown
from hpcm_scale.files import utf_8_path, write_text
from hpcm_scale.tracking.journal import FILE_NAME, new_records

# The process that mirrors a journal to wandb; started by `WandbView`, told what to do on its stdin.
#
# wandb 0.31 starts a new file for every resumed offline run, and `wandb sync` lets the last one replace the
# others; online, points logged after the checkpoint cannot be taken back. As the journal is the truth:
#
# - offline, a resumed run is mirrored from its first line into a fresh file of the same run id, and the
#   files that this supersedes are removed: one run, one file, one unbroken curve, on disk and when synced;
# - online, the server is asked how far it got, and only what comes after is logged.


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


RUN_ID_FILE = "wandb_id"
LONGEST_STEM = 50
"""Characters of an image's name, 4 bytes each at most, in the name of its picture."""


class WandbView:
    """The follower of one run; on other processes, and when wandb is disabled or broken, it does nothing."""

    def __init__(self, run_dir: str | Path, follower: subprocess.Popen[bytes] | None = None) -> None:
        self._run_dir = Path(run_dir)
        self._follower = follower

    @classmethod
    def open(
        cls,
        run_dir: str | Path,
        log: LogConfig,
        run: RunConfig,
        *,
        config: dict[str, Any],
        facts: dict[str, Any],
    ) -> WandbView:
        """Start mirroring the journal of `run_dir`; open the journal and `resume` it first.

        `config` is the resolved configuration and `facts` what else describes the run (parameter count,
        git commit, …), both plain JSON values; they become the wandb run's configuration. The run id is
        made once and kept in the run folder. Never raises: a failure is told in one line on stderr.
        """
        if log.wandb is WandbMode.disabled or not is_first_process():
            return cls(run_dir)
        try:
            order = {
                "id": run_id(Path(run_dir)),
                "name": Path(run_dir).resolve().name,
                "mode": log.wandb.value,
                "project": log.project,
                "group": run.sweep,
                "config": config | facts,
                "trainer": os.getpid(),
            }
            return cls(run_dir, _start_follower(_utf_8(order) | {"run_dir": str(Path(run_dir).resolve())}))
        except Exception as error:
            off(error, sys.stderr)
            return cls(run_dir)

    def images(self, step: int, pictures: Iterable[tuple[str, Any, str]]) -> None:
        """Show (name, picture, caption) triples with the evaluation of `step`.

        Call it before that evaluation's line is appended to the journal. A picture is a Pillow image, a
        (3, H, W) tensor or an (H, W, 3) array; uint8, or floating point from 0 to 1. They are kept as PNG
        files in the run folder, so that a resumed run shows them again.
        """
        if self._follower is None or self._has_ended(within=0):
            return
        try:
            folder = picture_folder(self._run_dir, step)
            unfinished = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for index, (name, picture, caption) in enumerate(pictures):
                description = PngInfo()
                description.add_itxt("Description", caption)
                _image(picture).save(unfinished / f"{index}_{Path(name).stem[:LONGEST_STEM]}.png", pnginfo=description)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except Exception as error:
            off(error, sys.stderr)
            self._leave()

    def close(self, exit_code: int = 0, timeout: float = 60.0) -> None:
        """Let the follower mirror the last lines and end, and wait for it at most `timeout` seconds.

        An upload that takes longer goes on in the background. A training process that dies without
        closing leaves a run that wandb shows as failed, whole up to the last journal line.
        """
        if self._follower is None:
            return
        with suppress(OSError):  # a follower that has ended has said why
            self._follower.stdin.write(str(exit_code).encode())
        if not self._has_ended(within=timeout):
            sys.stderr.write(f"hpcm: wandb needs more than {timeout:.0f} s; it goes on in the background\n")
        self._leave()

    def _has_ended(self, within: float) -> bool:
        """Whether the follower's end of the pipe is closed, at the latest `within` seconds from now."""
        self._follower.poll()  # takes leave of the process that only started the follower
        return bool(select.select([self._follower.stdout], [], [], within)[0])

    def _leave(self) -> None:
        self._follower.stdin.close()
        self._follower.stdout.close()
        self._follower = None


def run_id(run_dir: Path) -> str:
    """The wandb run id of a folder; made once and kept there."""
    path = run_dir / RUN_ID_FILE
    if not path.exists():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _start_follower(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    package_root = Path(__file__).resolve().parents[2]
    paths = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])]
    follower = subprocess.Popen(
        [sys.executable, "-m", "hpcm_scale.tracking.wandb_view"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
        bufsize=0,
    )
    follower.stdin.write(json.dumps(order).encode() + b"\n")
    return follower


def _utf_8(value: Any) -> Any:
    """Plain JSON values with every text as it is shown: wandb takes no other than UTF-8."""
    if isinstance(value, dict):
        return {shown(key): _utf_8(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_utf_8(each) for each in value]
    return shown(value) if isinstance(value, str) else value


def _image(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if hasattr(picture, "detach"):  # a tensor; numpy has no bfloat16
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy().transpose(1, 2, 0)
    if picture.dtype != np.uint8:
        picture = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(picture)
