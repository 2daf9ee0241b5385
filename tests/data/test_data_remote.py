"""Shards behind a URL: range requests, retries, clear errors, and the local cache."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from data_refusals import refused
from range_server import RangeServer

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data import storage
from hpcm_scale.data.cache import CachedStorage
from hpcm_scale.data.index import load_index
from hpcm_scale.data.storage import RemoteStorage, is_permanent, pause
from hpcm_scale.data.stream import open_stream
from hpcm_scale.errors import UserError
from hpcm_scale.files import unfinished_name

pytestmark = pytest.mark.launch


@pytest.fixture
def server(small_set, tmp_path):
    folder = shutil.copytree(small_set, tmp_path / "served")
    with RangeServer(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "pause", lambda attempt: pause(attempt) / 50)


def read(location, *, last=24, **data):
    config = DataConfig(**({"shards": str(location), "crop": 64, "workers": 0, "retries": 4} | data))
    parts = {"batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    stream = open_stream(config, seed=3, first_image=0, last_image=last, **parts)
    batches = list(stream)
    return [key for batch in batches for key in batch.keys], torch.cat([batch.images for batch in batches])


@pytest.fixture(scope="module")
def expected(small_set):
    return read(small_set)


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_gives_the_same_as_the_folder(server, expected, workers):
    assert_same(read(server.url, workers=workers), expected)
    assert set(server.whole) == {"index.json"}
    assert sum(count for name, count in server.requests.items() if name != "index.json") == 24


def test_worker_processes_do_not_disturb_the_connections_of_their_parent(server, expected):
    for _ in range(2):
        assert_same(read(server.url, workers=2), expected)
    assert server.requests["index.json"] == 2  # none timed out and was asked for again


def test_any_scheme_of_fsspec_will_do(small_set, expected):
    fsspec.filesystem("memory").put(str(small_set), "/remote/set", recursive=True)
    assert_same(read("memory://remote/set"), expected)
    assert_same(read(f"file://{small_set}"), expected)
    with refused("no-shards-there", "data.shards"):
        read("memory://elsewhere")


def test_passing_failures_are_waited_out(server, expected):
    server.failures = Counter({"shard-000000.tar": 3, "shard-000002.tar": 2, "index.json": 3})
    server.cut_short = Counter({"shard-000001.tar": 2})
    assert_same(read(server.url, workers=2), expected)
    assert not +server.failures and not +server.cut_short


def test_no_server_at_all(server):
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:9/photos/index.json after 2 tries"):
        read("http://127.0.0.1:9/photos", retries=2)


def test_a_server_without_ranges_asks_for_a_cache(server, expected, tmp_path):
    server.ranges = False
    with refused("no-range-requests", "data.cache"):
        read(server.url)
    assert_same(read(server.url, cache=str(tmp_path / "cache")), expected)


def test_the_cache_fetches_each_shard_once(server, expected, tmp_path):
    cache = tmp_path / "cache"
    server.failures = Counter({"shard-000000.tar": 2})
    server.cut_short = Counter({"shard-000001.tar": 1})
    server.delay = {"shard-000002.tar": 0.2}
    assert_same(read(server.url, workers=2, cache=str(cache)), expected)
    index = load_index(str(server.folder))
    assert {path.name for path in cache.iterdir()} == {".lock", *(f"{s.sha256}.tar" for s in index.shards)}
    served = server.requests.copy()
    assert_same(read(server.url, workers=2, cache=str(cache)), expected)
    served["index.json"] += 1
    assert server.requests == served


FETCH = """
import sys
from hpcm_scale.data.cache import CachedStorage
from hpcm_scale.data.index import load_index
from hpcm_scale.data.storage import RemoteStorage

url, cache = sys.argv[1:]
index = load_index(url)
storage = CachedStorage(RemoteStorage(url, retries=2, timeout=20), cache, index.shards)
print(len([storage.read(shard.name, 0, 10) for shard in index.shards]))
"""


def test_several_processes_share_one_cache(server, fork_server, tmp_path):
    index = load_index(str(server.folder))
    server.delay = {shard.name: 0.3 for shard in index.shards}
    (tmp_path / "fetch.py").write_text(FETCH)
    words = [server.url, str(tmp_path / "cache")]
    processes = [fork_server.start("fetch", words, cwd=tmp_path, env=os.environ) for _ in range(4)]
    counts = [process.communicate(timeout=400)[0] for process in processes]
    assert counts == [f"{len(index.shards)}\n"] * 4
    assert all(server.whole[shard.name] == 1 for shard in index.shards)


def test_what_a_killed_process_left_in_the_cache_is_swept(server, tmp_path):
    index = load_index(str(server.folder))
    cached = CachedStorage(RemoteStorage(server.url, retries=1, timeout=60), tmp_path, index.shards)
    left_behind = tmp_path / f"{unfinished_name(Path(f'{index.shards[0].sha256}.tar'))}12345.part"
    left_behind.write_bytes(b"half")
    assert cached.read("shard-000000.tar", 0, 512) == (server.folder / "shard-000000.tar").read_bytes()[:512]
    assert not left_behind.exists()


def test_back_off_grows_and_differs():
    for attempt, longest in ((1, 0.5), (2, 1), (3, 2), (7, 30), (20, 30)):
        pauses = [pause(attempt) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


def test_which_failures_last():
    class Answer(Exception):
        def __init__(self, status):
            self.status = status

    assert [status for status in (400, 403, 408, 410, 429, 500, 503) if is_permanent(Answer(status))] == [
        400,
        403,
        410,
    ]
    assert not is_permanent(OSError("reset"))
