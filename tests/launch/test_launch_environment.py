"""Setting up, and the commands that test; with a stand-in for pip wherever it would really install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_shell import BASE_PATH, bash, program

pytestmark = pytest.mark.launch

SCRIPTS = ("environment.sh", "test.sh", "quickstart.sh", "one_node.sh", "many_nodes.sh", "slurm.sbatch")


def set_up(checkout: Path, extras: str, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """Source environment.sh as the scripts do."""
    script = f"set -euo pipefail; extras={extras}; . launch/environment.sh; command -v python"
    return bash("-c", script, "caller", "argument", cwd=checkout, **environment)


@pytest.mark.parametrize("script", [*(f"launch/{name}" for name in SCRIPTS), ".ci/run"])
def test_scripts_parse_and_those_that_are_run_are_executable(project: Path, script: str) -> None:
    path = project / script
    assert bash("-n", path, cwd=project).stderr == ""
    assert os.access(path, os.X_OK) == (path.name != "environment.sh")


def test_torch_is_installed_first_and_a_second_call_installs_nothing(checkout, active, calls) -> None:
    first = set_up(checkout, "test", VIRTUAL_ENV=active)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == str(active / "bin/python")
    torch, rest = calls()
    assert torch.endswith(f"-c {checkout}/launch/constraints.txt torch")
    assert rest.endswith(f"-c {checkout}/launch/constraints.txt -e {checkout}[test]")

    second = set_up(checkout, "test", VIRTUAL_ENV=active)
    assert second.stdout == f"{active}/bin/python\n"
    assert calls() == []


def test_what_changes_is_installed_again(checkout, active, calls, tmp_path) -> None:
    assert set_up(checkout, "test", VIRTUAL_ENV=active).returncode == 0
    calls()
    set_up(checkout, "", VIRTUAL_ENV=active)  # part of any extras
    assert calls() == []
    set_up(checkout, "quickstart", VIRTUAL_ENV=active)
    assert len(calls()) == 2
    set_up(checkout, "test", VIRTUAL_ENV=active)
    assert calls() == []

    moved = checkout.rename(tmp_path / "moved")
    set_up(moved, "test", VIRTUAL_ENV=active)
    assert calls()[1].endswith(f"-e {moved}[test]")
    with (moved / "launch/constraints.txt").open("a") as constraints:
        constraints.write("six==1.17.0\n")
    set_up(moved, "quickstart", VIRTUAL_ENV=active)
    assert len(calls()) == 2
    set_up(moved, "test", VIRTUAL_ENV=active)
    assert len(calls()) == 2


def test_a_failed_installation_is_reported_and_is_tried_again(checkout, active, calls) -> None:
    failed = set_up(checkout, "test", VIRTUAL_ENV=active, PIP_FAILS="1")
    assert failed.returncode == 1
    assert failed.stderr == "caller: pip could not install torch; correct the error above and run the script again\n"
    assert len(calls()) == 1
    set_up(checkout, "test", VIRTUAL_ENV=active)
    assert len(calls()) == 2


def test_makes_its_own_environment_and_shows_why_pip_fails(checkout) -> None:
    """With the real venv and pip, and an index that has nothing."""
    python = Path(sys.executable).resolve().parent
    offline = {
        "PATH": f"{python}:{BASE_PATH}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = set_up(checkout, "test", **offline)
    assert done.returncode == 1
    assert done.stdout.startswith("creating .venv with Python 3.")
    assert "ERROR: " in done.stderr  # pip's own words
    assert "pip could not install torch" in done.stderr
    assert (checkout / ".venv/bin/python").exists()

    again = set_up(checkout, "test", **offline)
    assert "creating .venv" not in again.stdout


def test_an_environment_that_was_moved_is_made_again(checkout, tmp_path) -> None:
    program(checkout / ".venv/bin/python", "exit 1")
    program(tmp_path / "new/python3", 'case "$1" in --version) echo "Python 3.11.9";; -m) echo "$@" >&2; exit 1;; esac')
    activate = checkout / ".venv/bin/activate"
    for place, output in (("/elsewhere", "creating .venv with Python 3.11.9\n"), (f"{checkout}/.venv", "")):
        activate.write_text(f"VIRTUAL_ENV='{place}'\n", encoding="utf-8")
        done = set_up(checkout, "test", PATH=f"{tmp_path}/new:{BASE_PATH}")
        assert (done.returncode, done.stdout) == (1, output)
        assert (f"-m venv --clear {checkout}/.venv\n" in done.stderr) == bool(output)


def test_an_old_python_is_refused_in_one_line(checkout, tmp_path) -> None:
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13"):
        program(tmp_path / "old" / name, 'case "$1" in --version) echo "Python 3.8.18";; *) exit 1;; esac')
    done = set_up(checkout, "test", PATH=f"{tmp_path}/old:{BASE_PATH}")
    assert done.returncode == 1
    assert done.stderr == "caller: Python 3.10 or newer is needed, but Python 3.8.18 was found; install one\n"
    assert not (checkout / ".venv").exists()


def test_an_old_active_environment_and_a_missing_compiler_are_refused(checkout, tmp_path, active) -> None:
    tools = tmp_path / "tools"  # all that the script needs, but no compiler
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "grep"):
        (tools / name).symlink_to(shutil.which(name))
    (active / "bin/c++").unlink()
    done = set_up(checkout, "test", VIRTUAL_ENV=active, PATH=tools)
    assert done.returncode == 1
    assert done.stderr == "caller: a C++ compiler is needed, but none of c++, g++, clang++ was found; install one\n"

    program(active / "bin/python", 'case "$1" in --version) echo "Python 3.9.18";; *) exit 1;; esac')
    done = set_up(checkout, "test", VIRTUAL_ENV=active, PATH=tools)
    assert done.stderr == f"caller: Python 3.10 or newer is needed, but {active} has Python 3.9.18\n"


def test_the_test_command_ends_with_pytest(checkout, active) -> None:
    (checkout / "tests").mkdir()
    (checkout / "tests/test_one.py").write_text("def test_one():\n    pass\n", encoding="utf-8")
    done = bash(checkout / "launch/test.sh", "tests/test_one.py", cwd=checkout.parent, VIRTUAL_ENV=active)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 passed in ")
    alone = ("-n", "0", "-k", "two")
    assert bash(checkout / "launch/test.sh", *alone, cwd=checkout, VIRTUAL_ENV=active).returncode == 5


def test_ci_needs_the_shared_data_and_passes_on_pytests_exit_code(checkout, active) -> None:
    alone = bash(checkout / ".ci/run", cwd=checkout.parent, VIRTUAL_ENV=active, CI="true")
    assert alone.returncode == 1
    assert alone.stderr == ".ci/run: ../shared is missing; put the folder of real data beside the checkout\n"
    (checkout.parent / "shared").mkdir()
    (checkout / "tests").mkdir()
    empty = bash(checkout / ".ci/run", cwd=checkout.parent, VIRTUAL_ENV=active, CI="true")
    assert empty.returncode == 5, empty.stdout + empty.stderr
    assert empty.stdout.splitlines()[-1].startswith("no tests ran in ")
    (checkout / "tests/test_one.py").write_text("def test_one():\n    assert False\n", encoding="utf-8")
    failed = bash(checkout / ".ci/run", cwd=checkout.parent, VIRTUAL_ENV=active, CI="true")
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1].startswith("1 failed in ")
