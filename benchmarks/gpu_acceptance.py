"""Acceptance test of a machine with GPUs and of the code on it: fifteen checks, in eight minutes.

    python benchmarks/gpu_acceptance.py [--only a] [--out FOLDER]
    python benchmarks/gpu_acceptance.py --wheels FOLDER          # installs everything but torch from there
    python benchmarks/gpu_acceptance.py --device cpu --tiny      # rehearsal without a GPU

It needs no network and no data: it draws images and builds shards of them. Each check runs in its own process with a
time limit and prints one JSON line; a table follows at the end. On a GPU each part takes at most 150 s and can be
repeated:

    a   1 start and output               2 fp32 against the CPU       3 bf16
        4 engines, with and without overlap                           9 a thread beside a full launch queue
    b   5 stopped and resumed            6 evaluation, ZeRO 2 to 3    7 checkpoint, SIGTERM, kill -9
        8 out of memory, NaN, stall     13 files across devices      14 a step as one CUDA graph
    c  10 compilation   11 utilisation, launches, memory   12 kernels by shape   15 bf16 against fp32
    d   4 to 7 again with two processes, if there are two GPUs

Exit code: 0 if all checks that ran passed, 1 if not, 2 if it could not start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from gpu_findings import Check

ROOT = Path(__file__).resolve().parents[1]
NEEDS_A_GPU = "needs a GPU"


class Row(NamedTuple):
    """A check to run with a number of processes."""

    check: Check
    processes: int

    @property
    def part(self) -> str:
        """The part that limits its time."""
        return "d" if self.processes > 1 else self.check.part

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.check.number}" + (f" ({self.processes} processes)" if self.processes > 1 else "")

    @property
    def folder(self) -> str:
        """Name of its folder, without brackets, which have a meaning in overrides."""
        return f"check_{self.check.number}_{self.processes}"


def main() -> None:
    """Run the chosen checks; with --run, one check in this process."""
    arguments = parser().parse_args([text for text in sys.argv[1:] if not text.startswith("--local_rank")])
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if arguments.wheels:
        raise SystemExit(with_wheels(arguments.wheels))
    if arguments.run:
        perform(arguments)
    else:
        try:
            code = accept(arguments)
        except KeyboardInterrupt:
            code = 130
        raise SystemExit(code)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described.add_argument("--only", help="numbers of checks and names of parts (default: all; on a CPU a,b,c)")
    described.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    described.add_argument("--tiny", action="store_true", help="small models and few steps")
    described.add_argument("--out", type=Path, metavar="FOLDER", help="write results.json and results.md there")
    described.add_argument(
        "--wheels",
        type=Path,
        metavar="FOLDER",
        help="install what is missing from this folder into a temporary virtual environment, and run there",
    )
    described.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    described.add_argument("--run", type=int, help=argparse.SUPPRESS)
    described.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    return described


def with_wheels(wheels: Path) -> int:
    """Run this command in a virtual environment on top of the current one; its exit code."""
    if sys.version_info < (3, 11):
        sys.stderr.write("gpu_acceptance: --wheels needs Python 3.11 or newer\n")
        return 2
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory(prefix="gpu_acceptance_") as folder:
        venv.create(folder, system_site_packages=True, with_pip=False)
        python = Path(folder) / "bin" / "python"
        place = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        # In nested environments, "system" is the Python below both.
        here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (Path(place) / "beside.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
        code = subprocess.run([*install, "--find-links", wheels.resolve(), *project["dependencies"]]).returncode
        if code:
            sys.stderr.write(f"gpu_acceptance: pip could not install the missing packages from {wheels} (see above)\n")
            return 2
        given = sys.argv[1:]
        place = next(index for index, text in enumerate(given) if text.startswith("--wheels"))
        left = given[:place] + given[place + (1 if "=" in given[place] else 2) :]
        return subprocess.run([python, Path(__file__).resolve(), *left]).returncode


def accept(arguments: argparse.Namespace) -> int:
    """Run the checks and print their lines and the table; the exit code."""
    began = time.monotonic()
    import torch
    from gpu_checks import CHECKS

    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.stderr.write("gpu_acceptance: torch finds no GPU; rehearse without one by --device cpu --tiny\n")
        return 2
    from hpcm_scale.errors import UserError
    from hpcm_scale.files import check_folder

    try:
        if arguments.out:
            check_folder(arguments.out)
    except UserError as error:
        sys.stderr.write(f"gpu_acceptance: {error}\n")
        return 2
    only = arguments.only or ("a,b,c,d" if cuda else "a,b,c")
    try:
        rows = chosen(only, CHECKS, torch.cuda.device_count() if cuda else 2)
    except ValueError as error:
        sys.stderr.write(f"gpu_acceptance: --only {only}: {error}\n")
        return 2
    from hpcm_scale.tracking.progress import progress

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running check, too
    with tempfile.TemporaryDirectory(prefix="gpu_acceptance_") as name:
        folder = Path(name)
        make_material(folder)
        outcomes, spent = [], dict.fromkeys("abcd", time.monotonic() - began)
        with progress(total=len(rows), description="checks", unit="check", seconds=5.0) as bar:
            for index, row in enumerate(rows):
                reserved = spent[row.part] + reserve(rows[index:])
                outcome = outcome_of(row, arguments, folder, reserved)
                spent[row.part] += outcome["seconds"]
                outcomes.append(outcome)
                bar.write(json.dumps(outcome, ensure_ascii=False))
                bar.update()
    publish(outcomes, arguments)
    return int(any(outcome["result"] == "failed" for outcome in outcomes))


def chosen(only: str, checks: tuple[Check, ...], devices: int) -> list[Row]:
    """The rows that `--only` names, in the order of the table. Raises ValueError with the reason."""
    names = set(filter(None, only.split(",")))
    numbers = {str(check.number) for check in checks}
    if unknown := sorted(names - numbers - set("abcd")):
        raise ValueError(f"there is no check or part {', '.join(unknown)}")
    rows = [Row(check, 1) for check in checks if names & {check.part, str(check.number)}]
    if devices > 1:
        rows += [Row(check, 2) for check in checks if check.together and names & {"d", str(check.number)}]
    if not rows:
        raise ValueError("part d needs two GPUs" if names else "name a check or a part")
    return rows


def reserve(rows: list[Row]) -> float:
    """Seconds that the first row leaves to the others of its part: half of their budgets.

    The budgets are estimates; a check should not fail because its own is too low.
    """
    return sum(row.check.seconds for row in rows[1:] if row.part == rows[0].part) / 2


def make_material(folder: Path) -> None:
    """Shards of twelve drawn JPEG files, and three drawn PNG files of different sizes for evaluation."""
    from drawn_images import write_images

    training = folder / "training"
    write_images(training, {f"{number:02}.jpg": (320, 384) for number in range(12)}, quality=92, subsampling=0)
    write_images(folder / "images", {"12.png": (256, 256), "13.png": (300, 200), "14.png": (128, 411)})
    build = [sys.executable, "-m", "hpcm_scale.cli", "shards", "build", training, "--out", folder / "shards"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)


def outcome_of(row: Row, arguments: argparse.Namespace, folder: Path, reserved: float) -> dict[str, Any]:
    """Run a check in its own process. `reserved`: seconds of its part that are used, or left to others."""
    from gpu_checks import PART_SECONDS

    check, outcome = row.check, {"check": row.name, "title": row.check.title, "part": row.part}
    cuda = arguments.device == "cuda"
    if check.needs_gpu and not cuda:
        return outcome | {"result": NEEDS_A_GPU, "seconds": 0.0, "figures": {}, "failures": []}
    limit = PART_SECONDS - reserved if cuda else 60.0 * check.seconds
    place = folder / row.folder
    place.mkdir()
    began = time.monotonic()
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            command_of(row, arguments, folder),
            cwd=place,
            env=environment_of(arguments, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # after Ctrl-C, too
            if process.poll() is None:
                end(process)
    took = time.monotonic() - began
    found = {"figures": {}, "failures": [], "done": False}
    with suppress(FileNotFoundError):
        found = json.loads((place / "found.json").read_text(encoding="utf-8"))
    failures = found["failures"]
    if code is None:
        failures.append(f"it was killed after {limit:.0f} s")
    elif code or not found["done"]:
        failures.append(f"its process exited with code {code}")
    outcome |= {"result": "failed" if failures else "passed", "seconds": round(took, 1), "limit": round(limit)}
    if failures:
        outcome["log"] = (place / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
    shutil.rmtree(place, ignore_errors=True)
    return outcome | {"figures": found["figures"], "failures": failures}


def command_of(row: Row, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The command that runs a check."""
    options = ["--run", str(row.check.number), "--processes", str(row.processes), "--folder", str(folder)]
    options += ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    program = [str(Path(__file__).resolve()), *options]
    if row.processes == 1:
        return [sys.executable, "-u", *program]
    from hpcm_scale.sweeps.local import free_port

    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", os.devnull]
    return [*launcher, "--num_gpus", str(row.processes), "--master_port", str(free_port([])), *program]


