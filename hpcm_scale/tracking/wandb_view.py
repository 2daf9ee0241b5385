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
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hpcm_scale.config.schema import LogConfig, RunConfig, WandbMode
from hpcm_scale.errors import is_first_process
from hpcm_scale.files import write_text
from hpcm_scale.streams import shown
from hpcm_scale.tracking.wandb_follower import off, picture_folder

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
        [sys.executable, "-m", "hpcm_scale.tracking.wandb_follower"],
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
