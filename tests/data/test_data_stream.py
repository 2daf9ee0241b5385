"""The stream as the training loop meets it: small photos, damage, signals, and ways to end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import torch
import webdataset as wds
from data_refusals import refused
from fork_server import Forked
from image_files import Decoded
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.build import build_shards
from hpcm_scale.data.images import cut, decode
from hpcm_scale.data.index import load_index
from hpcm_scale.data.mixture import load_mixture, sample_at
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.data.storage import LocalStorage
from hpcm_scale.data.stream import Batch, CropSource, collate, deliver, open_stream, pass_errors
from hpcm_scale.errors import UserError
from hpcm_scale.tracking.progress import progress

ONE_PROCESS = {"batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}


def stream_of(folder, *, last=None, seed=0, **data):
    config = DataConfig(**({"shards": str(folder), "crop": 64, "workers": 0} | data))
    return open_stream(config, seed=seed, first_image=0, last_image=last, **ONE_PROCESS)


def test_crops_are_cut_from_the_stored_images(small_set, photo_folder):
    index = load_index(str(small_set))
    files = dict(zip(index.keys, sorted(p for p in photo_folder.rglob("*") if p.is_file()), strict=True))
    for batch in stream_of(small_set, last=48, crop=80):
        for image, key, pixels in zip(batch.image_index.tolist(), batch.keys, batch.images, strict=True):
            photo = decode(files[key].read_bytes())
            sample = sample_at(0, image, 23)
            square, _ = cut(Decoded(photo), 80, True, seed=0, epoch=image // 23, sample=sample)
            assert (np.asarray(square) == pixels.permute(1, 2, 0).numpy()).all()


def test_small_images_are_scaled_up_and_counted(small_set):
    index = load_index(str(small_set))
    small = dict(zip(index.keys, index.smaller_sides < 160, strict=True))
    assert 0 < sum(small.values()) < 23
    total = 0
    for batch in stream_of(small_set, last=92, crop=160):
        assert batch.upscaled == sum(small[key] for key in batch.keys)
        total += batch.upscaled
    assert total == 4 * sum(small.values())


def test_all_kinds_of_images_train(packaged_photos, tmp_path):
    with Image.open(packaged_photos[1]) as chelsea:
        photo = chelsea.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for mode in ("L", "LA", "P", "RGBA", "1"):
        photo.convert(mode).save(tmp_path / f"{mode}.png")
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "sixteen.png")
    built = build_shards([tmp_path], tmp_path / "set", min_side=0, shard_size=10**9, workers=1, progress=progress)
    assert len(built.index) == 8
    for batch in stream_of(tmp_path / "set", last=8, crop=256, flip=False):
        assert batch.upscaled == 0
        for key, image, pixels in zip(batch.keys, batch.image_index.tolist(), batch.images, strict=True):
            reference = photo.transpose(Image.Transpose.ROTATE_270) if key == "turned" else photo
            sample = sample_at(0, image, 8)
            square, _ = cut(Decoded(reference), 256, False, seed=0, epoch=0, sample=sample)
            luma = (np.asarray(square) @ [0.299, 0.587, 0.114]).mean()
            assert abs((pixels.permute(1, 2, 0).numpy() @ [0.299, 0.587, 0.114]).mean() - luma) < 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loop_s_random_numbers_are_left_alone(small_set, workers):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    stream = stream_of(small_set, workers=workers)
    next(stream)
    stream.close()
    assert torch.equal(torch.rand(3), expected)


def test_missing_shards_are_reported_before_iterating(tmp_path):
    with refused("no-shards-there", "data.shards"):
        stream_of(tmp_path)


def worker_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_workers_ignore_signals_and_end_at_once_when_closed(small_set):
    before = set(worker_processes())
    stream = stream_of(small_set, workers=2)
    next(stream), next(stream)  # one of each worker: both are at work
    workers = [child for child in worker_processes() if child not in before]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGINT)
    found = [next(stream).image_index[0].item() for _ in range(30)]
    assert found == list(range(8, 128, 4))
    stream.close()
    assert not psutil.wait_procs(workers, timeout=60)[1]


PROGRAM = """
import multiprocessing, sys, time
from pathlib import Path
from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.stream import open_stream

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    config = DataConfig(shards=sys.argv[1], crop=64, workers=int(sys.argv[3]))
    stream = open_stream(config, seed=0, first_image=0, last_image=None,
                         batch_size=4, micro_batch_size=4, rank=0, world_size=1)
    next(stream)
    Path("ready").touch()
    while not Path("leave").exists():
        time.sleep(0.01)
