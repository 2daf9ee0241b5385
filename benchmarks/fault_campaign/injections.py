"""Faults that a run survives, and faults that end it, after which the same command is run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from fault_campaign.runs import Run, kill, wait_for
from hpcm_scale.errors import STOPPED

CHECKPOINTS_SECONDS = 300.0
"""Longest time until a run has two checkpoints."""


@dataclass
class Scene:
    """The targets of faults."""

    run: Run
    shards: Path
    """The shards of the run."""
    random: random.Random
    hold_seconds: float = 20.0
    """Duration of temporary faults."""
    disk: Path | None = None
    """A small file system for the run folder; None if it could not be mounted."""

    def hold(self) -> None:
        """Wait for the duration of the fault."""
        time.sleep(self.hold_seconds)

    def shard(self) -> Path:
        """A random shard."""
        return self.random.choice(sorted(self.shards.glob("*.tar")))


@dataclass(frozen=True)
class Fault:
    """A fault; `inject` causes it and, if it is temporary, undoes it."""

    name: str
    inject: Callable[[Scene], None]
    ends: bool = False
    """Whether it ends the run."""
    code: int | None = None
    """Expected exit code of the run; None: any."""
    needs_disk: bool = False
    """Whether it needs a file system of the run's own."""
    damages: bool = False
    """Whether it damages the newest checkpoint, which the resumed run must report."""


def shard_missing(scene: Scene) -> None:
    shard = scene.shard()
    away = shard.with_suffix(".away")
    shard.rename(away)
    scene.hold()
    away.rename(shard)


def shard_truncated(scene: Scene) -> None:
    with _restored(scene.shard()) as shard:
        os.truncate(shard, shard.stat().st_size // 2)
        scene.hold()


def shard_replaced(scene: Scene) -> None:
    """Replaced by one with a bit flipped in each of its blocks."""
    with _restored(scene.shard()) as shard:
        data = bytearray(shard.read_bytes())
        for place in range(600, len(data), 512):
            data[place] ^= 1 << scene.random.randrange(8)
        other = shard.with_suffix(".other")
        other.write_bytes(data)
        other.replace(shard)
        scene.hold()


def checkpoint_flipped(scene: Scene) -> None:
    """Flipped once an older checkpoint exists."""
    _two_checkpoints(scene.run)
    flip_byte(newest_file(scene.run), scene.random)


def disk_full(scene: Scene) -> None:
    with full(scene.disk):
        scene.hold()


def worker_killed(scene: Scene) -> None:
    workers = [child for rank in scene.run.ranks() for child in rank.children() if child.cmdline() == rank.cmdline()]
    kill([scene.random.choice(workers)])


def rank_killed(scene: Scene) -> None:
    kill([scene.random.choice(scene.run.ranks())])


def launcher_killed(scene: Scene) -> None:
    kill([scene.random.choice(scene.run.launchers())])


def all_killed(scene: Scene) -> None:
    kill(scene.run.members())


def damaged_and_killed(scene: Scene) -> None:
    _two_checkpoints(scene.run)
    all_killed(scene)
    flip_byte(newest_file(scene.run), scene.random)


def terminated(scene: Scene) -> None:
    _signal(scene, signal.SIGTERM)


def slurm_signalled(scene: Scene) -> None:
    _signal(scene, signal.SIGUSR1)


def stop_file(scene: Scene) -> None:
    (scene.run.folder / "stop").touch()


SURVIVED = (
    Fault("a shard is missing temporarily", shard_missing),
    Fault("a shard is truncated temporarily", shard_truncated),
    Fault("a shard is replaced by a damaged one temporarily", shard_replaced),
    Fault("a byte flips in the newest checkpoint", checkpoint_flipped),
    Fault("the disk of the run folder is full temporarily", disk_full, needs_disk=True),
)
ENDING = (
    Fault("kill -9 of one rank", rank_killed, ends=True),
    Fault("SIGTERM", terminated, ends=True, code=STOPPED),
    Fault("kill -9 of all, and a byte flips in the newest checkpoint", damaged_and_killed, ends=True, damages=True),
    Fault("kill -9 of DeepSpeed's launcher", launcher_killed, ends=True),
    Fault("SIGUSR1", slurm_signalled, ends=True, code=STOPPED),
    Fault("a stop file", stop_file, ends=True, code=STOPPED),
    Fault("kill -9 of a data worker", worker_killed, ends=True),
    Fault("kill -9 of all", all_killed, ends=True),
)


def _two_checkpoints(run: Run) -> None:
    wait_for(lambda: len(run.complete()) >= 2, CHECKPOINTS_SECONDS, "a second checkpoint")


def _signal(scene: Scene, number: signal.Signals) -> None:
    """Signal the training processes, as Slurm and the sweep launchers do."""
    for rank in scene.run.ranks():
        with suppress(ProcessLookupError):
            os.kill(rank.pid, number)


@contextmanager
def _restored(shard: Path) -> Iterator[Path]:
    """Afterwards, replace the shard by a copy of its original content."""
    kept = shard.with_suffix(".kept")
    shutil.copyfile(shard, kept)
    try:
        yield shard
    finally:
        kept.replace(shard)


def newest_file(run: Run) -> Path:
    """The largest file of the newest complete checkpoint."""
    folder = run.checkpoints / f"step_{run.newest():08d}"
    return max((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)


def flip_byte(path: Path, chance: random.Random) -> None:
    """Flip one random bit of a file."""
    with path.open("r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Inside, the file system of the folder is full."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:  # until it raises
                file.write(bytes(4096))
        yield
    finally:
        filler.unlink()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path | None]:
    """An in-memory file system of that size, mounted at `folder`; None if mounting is not allowed."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def undecodable(shards: Path, sample: int) -> None:
    """Replace one image of a set by noise, consistent with the index."""
    index = json.loads((shards / "index.json").read_text(encoding="utf-8"))
    samples = index["samples"]
    place, length = samples["offset"][sample], samples["length"][sample]
    noise = random.Random(sample).randbytes(length)
    with (shards / index["shards"][samples["shard"][sample]]["name"]).open("r+b") as shard:
        shard.seek(place)
        shard.write(noise)
    samples["crc32"][sample] = crc32(noise)
    (shards / "index.json").write_text(json.dumps(index), encoding="utf-8")
