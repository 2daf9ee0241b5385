"""The fault campaign: runs of `nano` under every fault that they should survive.

    python benchmarks/faults.py kills [--kills 50]     # kill -9 at random moments, then the same command again
    python benchmarks/faults.py elastic                # other numbers of processes, other engines
    python benchmarks/faults.py soak [--minutes 45]    # a fault every two minutes; memory, files, processes

Trains on the images of scikit-image's wheel unless --photos and --images name others. Results are written to
benchmarks/results/faults.json and .md; each call replaces its own part. Exit code 1: data was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from fault_campaign.elastic import ElasticCampaign, transitions
from fault_campaign.injections import Scene, small_disk, undecodable
from fault_campaign.kills import KillCampaign, Shape
from fault_campaign.report import circumstances, elastic_result, kill_result, soak_result, write
from fault_campaign.runs import Run
from fault_campaign.soak import Soak
from fork_server import TRAINING, ForkServer

from hpcm_scale.tracking.progress import progress

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results" / "faults"
sys.path.append(str(PROJECT / "launch"))
from quickstart_photos import lay_out  # noqa: E402


def data(options: argparse.Namespace, folder: Path, copies: int = 1) -> list[str]:
    """Overrides for a small model, shards of the training images, and evaluation images.

    `copies`: repetitions of the project's few images, for a set that is large enough to lose some.
    """
    lay_out(folder / "photos")
    photos, images = folder / "photos" / "train", options.images or folder / "photos" / "held_out"
    named = [options.photos or photos]
    if not options.photos:
        named += [shutil.copytree(photos, folder / "photos" / f"copy_{number}") for number in range(1, copies)]
    shards = folder / "shards"
    command = [
        sys.executable,
        "-m",
        "hpcm_scale.commands.shards",
        "build",
        *named,
        "--out",
        shards,
        "--shard-size",
        "1",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ["model=nano", "schedule.learning_rate=1e-3", f"data.shards={shards}", f"eval.images={images}"]


def kills(options: argparse.Namespace, folder: Path) -> tuple[dict, bool]:
    """Results of part `kills`, and whether no data was lost."""
    keys = [*data(options, folder), "train.batch_size=2", "data.workers=1", f"log.wandb={options.wandb}"]
    with ExitStack() as stack:
        forks = stack.enter_context(fork_server()) if options.fork else None
        bar = stack.enter_context(progress(total=options.kills, description="kills", unit="kill"))
        campaign = KillCampaign(
            folder / "runs",
            keys,
            options.engines.split(","),
            Shape(),
            random.Random(options.seed),
            forks,
            advance=lambda: bar.update(1),
        )
        campaign.inject(options.kills, options.runs)
    return kill_result(campaign)


def elastic(options: argparse.Namespace, folder: Path) -> tuple[dict, bool]:
    """Results of part `elastic`, and whether every loss equals the uninterrupted run's."""
    keys = [*data(options, folder), "train.batch_size=12", "data.workers=1", f"log.wandb={options.wandb}"]
    engines, starts = options.engines.split(","), options.starts.split(",")
    matrix = transitions(engines, starts, [int(number) for number in options.processes.split(",")])
    with ExitStack() as stack:
        forks = stack.enter_context(fork_server()) if options.fork else None
        bar = stack.enter_context(progress(total=len(matrix), description="elastic", unit="run"))
        campaign = ElasticCampaign(folder / "runs", keys, forks=forks, advance=lambda: bar.update(1))
        campaign.run(matrix)
    return elastic_result(campaign)


def soak(options: argparse.Namespace, folder: Path) -> tuple[dict, bool]:
    """Results of part `soak`, and whether the run survived without growing."""
    chance = random.Random(options.seed)
    keys = [*data(options, folder, copies=6), "train.batch_size=2", "data.workers=1", f"log.wandb={options.wandb}"]
    keys += ["train.steps=1000000", "train.checkpoint_every=10", "eval.every=50", "eval.limit=1", "engine=zero2"]
    undecodable(folder / "shards", sample=0)
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disk", options.disk))
        if disk is None:
            print("no file system of its own for the run (mount is for root): the full-disk fault is omitted")
        run = Run((disk or folder) / "run", keys, log=folder / "run.log")
        scene = Scene(run, folder / "shards", chance, options.interval / 6, disk)
        campaign = Soak(scene, 60 * options.minutes, options.interval)
        bar = stack.enter_context(progress(total=len(campaign.plan()), description="soak", unit="fault"))
        campaign.advance = lambda: bar.update(1)
        campaign.go()
    return soak_result(campaign)


def fork_server() -> ForkServer:
    """Starts training processes by forking, without their imports."""
    return ForkServer(TRAINING, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | os.environ)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=RESULTS, metavar="PATH", help="without suffix")
    common.add_argument("--work", type=Path, metavar="FOLDER", help="keep the runs in this folder")
    common.add_argument("--photos", type=Path, metavar="FOLDER", help="training images")
    common.add_argument("--images", type=Path, metavar="FOLDER", help="evaluation images")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--fork", action="store_true", help="fork processes instead of launching, where possible")
    common.add_argument("--wandb", default="disabled", choices=["disabled", "offline"])
    parts = parser.add_subparsers(dest="part", required=True, metavar="kills|elastic|soak")
    part = parts.add_parser("kills", parents=[common])
    part.set_defaults(run=kills)
    part.add_argument("--kills", type=int, default=50)
    part.add_argument("--runs", type=int, default=8)
    part.add_argument("--engines", default="zero2,zero1,zero2,zero3,zero2,accelerate", help="in rotation")
    part = parts.add_parser("elastic", parents=[common])
    part.set_defaults(run=elastic)
    part.add_argument("--engines", default="zero0,zero1,zero2,zero3,zero3_offload,accelerate", help="on two processes")
    part.add_argument("--starts", default="zero2,zero3", help="engines to start with before other numbers of processes")
    part.add_argument("--processes", default="1,3,4", help="other numbers of processes")
    part = parts.add_parser("soak", parents=[common])
    part.set_defaults(run=soak)
    part.add_argument("--minutes", type=float, default=45.0)
    part.add_argument("--interval", type=float, default=120.0, metavar="SECONDS", help="between faults")
    part.add_argument("--disk", type=int, default=256, metavar="MB", help="size of the disk that is filled")
    return parser


def main() -> int:
    options = arguments().parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpcm_faults_") as temporary:
        folder = (options.work or Path(temporary)).absolute()
        result, good = options.run(options, folder)
    result = json.loads(json.dumps(result).replace(str(folder), "."))  # outputs of runs name their files
    places = ("--work", str(options.work), "--out", str(options.out))
    given = [argument for argument in sys.argv[1:] if argument not in places]
    result["circumstances"] = circumstances(given, time.monotonic() - began)
    page = write(options.out, options.part, result)
    print(result["text"])
    print(f"\n{'no data was lost' if good else 'DATA WAS LOST'}: {page}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
