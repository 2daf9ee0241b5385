"""Files are written atomically, with the permissions of the umask, under any name that the file system allows."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpcm_scale.errors import UserError, translate_os_errors
from hpcm_scale.files import atomic_file, check_length, check_writable, read_file, write_json, write_text, writing
from hpcm_scale.tracking.journal import Journal, read_journal

ODD = os.fsdecode(b"caf\xe9")


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_decides_whatever_writes(umask, tmp_path):
    with atomic_file(tmp_path / "new" / "tensors") as unfinished:
        save_file({"a": torch.zeros(2)}, unfinished)
    write_text(tmp_path / "text", "text")
    journal = Journal(tmp_path / "journal")
    assert {mode(tmp_path / name) for name in ("new/tensors", "text", "journal")} == {0o666 & ~umask}
    journal.resume(0)
    journal.close()
    assert mode(tmp_path / "journal") == 0o666 & ~umask
    assert mode(tmp_path / "new") == 0o777 & ~umask


@pytest.mark.parametrize("name", ["m" * 255, "ü" * 127, os.fsdecode(b"\xe9" * 255)], ids=["ascii", "utf-8", "bytes"])
def test_a_name_may_be_as_long_as_the_file_system_allows(name, tmp_path):
    check_length(tmp_path / name)
    write_text(tmp_path / name, "whole")
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]  # noqa: PTH208
    for path, limit in (("not/there/" + "m" * 256, 255), ("/".join(["m" * 250] * 20), 4095)):
        with pytest.raises(UserError, match=f"the file system allows {limit}") as refused:
            check_length(tmp_path / path)
        assert refused.value.code == "name-too-long"


def test_a_link_to_nothing_has_a_length_too(tmp_path):
    (tmp_path / "link").symlink_to("nowhere/at/all")
    check_length(tmp_path / "link")
    check_length(tmp_path / "link" / "below")


def test_names_are_escaped_in_text_and_kept_in_json(tmp_path):
    write_text(tmp_path / "table.csv", f"{ODD},ü\n")
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == "caf\\xe9,ü\n"
    write_text(tmp_path / "facts.json", json.dumps({"path": ODD, "ü": 1}, ensure_ascii=False))
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8")) == {"path": ODD, "ü": 1}
    write_json(tmp_path / "figures.txt", {"path": ODD, "ü": 1})
    assert json.loads((tmp_path / "figures.txt").read_text(encoding="utf-8")) == {"path": ODD, "ü": 1}
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1, "time": 1, "train/images": 1, "compute/pflops": 1, "name": ODD})
    journal.close()
    assert read_journal(tmp_path / "metrics.jsonl")[0]["name"] == ODD


def test_reading_something_else_than_a_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    for path, kind in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "socket", "a socket"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(OSError, match=f"it is {kind}"):
            read_file(path)


def test_something_else_than_a_file_is_not_replaced(tmp_path):
    """A rename would put a file in the place of a device, a pipe or a socket."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in (("pipe", "it is a pipe"), ("link", "it is a pipe"), ("folder", "Is a directory")):
        path = tmp_path / name
        with pytest.raises(UserError, match=f"{name} \\({reason}\\)") as refused, writing(path):
            write_text(path, "text")
        assert refused.value.code == "unwritable-path"
        with pytest.raises(UserError, match=f"{name} \\({reason}\\)") as refused:
            check_writable(path)
        assert refused.value.code == "unwritable-path"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_check_writable_creates_nothing(tmp_path):
    (tmp_path / "file").write_text("old", encoding="utf-8")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "folder" / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"
    with pytest.raises(UserError, match=r"cannot write .*file/below \(Not a directory\)"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"cannot write /proc/new/file \("):
        check_writable("/proc/new/file")  # root, too, can make no file there


def test_errors_of_the_file_system_are_translated_and_others_pass():
    with pytest.raises(UserError, match=r"x+/a \(File name too long\)") as refused, translate_os_errors():
        Path("x" * 300, "a").read_bytes()
    assert refused.value.code == "unusable-path"
    with pytest.raises(UserError, match="the disk") as refused, translate_os_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert refused.value.code == "unusable-path"
    with pytest.raises(FileNotFoundError), translate_os_errors():
        Path("nowhere").read_bytes()
    with pytest.raises(PermissionError), translate_os_errors():  # not of a file
        raise PermissionError(errno.EPERM, "Operation not permitted")
