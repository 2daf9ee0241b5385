"""What SECURITY.md promises of the code, held by reading all of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "cloudpickle.load", "shelve.open",
    "marshal.load", "marshal.loads", "eval", "exec", "compile", "__import__", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive", "runpy.run_path",
    "webdataset.WebDataset", "wds.WebDataset", "wds.tarfile_to_samples",
}  # fmt: skip
EXTRACTING = {"extract", "extractall", "extractfile"}
OPTIONS = {"weights_only", "allow_pickle", "shell"}
SHELL = "hpcm_scale/data/storage.py"


def complaints(tree: ast.AST, shell_allowed: bool) -> Iterator[str]:
    """What the tree calls and must not call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml", "marshal", "os"):
            bad = {f"{node.module}.{name.name}" for name in node.names} & FORBIDDEN
            yield from (f"imports {name}" for name in bad)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {each.arg: ast.unparse(each.value) for each in node.keywords if each.arg in OPTIONS}
        if called in FORBIDDEN or called.rpartition(".")[2] in EXTRACTING:
            yield f"calls {called}"
        if called == "torch.load" and options.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if options.get("allow_pickle", "False") != "False":
            yield "allow_pickle"
        if options.get("shell", "False") != "False" and not shell_allowed:
            yield "a shell"


def test_the_package_calls_nothing_that_runs_what_it_reads(project):
    files = [path for room in ("hpcm_scale", "launch", "benchmarks") for path in sorted((project / room).rglob("*.py"))]
    assert len(files) > 100
    found = {
        f"{path.relative_to(project)}: {complaint}"
        for path in files
        for complaint in complaints(
            ast.parse(path.read_text(encoding="utf-8")), path.relative_to(project).as_posix() == SHELL
        )
    }
    assert found == set()


def test_only_pipes_use_a_shell(project):
    tree = ast.parse((project / SHELL).read_text(encoding="utf-8"))
    assert list(complaints(tree, shell_allowed=False)) == ["a shell"]


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)",
        "yaml.load(f, Loader=yaml.SafeLoader)", "np.load(f, allow_pickle=True)", "eval(x)", "exec(x)",
        "tar.extractall()", "tar.extract(m)", "subprocess.run(x, shell=True)", "subprocess.run(x, shell=flag)",
    ],
)  # fmt: skip
def test_the_walk_finds_them(line):
    assert list(complaints(ast.parse(line), shell_allowed=False))


def test_what_security_md_names_is_there(project):
    """Files and keys that it points to."""
    text = (project / "SECURITY.md").read_text(encoding="utf-8")
    for path in ("hpcm_scale/data/storage.py", "tests/test_security.py", "tests/data/test_data_hostile.py"):
        assert path in text and Path(project / path).is_file()
    assert "data.pipe=true" in text and "hpcm shards verify" in text
