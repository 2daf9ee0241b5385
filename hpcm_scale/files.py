"""Atomic writes, checks of paths before they are used, and removal of secrets from text."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from hpcm_scale.errors import ESCAPE, UserError, printable

PIPE = "pipe:"
"""Prefix of a source that is a shell command instead of a URL."""

_SECRETS = (
    re.compile(r"(?P<keep>//)[^/\s:@'\"]*:(?!\$)[^/\s'\"]+(?=@)"),  # ftp://user:password@host
    re.compile(r"(?P<keep>https?://)[^/\s@'\"$]+(?=@)"),  # a token in place of the user, as of git hosts
    re.compile(
        r"(?P<keep>[?&;](?:[\w.-]*(?:token|signature|secret|passw|credential|accesskey|api[-_]?key|auth)[\w.-]*"
        r"|sig|key|pwd)=)[^&#\s'\"$]+",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<keep>\bauthorization\s*:\s*)(?:(?:bearer|basic|token)\s+)?(?!(?:bearer|basic|token)\s)[^\s'\"$]+",
        re.IGNORECASE,
    ),
)
"""Passwords, tokens and signatures in URLs and headers; variables of a shell (`$TOKEN`) do not match."""


def without_secrets(text: str) -> str:
    """`text` with `…` in place of the passwords, tokens and signatures in its URLs and headers."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<keep>…", text)
    return text


def check_no_secret(text: str, named: str) -> None:
    """Raise UserError if a URL or header in `text`, the value of `named`, holds a secret; never shows it."""
    if without_secrets(text) != text:
        raise UserError(
            "secret-in-value",
            named,
            f"{named} holds a password, token or signature, which would be written to the run folder; remove it and "
            "set credentials in the environment (AWS_*, FSSPEC_*)",
        )


def unfinished_name(path: Path) -> str:
    """Prefix of the temporary files of `path`: 18 characters for a name of any length."""
    return f".{sha256(os.fsencode(path.name)).hexdigest()[:16]}."


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it is flushed to disk and renamed to `path`.

    The file gets the permissions of any new file (umask). On an exception the temporary file is
    removed and `path` stays as it was. Raises OSError if `path` exists and is not a regular file.
    """
    path = Path(path)
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{unfinished_name(path)}{os.getpid()}.part")
    try:
        unfinished.touch()
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        yield unfinished
        with unfinished.open("rb") as handle:
            if stat.S_IMODE(os.fstat(handle.fileno()).st_mode) != mode:  # safetensors makes files of mode 0600
                with suppress(OSError):  # a file system without permissions
                    os.fchmod(handle.fileno(), mode)
            os.fsync(handle.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Bytes that are not UTF-8, as in file names, are escaped: in JSON by its own escapes, so that they are read back
    unchanged, elsewhere as by `printable`.
    """
    with atomic_file(path) as unfinished:
        is_json = Path(path).suffix in (".json", ".jsonl")
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace" if is_json else ESCAPE)


def read_file(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError for anything else: reading a named pipe would block."""
    if kind := special_kind(path):
        raise OSError(errno.EINVAL, f"it is {kind}", str(path))
    return path.read_bytes()


def special_kind(path: Path) -> str:
    """The kind of `path`, such as "a pipe"; "" for a regular file or a link to one. Raises OSError if it is missing."""
    mode = path.stat().st_mode
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "not a file")


_KINDS = {
    stat.S_IFDIR: "an unreadable folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_replaceable(path: Path) -> None:
    """Raise OSError if `path` is a folder, a device, a pipe or a socket, which no file must replace."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and (kind := special_kind(path)):
        raise OSError(errno.EINVAL, f"it is {kind}", str(path))


@contextmanager
def utf_8_path(path: str | Path) -> Iterator[Path]:
    """Yield a path in UTF-8 that leads to `path`, for libraries that accept no other: itself or a temporary link."""
    path = Path(path)
    if printable(path) == str(path):
        yield path
        return
    with TemporaryDirectory(prefix="hpcm_scale_") as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield link


def check_length(path: str | Path) -> None:
    """Raise UserError if a name in `path`, or the whole path, is longer than the file system allows."""
    absolute = Path(path).absolute()
    there = nearest(absolute)
    longest = max(absolute.parts, key=lambda name: len(os.fsencode(name)))
    limits = {longest: os.pathconf(there, "PC_NAME_MAX"), str(absolute): os.pathconf(there, "PC_PATH_MAX") - 1}
    for name, limit in limits.items():
        size = len(os.fsencode(name))
        if size > limit:
            raise UserError(
                "name-too-long",
                "",
                f"{name} has {size} bytes, but the file system allows {limit}; choose a shorter name",
            )


def json_text(value: Any, indent: int = 1) -> str:
    """`value` as standard JSON; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file (`json_text`) atomically, with any suffix."""
    write_text(path, json_text(value).encode("utf-8", "backslashreplace").decode() + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_finite, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise UserError instead of OSError while the user's `path` is written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "unwritable-path",
            "",
            f"cannot write {path} ({error.strerror or error}); correct the cause or choose another path",
        ) from error


def check_writable(path: str | Path) -> None:
    """Raise UserError if the file `path`, which is written later, cannot be written; creates nothing."""
    path = Path(path)
    check_length(path)
    with writing(path):
        _check_replaceable(path)
        with TemporaryFile(dir=nearest(path.absolute().parent)):
            pass


def check_file(out: str | Path) -> None:
    """Raise UserError if the file `--out` is a folder."""
    if Path(out).is_dir():
        raise UserError("out-is-folder", "--out", f"--out {out} is a folder; give a file name")


def check_folder(out: str | Path) -> None:
    """Raise UserError if the folder `--out`, which is written later, cannot be written; creates nothing."""
    check_length(out)
    there = next(path for path in (Path(out), *Path(out).absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "a file" if there.exists() else "a dangling link"
        raise UserError(
            "out-not-a-folder",
            "--out",
            f"--out {out} cannot be a folder because {there} is {kind}; choose another",
        )
    if not is_writable(there):
        raise UserError(
            "out-read-only", "--out", f"--out {out} cannot be written because {there} is read-only; choose another"
        )


def is_writable(folder: str | Path) -> bool:
    """Whether a file can be created in `folder`; tries it, since permissions mislead on network drives and for root."""
    try:
        TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def nearest(folder: str | Path) -> Path:
    """`folder` itself if it exists, else the nearest existing folder above it."""
    folder = Path(folder).absolute()
    return next(there for there in (folder, *folder.parents) if os.path.exists(there))  # noqa: PTH110 (long names)


def sync_folder(folder: str | Path) -> None:
    """Flush the entries of `folder` to disk, so that renames and new files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
