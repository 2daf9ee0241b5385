"""An index or a tar from somebody who means harm: refused, or reported, before it does any."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
from data_refusals import refused

from hpcm_scale.data.index import load_index
from hpcm_scale.data.storage import LocalStorage
from hpcm_scale.data.verify import verify_shards
from hpcm_scale.errors import UserError
from hpcm_scale.tracking.progress import progress


@pytest.fixture
def folder(small_set, tmp_path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "set"))


def change(folder: Path, *where: str | int, to: object) -> None:
    """Set one value of the index."""
    content = json.loads((folder / "index.json").read_text())
    inner = content
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = to
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/passwd", "a/../../x", "a\\b", "a\0b", "..", ".", "", "a//b", "a\nb", 5]
)
@pytest.mark.parametrize("where", [("shards", 0, "name"), ("samples", "key", 3), ("samples", "extension", 3)])
def test_names_that_lead_elsewhere_are_refused(folder, where, name):
    change(folder, *where, to=name)
    with pytest.raises(UserError, match="not a plain relative name"):
        load_index(str(folder))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("samples", "offset", 2), -512),
        (("samples", "offset", 2), 0),
        (("samples", "offset", 2), 10**12),
        (("samples", "length", 2), 10**12),
        (("samples", "length", 2), 2**63 - 1),
        (("samples", "length", 2), 2**70),
        (("samples", "length", 2), 0),
        (("samples", "length", 2), -1),
        (("samples", "width", 2), 0),
        (("samples", "shard", 2), 99),
        (("samples", "shard", 2), -1),
        (("shards", 0, "bytes"), "many"),
        (("shards", 0, "bytes"), 2**70),
        (("shards", 0, "sha256"), "../../etc/passwd"),
        (("shards", 0, "name"), "shard-000001.tar"),
        (("shards", 0, "name"), "folder/shard-000000.tar"),
        (("shards",), []),
        (("samples", "key"), "text"),
        (("samples",), 1),
    ],
)
def test_an_index_that_no_build_writes_is_refused(folder, where, value):
    change(folder, *where, to=value)
    with refused("damaged-index", "data.shards"):
        load_index(str(folder))


def test_images_over_each_other_are_refused(folder):
    index = load_index(str(folder))
    change(folder, "samples", "offset", 1, to=int(index.offset[0]) + 1)
    with pytest.raises(UserError, match="overlap"):
        load_index(str(folder))


def test_deep_nesting_is_refused(folder):
    (folder / "index.json").write_text("[" * 200_000)
    with refused("damaged-index", "data.shards"):
        load_index(str(folder))


def test_memory_is_taken_for_what_is_there(folder):
    """Not for what an index promises of a shard of a terabyte."""
    name = load_index(str(folder)).shards[0].name
    size = (folder / name).stat().st_size
    assert len(LocalStorage(folder).read(name, 0, 10**15)) == size


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("stranger", "reported"),
    [
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "'link' is a symbolic link, not a regular file"),
        (member("hard", tarfile.LNKTYPE, "piece"), "'hard' is a hard link, not a regular file"),
        (member("zero", tarfile.CHRTYPE), "'zero' is a device, not a regular file"),
        (member("disk", tarfile.BLKTYPE), "'disk' is a device, not a regular file"),
        (member("pipe", tarfile.FIFOTYPE), "'pipe' is a named pipe, not a regular file"),
        (member("dir", tarfile.DIRTYPE), "'dir' is a folder, not a regular file"),
        (member("../up.jpg"), "'../up.jpg' would be unpacked outside of the target folder"),
        (member("/etc/x.jpg"), "'/etc/x.jpg' would be unpacked outside of the target folder"),
        (member("more.jpg"), "'more.jpg' is not in the index"),
    ],
)
def test_members_that_do_not_belong_are_reported(folder, stranger, reported):
    """Even where hash and size in the index are those of the tar with the stranger in it."""
    shard = load_index(str(folder)).shards[0]
    with tarfile.open(folder / shard.name, "a") as tar:
        tar.addfile(stranger, io.BytesIO())
    data = (folder / shard.name).read_bytes()
    change(folder, "shards", 0, "bytes", to=len(data))
    change(folder, "shards", 0, "sha256", to=sha256(data).hexdigest())
    found = verify_shards(folder, load_index(str(folder)), workers=1, progress=progress)
    assert [str(damage) for damage in found] == [f"{shard.name}: its member {reported}"]
