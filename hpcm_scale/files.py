"""Files that are either whole or not there."""

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

from hpcm_scale.errors import SHOWN, UserError, shown

# Secrets inside URLs and shell commands: refused where they would be written down, hidden where they are told.


PIPE = "pipe:"
"""What a source starts with that is a shell command and no URL."""

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
"""Each matches a secret after what may be kept. What a shell will fill in (`$TOKEN`) is none."""


def without_secrets(text: str) -> str:
    """`text` with `…` in place of passwords, tokens and signatures of the URLs and headers in it."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<keep>…", text)
    return text


def check_no_secret(text: str, named: str) -> None:
    """Raise UserError, which does not repeat it, if a URL or header in `text`, the value of `named`, holds a secret."""
    if without_secrets(text) != text:
        raise UserError(
            f"{named} holds a password, token or signature, which would be written to the run folder; take it out "
            "and give credentials in the environment (AWS_*, FSSPEC_*)"
        )


def unfinished_name(path: Path) -> str:
    """What the names of unfinished files of `path` begin with: short, however long its own name is."""
    return f".{sha256(os.fsencode(path.name)).hexdigest()[:16]}."


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; flush it to disk and rename it on success.

    Its permissions are those of any new file, as the umask and the folder have them, whatever wrote it. On an exception
    the unfinished file is removed and `path` is left as it was. Raises OSError if something else than a file is there.
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

    Bytes of names that are not UTF-8 are escaped: in JSON as it escapes them itself, so that they are read back as they
    were, elsewhere as by `shown`.
    """
    with whole_file(path) as unfinished:
        is_json = Path(path).suffix in (".json", ".jsonl")
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace" if is_json else SHOWN)


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises OSError, too, for what is not a regular file: a named pipe would be waited for."""
    if kind := kind_of(path):
        raise OSError(errno.EINVAL, f"it is {kind}", str(path))
    return path.read_bytes()


def kind_of(path: Path) -> str:
    """What something that is neither a regular file nor a link to one is; "" for a file. Raises OSError."""
    mode = path.stat().st_mode
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


_KINDS = {
    stat.S_IFDIR: "an unreadable folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_replaceable(path: Path) -> None:
    """Raise OSError if a rename would put a file in the place of a device, a pipe or a socket, or fail at a folder."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and (kind := kind_of(path)):
        raise OSError(errno.EINVAL, f"it is {kind}", str(path))


@contextmanager
def utf_8_path(path: str | Path) -> Iterator[Path]:
    """A path to `path` that is UTF-8, for libraries that take no other: its own, or else a link, removed afterwards."""
    path = Path(path)
    if shown(path) == str(path):
        yield path
        return
    with TemporaryDirectory(prefix="hpcm_scale_") as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield link


def check_length(path: str | Path) -> None:
    """Raise UserError if a name in `path`, or all of it, is longer than the file system takes."""
    absolute = Path(path).absolute()
    there = nearest(absolute)
    for name, most in (
        (max(absolute.parts, key=len_in_bytes), os.pathconf(there, "PC_NAME_MAX")),
        (absolute, os.pathconf(there, "PC_PATH_MAX") - 1),
    ):
        if len_in_bytes(name) > most:
            raise UserError(
                f"{name} has {len_in_bytes(name)} bytes, and the file system takes {most}; choose a shorter name"
            )


def len_in_bytes(name: str | Path) -> int:
    """How many bytes a name has on disk."""
    return len(os.fsencode(name))


def json_text(value: Any, indent: int = 1) -> str:
    """Plain values as JSON that every reader takes: numbers that are not finite become null, which JSON lacks."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file (`json_text`) atomically, whatever its name ends with."""
    write_text(path, json_text(value).encode("utf-8", "backslashreplace").decode() + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_finite, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Tell in one sentence what keeps the user's `path` from being written in here (`UserError`)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); mend that, or name another place") from error


def check_writable(path: str | Path) -> None:
    """Raise UserError if `path` cannot be written, where that comes much later; leaves nothing there."""
    path = Path(path)
    check_length(path)
    with writing(path):
        _check_replaceable(path)
        with TemporaryFile(dir=nearest(path.absolute().parent)):
            pass


def check_folder(out: str | Path) -> None:
    """Raise UserError if `--out` cannot be a folder to write to, where that comes much later; leaves nothing there."""
    check_length(out)
    there = next(path for path in (Path(out), *Path(out).absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link to nothing"
        raise UserError(f"--out {out} cannot be a folder because {there} is {kind}; name a folder")
    if not takes_files(there):
        raise UserError(f"--out {out} cannot be written because {there} is read-only; name another folder")


def takes_files(folder: str | Path) -> bool:
    """Whether a file can be made there: permissions do not tell, on network file systems and for root."""
    try:
        TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def nearest(folder: str | Path) -> Path:
    """The folder itself, or what exists of those above it."""
    folder = Path(folder).absolute()
    return next(there for there in (folder, *folder.parents) if os.path.exists(there))  # noqa: PTH110 (long names)


def sync_folder(folder: str | Path) -> None:
    """Make renames and new files in `folder` survive a power cut."""
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