"""


@pytest.fixture
def program(small_set, fork_server, tmp_path):
    """A program with workers that waits for the file `leave` and then leaves without closing its stream."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def start(method: str, workers: int) -> tuple[Forked, list[psutil.Process]]:
        process = fork_server.start("program", [str(small_set), method, str(workers)], cwd=tmp_path, env=os.environ)
        started.append(process)
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        return process, psutil.Process(process.pid).children(recursive=True)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.launch
def test_workers_end_when_their_parent_is_killed(program):
    process, workers = program("fork", workers=2)
    assert len(workers) == 2
    process.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.launch
def test_a_program_leaves_promptly_without_closing(program, tmp_path):
    process, workers = program("forkserver", workers=1)  # each of a fork server imports all
    (tmp_path / "leave").touch()
    assert process.wait(300) == 0
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.launch
def test_stages_can_be_sent_to_other_processes(small_set):
    config = DataConfig(shards=str(small_set), crop=64)
    pipeline = wds.DataPipeline(
        CropSource(config, load_mixture(config), 0, range(0, 8, 4), 4),
        wds.batched(4, collation_fn=collate, partial=False),
        pass_errors,
    )
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (remote,) = pool.map(list, [pickle.loads(pickle.dumps(pipeline))])
    assert [batch.keys for batch in remote] == [batch.keys for batch in stream_of(small_set, last=8)]


@pytest.mark.gpu
def test_batches_are_pinned_where_there_is_cuda(small_set):
    batch = next(stream_of(small_set))
    assert batch.images.is_pinned() and batch.image_index.is_pinned()


def test_batches_can_be_pinned(small_set, monkeypatch):
    batch = next(stream_of(small_set))
    assert not batch.images.is_pinned()
    with pytest.raises(RuntimeError, match="accelerator"):
        batch.pin_memory()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # there is no such memory here
    pinned, error = (
        pin_memory(batch),
        UserError("no-image", "", "no image"),
    )  # as torch's loader does with what comes from a worker
    assert pinned.images.data_ptr() != batch.images.data_ptr() and torch.equal(pinned.images, batch.images)
    assert torch.equal(pinned.image_index, batch.image_index)
    assert (pinned.keys, pinned.upscaled, pinned.corrupt) == (batch.keys, batch.upscaled, batch.corrupt)
    assert pin_memory(error) is error


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalStorage, "OPEN_FILES", 3)
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 9)
    storage = LocalStorage(tmp_path)
    before = psutil.Process().num_fds()
    for number in [0, 5, 9, 0, 1, 2, 3, 0, 7, 0]:
        assert storage.read(str(number), 2, 5) == bytes([number]) * 3
        assert psutil.Process().num_fds() <= before + 3
    storage.close()
    assert psutil.Process().num_fds() == before


def test_an_image_set_is_a_folder_in_order_of_name(photo_folder, packaged_photos, tmp_path):
    images = ImageSet(photo_folder)
    assert len(images) == 23 and images.names == sorted(images.names)
    first = images.load(0)
    assert first.dtype == torch.uint8 and first.shape == (3, 250, 90)
    assert (first.permute(1, 2, 0).numpy() == np.asarray(Image.open(photo_folder / images.names[0]))).all()
    assert ImageSet(photo_folder, limit=5).names == images.names[:5]
    with refused("no-image-folder", "eval.images"):
        ImageSet(tmp_path / "nowhere")
    with refused("no-files"):
        ImageSet(tmp_path)
    (tmp_path / "broken.png").write_bytes(packaged_photos[0].read_bytes()[:5000])
    with refused("broken-image"):
        ImageSet(tmp_path).load(0)


def test_kodak(image_folder):
    images = ImageSet(image_folder)
    assert images.names == [f"kodim{number:02d}.png" for number in range(1, 25)]
    assert images.load(0).shape == (3, 512, 768)


def test_the_thread_that_pins_batches_ends_before_the_workers_it_reads_from(small_set, monkeypatch):
    """With a device that pins nothing: what is left is torch's thread, amid whose reading the workers went away."""
    monkeypatch.setattr("hpcm_scale.data.stream.device_kind", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    for _ in range(5):
        stream = stream_of(small_set, workers=2)
        next(stream)
        assert any(thread.name.endswith("(_pin_memory_loop)") for thread in threading.enumerate())
        stream.close()
        assert not errors, errors[0].exc_value


def test_workers_that_cannot_be_started_are_ended():
    """What kept them from it, a Ctrl-C for example, is not buried under another error."""

    class Loader:
        def __iter__(self):
            raise KeyboardInterrupt

    here, there = multiprocessing.Pipe(duplex=False)
    with pytest.raises(KeyboardInterrupt):
        next(deliver(Loader(), there))
    assert here.poll()
