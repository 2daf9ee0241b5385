"""wandb as a view of the journal, in a separate process.

The training process never calls wandb: it starts a follower (this module's `main`) that reads the journal and logs it
to wandb. A wandb that fails, hangs or uploads slowly does not affect training; in the training process, a stopped wandb
service blocks `run.log` and the exit of the program forever.

wandb 0.31 starts a new file for every resumed offline run, and `wandb sync` lets the last file replace the others;
online, points logged after the checkpoint cannot be removed. Therefore:

- offline, a resumed run is logged from its first line to a new file with the same run id, and the files that it
  replaces are removed: one run, one file, one continuous curve;
- online, the server is asked for the last logged step, and only later lines are logged.
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
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import TYPE_CHECKING, Any, TextIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hpcm_scale.config.schema import LogConfig, RunConfig, WandbMode
from hpcm_scale.errors import ESCAPE, is_first_process, printable
from hpcm_scale.files import utf_8_path, write_text
from hpcm_scale.tracking.journal import FILE_NAME, new_records

if TYPE_CHECKING:
    from torch import Tensor

RECONSTRUCTIONS = "reconstructions"
"""Folder in the run folder: a folder per step with PNG files, their caption as `Description`."""
AXES = ("compute/pflops", "train/images")
"""x axes of the curves; the first is the default."""
POLL_SECONDS = 1.0
FINISH_SECONDS = 3600
"""Longest time that the follower outlives training."""
RUN_ID_FILE = "wandb_id"
LONGEST_STEM = 50
"""Characters of an image's name, at most 4 bytes each, in the name of its reconstruction."""


def reconstruction_folder(run_dir: Path, step: int) -> Path:
    """The folder of the reconstructions of the evaluation at `step`."""
    return run_dir / RECONSTRUCTIONS / f"{step:08d}"


def disable(error: BaseException, terminal: TextIO) -> None:
    """Report in one line that the view is disabled from now on."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    terminal.write(f"hpcm: wandb is disabled for the rest of this run ({reason}); the journal continues\n")
    terminal.flush()


class Trainer(Thread):
    """Waits for the end of the training process, which closes the other end of stdin.

    A separate thread, because wandb may block the others forever: the follower then exits after FINISH_SECONDS.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.exit_code = 1
        """Exit code of training; 1 if it was killed."""
        self.ended = Event()

    def run(self) -> None:
        self.exit_code = int(os.read(0, 16) or 1)
        self.ended.set()
        sleep(FINISH_SECONDS)
        os._exit(1)


def mirror(order: dict[str, Any], run_dir: Path, trainer: Trainer) -> None:
    """Log the journal to wandb until training has ended and its last complete line is logged."""
    wandb = load_wandb()
    offline = order["mode"] == "offline"
    (run_dir / "wandb").mkdir(exist_ok=True)  # otherwise wandb silently uses the temporary folder
    superseded = list((run_dir / "wandb").glob(f"offline-run-*-{order['id']}*"))
    run = wandb.init(
        dir=str(run_dir),
        id=order["id"],
        name=order["name"],
        mode=order["mode"],
        project=order["project"],
        group=order["group"],
        config=order["config"],
        resume=None if offline else "allow",  # `wandb sync` appends a file marked as resumed
        settings=settings(wandb, order["trainer"]),
    )
    for axis in AXES:
        run.define_metric(axis)
    defined: set[str] = set(AXES)
    logged = dict(run.summary) if run.resumed else {}

    with (run_dir / FILE_NAME).open("rb") as journal:
        ended = False
        while not ended:
            ended = trainer.ended.wait(POLL_SECONDS)
            for record in unseen(new_records(journal), logged):
                row = {key: value for key, value in record.items() if value is not None}
                if "eval/loss" in record:
                    row |= _reconstructions(wandb, run_dir, record["step"])
                for metric in sorted(row.keys() - defined):
                    if metric.startswith(("train/", "eval/", "eval_", "data/", "perf/")):
                        run.define_metric(metric, step_metric=AXES[0])
                        defined.add(metric)
                run.log(row)  # without wandb's own step, which drops rows that go back
            while superseded:
                shutil.rmtree(superseded.pop(), ignore_errors=True)
    run.finish(exit_code=trainer.exit_code)


