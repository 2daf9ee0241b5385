"""Errors for users: unique codes, one sentence each, all of them listed in errors.txt.

`python tests/test_errors.py` writes errors.txt anew.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("errors.txt")
HEADING = "# Written by `python tests/test_errors.py`: code, (key), sentence with {values} and [optional] text.\n\n"


class Error(NamedTuple):
    code: str
    """Empty in an error of one argument."""
    key: str
    sentence: str
    place: str


@cache
def errors(project: Path = PROJECT) -> list[Error]:
    """All errors that the package raises, in the order of the files; not those that pass on the code of another."""
    files = sorted((project / "hpcm_scale").rglob("*.py"))
    trees = {file.relative_to(project): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    classes = subclasses(trees.values())
    return [error for file, tree in trees.items() for error in in_tree(tree, classes, str(file))]


def subclasses(trees) -> set[str]:
    """Names of UserError and of the classes below it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"UserError"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def in_tree(tree: ast.AST, classes: set[str], file: str) -> Iterator[Error]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes):
            continue
        first = node.args[0] if node.args else None
        passes_on = isinstance(first, ast.Starred) or (isinstance(first, ast.Attribute) and first.attr == "code")
        if not passes_on:
            parts = [text(argument) for argument in node.args]
            code, key, sentence = parts if len(parts) == 3 else ("", "", *parts)
            yield Error(code, key, sentence, f"{file}:{node.lineno}")


def text(node: ast.expr) -> str:
    """The text of a literal or an f-string: the short name of each value in braces, optional text in brackets."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return text(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
        return f"[{node.left.value}]"  # "s" * (count != 1)
    if isinstance(node, ast.IfExp):
        return f"[{'|'.join(filter(None, map(text, (node.body, node.orelse))))}]"
    return f"{{{short_name(node).lstrip('_')}}}"


def short_name(node: ast.expr) -> str:
    """The name that says most about an expression, such as `names` for `len(names)` and `size` for `image.size`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
        return short_name(node.func.value)
    if isinstance(node, ast.Call) and node.args:
        return short_name(node.args[-1])
    if isinstance(node, ast.BoolOp):
        return short_name(node.values[0])
    names = [each.attr if isinstance(each, ast.Attribute) else each.id for each in ast.walk(node) if is_name(each)]
    return names[0] if names else "value"


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.Name)


def golden(found: list[Error]) -> str:
    """The contents of errors.txt: one entry for each code, in alphabetical order."""
    listed = {(error.code, error.key, error.sentence) for error in found if error.code}
    return HEADING + "\n".join(f"{code}  ({key})\n    {sentence}\n" for code, key, sentence in sorted(listed))


def test_codes_are_short_names():
    assert [error for error in errors() if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", error.code) and error.code] == []


def test_a_code_stands_for_one_sentence():
    first: dict[str, Error] = {}
    twice = [
        (first[error.code].place, error.place)
        for error in errors()
        if error.code and first.setdefault(error.code, error).sentence != error.sentence
    ]
    assert twice == []


def test_sentences_are_one_line_without_an_end():
    """A semicolon and a space stand between the cause and the remedy."""
    wrong = re.compile(r"\n|\.$|;(?! )|; [A-Z][a-z]|^\s|\s$|^$")
    assert [error for error in errors() if error.code and wrong.search(error.sentence)] == []


def test_every_error_has_a_code():
    without = [error.place for error in errors() if not error.code]
    assert without == []


def test_the_golden_file_is_up_to_date():
    assert GOLDEN.read_text(encoding="utf-8") == golden(errors())


def test_the_walk_finds_errors(tmp_path):
    package = tmp_path / "hpcm_scale"
    package.mkdir()
    (package / "a.py").write_text(
        "class Odd(UserError): ...\n"
        "raise Odd('no-shards', 'data.shards', f'{path} has {len(names)} shards; ' 'add some')\n"
        "raise UserError(other.code, other.key, f'{where}: {other}')\n"
        "raise UserError(*parts)\n"
        "raise UserError(f'{count:,} image{\"s\" * (count != 1)}')\n",
        encoding="utf-8",
    )
    assert errors(tmp_path) == [
        Error("no-shards", "data.shards", "{path} has {names} shards; add some", "hpcm_scale/a.py:2"),
        Error("", "", "{count} image[s]", "hpcm_scale/a.py:5"),
    ]


if __name__ == "__main__":
    found = errors()
    GOLDEN.write_text(golden(found), encoding="utf-8")
    without = [error.place for error in found if not error.code]
    sys.stderr.write(f"{len(found)} errors, {len(without)} of them without a code\n")
