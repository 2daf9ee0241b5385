"""Trouble that passes leaves no trace: replaced files, a damaged cache, a full disk; and workers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from crops import assert_same, seen
from range_server import RangeServer

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.index import load_index
from hpcm_scale.data.processes import STOP_SIGNALS, block_stop_signals, follow_parent
from hpcm_scale.data.samples import SampleReader
from hpcm_scale.data.stream import open_stream
from hpcm_scale.errors import UserError

pytestmark = pytest.mark.launch

ONE_PROCESS = {"seed": 3, "first_image": 0, "batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}


@pytest.fixture
def folder(small_set, tmp_path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "set"))


@pytest.fixture(scope="module")
def expected(small_set):
    return seen(small_set)


def damage(path: Path) -> None:
    """A file of the same size takes its place, every byte of it wrong."""
    wrong = bytes(byte ^ 255 for byte in path.read_bytes())
    path.with_suffix(".new").write_bytes(wrong)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("how", ["damaged", "short"])
def test_a_shard_that_is_mended_while_the_run_goes_on_is_opened_again(folder, how):
    """What is held open is the file of before."""
    index = load_index(str(folder))
    photos = SampleReader(DataConfig(crop=64), str(folder), index, seed=3)
    whole = {shard.name: (folder / shard.name).read_bytes() for shard in index.shards}
    for name in whole:
        if how == "damaged":
            damage(folder / name)
        else:
            (folder / name).write_bytes(b"short")
        photos.storage.read(name, 0, 10)
    for name, data in whole.items():
        (folder / "new").write_bytes(data)
        (folder / "new").replace(folder / name)
    assert all(photos.crop_at(image).corrupt == [] for image in range(23))
    photos.close()


def test_a_damaged_file_in_the_cache_is_fetched_again_once(small_set, expected, tmp_path):
    index = load_index(str(small_set))
    with RangeServer(small_set) as server:
        assert_same(seen(server.url, cache=str(tmp_path)), expected)
        first, second = (tmp_path / f"{shard.sha256}.tar" for shard in index.shards[:2])
        damage(first)
        second.write_bytes(b"short")
        found = seen(server.url, cache=str(tmp_path))
        assert_same(found, expected)
        assert found.corrupt == []
        assert [server.whole[shard.name] for shard in index.shards] == [2, 2] + [1] * (len(index.shards) - 2)


READ = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from crops import seen

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
found = seen(sys.argv[2], cache=sys.argv[3], workers=int(sys.argv[5]), batch_size=1)
print(len(found.corrupt), *found.keys.values())
"""


def test_a_cache_without_room_falls_back_to_the_url(small_set, expected, fork_server, tmp_path):
    """The largest file that the system lets the process write is smaller than a shard."""
    cache = tmp_path / "cache"
    with RangeServer(small_set) as server:
        (tmp_path / "program.py").write_text(READ)
        words = [str(Path(__file__).parent), server.url, str(cache), "20000", "1"]
        out, err = fork_server.start("program", words, cwd=tmp_path, env=os.environ).communicate(timeout=400)
    assert out.split() == ["0", *expected.keys.values()], err
    said = [line for line in err.splitlines() if line.startswith("hpcm: ")]
    assert said == [
        f"hpcm: cannot write to data.cache={cache} (File too large); shards that are not cached are read remotely"
    ]
    assert len(list(cache.glob("*.tar"))) <= 1 and not list(cache.glob(".*.part"))  # the last one is small


def test_a_cache_that_cannot_be_made_is_one_error(small_set, tmp_path):
    (tmp_path / "file").touch()
    with RangeServer(small_set) as server, pytest.raises(UserError, match=r"cannot write .*file/cache"):
        seen(server.url, cache=str(tmp_path / "file" / "cache"))


def test_a_worker_that_is_killed_is_one_error_of_the_iterator(small_set):
    """As by the kernel when memory runs out; and nowhere else than from the iterator."""
    config = DataConfig(shards=str(small_set), crop=64, workers=2)
    before = set(multiprocessing.active_children())
    stream = open_stream(config, last_image=None, **ONE_PROCESS)
    next(stream)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join(60)
    time.sleep(0.2)  # a handler that raises would do so here
    with pytest.raises(UserError, match=r"a data worker was killed by signal 9.*data\.workers"):
        for _ in range(100):
            next(stream)
    assert not psutil.wait_procs([psutil.Process(w.pid) for w in workers if psutil.pid_exists(w.pid)], timeout=60)[1]


def ready_after_a_while(started, ready, stop) -> None:
    """A worker in whose first moments much happens before it follows its parent."""
    started.set()
    time.sleep(0.5)
    follow_parent(stop)
    ready.set()
    time.sleep(600)


def test_signals_do_not_end_a_worker_in_its_first_moments():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    started, ready = context.Event(), context.Event()
    worker = context.Process(target=ready_after_a_while, args=(started, ready, here), daemon=True)
    with block_stop_signals():
        worker.start()
    assert started.wait(60)
    for number in STOP_SIGNALS:
        os.kill(worker.pid, number)
    assert ready.wait(60) and worker.is_alive()
    for number in STOP_SIGNALS:
        os.kill(worker.pid, number)
    time.sleep(0.2)
    assert worker.is_alive()
    there.send(None)
    worker.join(60)
    assert worker.exitcode == 0


def test_a_signal_during_the_start_reaches_this_process_afterwards():
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_arguments: received.append(1))
    try:
        with block_stop_signals():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            assert received == []
        assert received == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_are_blocked_while_workers_start(small_set):
    """SIGTERM to each of them as soon as it exists."""
    config = DataConfig(shards=str(small_set), crop=64, workers=2)
    ended, hit = threading.Event(), set()

    def fire() -> None:
        this = psutil.Process()
        while not ended.is_set():
            for child in this.children():
                if child.pid not in hit and child.pid not in others:
                    hit.add(child.pid)
                    child.send_signal(signal.SIGTERM)

    others = {child.pid for child in psutil.Process().children()}
    gun = threading.Thread(target=fire)
    gun.start()
    try:
        stream = open_stream(config, last_image=32, **ONE_PROCESS)
        assert len(list(stream)) == 8
    finally:
        ended.set()
        gun.join()
    assert len(hit) >= 2


@pytest.mark.parametrize("busy", ["pause", "silence"])
def test_closing_does_not_wait_for_a_worker_that_waits_for_a_server(small_set, busy):
    """The server keeps each of them waiting for five minutes."""
    config = DataConfig(crop=64, workers=2, retries=50, timeout=300, prefetch=1000)
    with RangeServer(small_set) as server:
        config.shards = server.url
        stream = open_stream(config, last_image=None, **ONE_PROCESS)
        next(stream)
        for name in [shard.name for shard in load_index(str(small_set)).shards]:
            if busy == "pause":
                server.status[name] = 503
            else:
                server.delay[name] = 300
        while server.troubled < 2:  # each has many batches to make ready
            time.sleep(0.05)
        workers = multiprocessing.active_children()
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 300 / 5
        assert not [worker for worker in workers if worker.is_alive()]
