"""Photos that cannot be had while two processes train, and shards in an object store."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from small_training import SMALL

from hpcm_scale.data.index import load_index

pytestmark = pytest.mark.launch

SECRET = "distinctive0secret0of0a0whole0run"
STEPS = 4


@pytest.fixture
def damaged(shards, tmp_path) -> Path:
    """The set with a byte changed in each of three photos."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    index = load_index(str(folder))
    for sample in (2, 5, 7):
        path = folder / index.shards[index.shard[sample]].name
        with path.open("r+b") as shard:
            shard.seek(int(index.offset[sample]) + int(index.length[sample]) // 2)
            byte = shard.read(1)[0]
            shard.seek(-1, 1)
            shard.write(bytes([byte ^ 64]))
    return folder


def options(shards: object, run: str) -> list[str]:
    """Twelve photos, four a step: the third step has seen all."""
    return [*SMALL, "data.workers=1", f"train.steps={STEPS}", f"data.shards={shards}", f"run.dir={run}"]


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_bad_images_are_left_out_counted_and_the_same_for_any_number_of_processes(damaged, launch):
    losses = []
    for processes in (2, 1):
        run = f"bad_{processes}"
        result = launch(*options(damaged, run), processes=processes)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("skipped: sample ") == 3
        lines = journal(launch.folder / run)
        assert lines[-1]["train/bad_photos"] == 3
        losses.append([line["train/loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_too_many_end_all_with_one_error_and_a_checkpoint(damaged, shards, launch):
    command = [*options(damaged, "too_bad"), "data.max_corrupt_samples=2"]
    result = launch(*command)
    assert result.returncode == 2, result.stdout + result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("hpcm: ")]
    assert (
        len(said) == 1 and "3 images are corrupt, more than data.max_corrupt_samples=2 (the first: sample " in said[0]
    )
    assert "Traceback" not in result.stderr
    done = journal(launch.folder / "too_bad")[-1]["step"]
    assert list((launch.folder / "too_bad" / "checkpoints").glob(f"step_*{done}/complete.json"))
    mended = [f"data.shards={shards}" if option.startswith("data.shards") else option for option in command]
    result = launch(*mended)
    assert result.returncode == 0 and f"resuming from step {done}" in result.stdout, result.stdout + result.stderr


def test_a_set_that_is_gone_ends_all_with_one_error(shards, launch, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()
    result = launch(*options(tmp_path / "shards", "gone"))
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("hpcm: ")]
    assert len(said) == 1 and str(tmp_path / "shards") in said[0], result.stdout + result.stderr


def test_credentials_of_an_object_store_are_written_nowhere(shards, launch):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **access)
    client.create_bucket(Bucket="photos")
    for path in shards.iterdir():
        if path.is_file():
            client.upload_file(str(path), "photos", f"set/{path.name}")
    result = launch(
        *options("s3://photos/set", "from_s3"),
        "log.wandb=offline",
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="AKIAEXAMPLE",
        AWS_SECRET_ACCESS_KEY=SECRET,
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    server.stop()
    assert result.returncode == 0, result.stdout + result.stderr
    assert SECRET not in result.stdout + result.stderr
    files = [path for path in (launch.folder / "from_s3").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and len(files) > 8
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
