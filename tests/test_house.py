"""The habits of the whole tree: style, import directions, sizes of files, docstrings, no private paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST_FILE = 400


def run(project: Path, *command: str) -> str:
    """The output of a command that must succeed."""
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sources(project) -> dict[Path, ast.Module]:
    """Every module of the package, parsed."""
    files = sorted((project / "hpcm_scale").rglob("*.py"))
    return {path.relative_to(project): ast.parse(path.read_text(encoding="utf-8")) for path in files}


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=["lint", "format"])
def test_style(project, arguments):
    run(project, sys.executable, "-m", "ruff", *arguments, "--no-cache", "--quiet")


def test_rooms_import_downward_only(project):
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    assert "1 kept, 0 broken" in run(project, sys.executable, "-c", program)


def test_every_contract_layer_is_a_room(project):
    """A layer whose room was renamed would hold nothing."""
    text = (project / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)
    rooms = re.findall(r"\w+", layers)
    package = project / "hpcm_scale"
    assert len(rooms) > 10
    assert [room for room in rooms if not (package / room).is_dir() and not (package / f"{room}.py").is_file()] == []


def test_files_are_short(project):
    files = (project / "hpcm_scale").rglob("*.py")
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {str(path): length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_public_names_have_docstrings(sources):
    missing = [f"{path}: {name}" for path, tree in sources.items() for name in undocumented(tree)]
    assert missing == []


def undocumented(tree: ast.Module) -> Iterator[str]:
    """The module, and its public functions and classes, without a docstring."""
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if named and not ast.get_docstring(node):
            yield node.name


def test_no_path_of_one_machine(project):
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=project, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    private = re.compile(rf"(?<![\w.$}}])/(?:home|root|tmp|Users)/\w|{re.escape(str(project))}\b")
    found = []
    for name in filter(None, listing.stdout.decode().split("\0")):
        try:
            text = (project / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a picture; a file that was removed
        found += [f"{name}: {match.group()}" for match in private.finditer(text)]
    assert found == []


def test_documents_are_finished_and_link_to_what_is_there(project):
    documents = [Path(name) for name in run(project, "git", "ls-files", "*.md").splitlines()]
    assert documents
    for document in documents:
        text = (project / document).read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
        assert "@@" not in text, document
        assert [target for target in targets if not (project / document.parent / target).exists()] == [], document