def environment_of(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Environment of a check: later checks share the compiled code."""
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    if arguments.device == "cpu":  # the networks are too small for several threads
        kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return os.environ | kept


def end(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for below in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                below.kill()
    process.kill()
    process.wait()


def perform(arguments: argparse.Namespace) -> None:
    """Run one check in this process."""
    import torch
    from gpu_checks import CHECKS
    from gpu_findings import Setting, perform

    check = next(check for check in CHECKS if check.number == arguments.run)
    row, folder = Row(check, arguments.processes), arguments.folder
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    setting = Setting(
        device=device,
        tiny=arguments.tiny,
        folder=folder / row.folder,
        shards=folder / "shards",
        images=folder / "images",
        processes=arguments.processes,
    )
    perform(check, setting)


def publish(outcomes: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table; write it and all figures to --out."""
    import torch
    from bench.machine import machine
    from bench.report import Report, Table, show, write

    cuda = arguments.device == "cuda"
    names = [f"{outcome['check']} {outcome['title']}" for outcome in outcomes]
    rows = [
        [
            name,
            outcome["part"],
            outcome["result"],
            f"{outcome['seconds']:.0f}" if outcome["seconds"] else "–",
            "; ".join(outcome["failures"]) or "–",
        ]
        for name, outcome in zip(names, outcomes, strict=True)
    ]
    counted = Counter(outcome["result"] for outcome in outcomes)
    notes = [f"{counted['passed']} passed, {counted['failed']} failed, {counted[NEEDS_A_GPU]} need a GPU."]
    if not cuda:
        notes.insert(0, "**Nothing here ran on a GPU**: this is a rehearsal of the script with small models on a CPU.")
    figures = [
        Table(name, ["figure", "value"], [[key, as_text(value)] for key, value in outcome["figures"].items()], [])
        for name, outcome in zip(names, outcomes, strict=True)
        if outcome["figures"]
    ]
    report = Report(
        name="results",
        title="GPU acceptance" if cuda else "GPU acceptance, rehearsal without a GPU",
        machine=machine(torch.device(arguments.device), ("python", "benchmarks/gpu_acceptance.py")),
        tables=[Table("", ["check", "part", "result", "seconds", "failures"], rows, notes)],
        results={"checks": outcomes},
    )
    show(report)
    if arguments.out:
        report.tables.extend(figures)
        write(report, arguments.out)


def as_text(figures: Any) -> str:
    """Figures as the text of a table cell."""
    if isinstance(figures, dict):
        ends = {True: ";", False: ","}
        parts = [f"{name} {as_text(value)}{ends[isinstance(value, dict)]}" for name, value in figures.items()]
        return " ".join(parts).rstrip(",;")
    if isinstance(figures, list):
        return " ".join(map(as_text, figures))
    return f"{figures:g}" if isinstance(figures, float) else str(figures)


if __name__ == "__main__":
    main()