def unseen(records: Iterator[dict[str, Any]], logged: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Records after `logged`, the last values on the server: later steps, and a missing evaluation of its last step."""
    for record in records:
        step, evaluation = logged.get("step", -1), logged.get("eval/loss")
        if record["step"] > step or (record["step"] == step and record.get("eval/loss", evaluation) != evaluation):
            yield record


def load_wandb() -> Any:
    """Import wandb without its error reporting, which contacts a server even offline (wandb 0.31)."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def settings(wandb: Any, trainer: int) -> Any:
    """Settings of a wandb run: silent; no code, package list or machine description.

    `trainer`: id of the process whose resource use wandb records.
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


def _reconstructions(wandb: Any, run_dir: Path, step: int) -> dict[str, Any]:
    paths = sorted(reconstruction_folder(run_dir, step).glob("*.png"))
    if not paths:
        return {}
    logged = []
    for path in paths:
        with Image.open(path) as image:
            logged.append(wandb.Image(str(path), caption=image.text["Description"]))
    return {"eval/reconstructions": logged}


def main() -> None:
    """Entry point of the follower: read the order from stdin, detach from the training process, and mirror."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        order = json.loads(stdin.readline())
    # A launcher that stops a run signals all its descendants, which would kill wandb's service before the last lines
    # are logged. So the follower detaches; the end of stdin signals that training has ended, and the open stdout tells
    # the training process that the follower is alive.
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    terminal, alive = os.fdopen(os.dup(2), "w", errors=ESCAPE), os.dup(1)
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
            disable(error, terminal)
    os.close(alive)
    sys.exit()


class WandbView:
    """The follower of `run_dir`; open and `resume` the journal first.

    It does nothing on other ranks and when wandb is disabled or broken. `config` is the resolved configuration and
    `metadata` other values that describe the run (parameter count, git commit, …), both plain JSON values; both go to
    the wandb run's configuration. The run id is created once and kept in the run folder. Never raises: a failure is one
    line on stderr.
    """

    def __init__(
        self, run_dir: str | Path, log: LogConfig, run: RunConfig, *, config: dict[str, Any], metadata: dict[str, Any]
    ) -> None:
        self._run_dir = Path(run_dir)
        self._follower: subprocess.Popen[bytes] | None = None
        if log.wandb is WandbMode.disabled or not is_first_process():
            return
        try:
            order = {
                "id": run_id(Path(run_dir)),
                "name": Path(run_dir).resolve().name,
                "mode": log.wandb.value,
                "project": log.project,
                "group": run.sweep,
                "config": config | metadata,
                "trainer": os.getpid(),
            }
            self._follower = _start_follower(_utf_8(order) | {"run_dir": str(Path(run_dir).resolve())})
        except Exception as error:
            disable(error, sys.stderr)

    def images(self, step: int, images: Iterable[tuple[str, Tensor, str]]) -> None:
        """Log (name, image, caption) triples with the evaluation of `step`.

        Call it before that evaluation's line is appended to the journal. The images, uint8 (3, H, W), are stored as PNG
        files in the run folder, so that a resumed run logs them again.
        """
        if self._follower is None or self._has_ended(within=0):
            return
        try:
            folder = reconstruction_folder(self._run_dir, step)
            unfinished = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for index, (name, image, caption) in enumerate(images):
                description = PngInfo()
                description.add_itxt("Description", caption)
                pixels = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
                pixels.save(unfinished / f"{index}_{Path(name).stem[:LONGEST_STEM]}.png", pnginfo=description)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except Exception as error:
            disable(error, sys.stderr)
            self._leave()

    def close(self, exit_code: int = 0, timeout: float = 60.0) -> None:
        """Let the follower log the last lines and end; wait at most `timeout` seconds for it.

        A longer upload continues in the background. If the training process dies without closing, wandb shows the run
        as failed, complete up to the last journal line.
        """
        if self._follower is None:
            return
        assert self._follower.stdin is not None
        with suppress(OSError):  # a follower that has ended has reported why
            self._follower.stdin.write(str(exit_code).encode())
        if not self._has_ended(within=timeout):
            sys.stderr.write(f"hpcm: wandb needs more than {timeout:.0f} s; it continues in the background\n")
        self._leave()

    def _has_ended(self, within: float) -> bool:
        """Whether the follower closes its end of the pipe within that many seconds."""
        assert self._follower is not None and self._follower.stdout is not None
        self._follower.poll()  # reaps the process that forked the follower
        return bool(select.select([self._follower.stdout], [], [], within)[0])

    def _leave(self) -> None:
        assert self._follower is not None and self._follower.stdin is not None and self._follower.stdout is not None
        self._follower.stdin.close()
        self._follower.stdout.close()
        self._follower = None


def run_id(run_dir: Path) -> str:
    """The wandb run id of a run folder, created once and kept there."""
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
    assert follower.stdin is not None
    follower.stdin.write(json.dumps(order).encode() + b"\n")
    return follower


def _utf_8(value: Any) -> Any:
    """Plain JSON values with every text as valid UTF-8, which wandb requires."""
    if isinstance(value, dict):
        return {printable(key): _utf_8(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_utf_8(each) for each in value]
    return printable(value) if isinstance(value, str) else value


if __name__ == "__main__":
    main()
