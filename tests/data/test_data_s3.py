"""Shards in an S3-compatible object store, a real server on this machine; no secret is reported or written anywhere."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import boto3
import pytest
from crops import assert_same, seen
from data_refusals import refused
from moto.server import ThreadedMotoServer
from range_server import RangeServer

from hpcm_scale.data import storage
from hpcm_scale.data.index import load_index
from hpcm_scale.data.storage import RemoteStorage, is_permanent
from hpcm_scale.errors import UserError

pytestmark = pytest.mark.launch

SECRET = "distinctive0secret0of0this0test"


@pytest.fixture(scope="module")
def server(small_set):
    """A bucket with the small set in it; the environment leads there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3")
        client.create_bucket(Bucket="photos")
        for path in small_set.iterdir():
            client.upload_file(str(path), "photos", f"kept/{path.name}")
        yield client
    moto.stop()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "pause", lambda attempt: 0.01)


@pytest.mark.parametrize(("workers", "cached"), [(2, False), (0, True)], ids=["ranges", "cache"])
def test_a_bucket_gives_the_same_as_the_folder(server, small_set, tmp_path, workers, cached):
    found = seen("s3://photos/kept", last=24, workers=workers, cache=str(tmp_path) if cached else None)
    assert_same(found, seen(small_set, last=24))
    assert found.corrupt == []


def test_missing_keys(server, small_set):
    for path in small_set.iterdir():
        server.upload_file(str(path), "photos", f"holes/{path.name}")
    server.delete_object(Bucket="photos", Key="holes/shard-000001.tar")
    found = seen("s3://photos/holes", last=24)
    index = load_index(str(small_set))
    assert {int(index.shard[photo.sample]) for photo in found.corrupt} == {1}
    assert found.corrupt[0].reason.endswith("holes/shard-000001.tar cannot be read: the shard is missing")
    with refused("no-shards-there", "data.shards"):
        load_index("s3://photos/nowhere")


def test_a_store_that_answers_503_is_tried_again_as_often_as_is_asked(server, small_set, tmp_path, monkeypatch):
    """boto and s3fs would each try on their own, several times as often."""
    (tmp_path / "photos").mkdir()
    shutil.copytree(small_set, tmp_path / "photos" / "kept")
    with RangeServer(tmp_path / "photos" / "kept") as flaky:
        monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.url.removesuffix("/photos"))
        flaky.failures["kept/shard-000000.tar"] = 10**6
        storage = RemoteStorage("s3://photos/kept", retries=3, timeout=60)
        with pytest.raises(OSError, match=r"^after 3 tries \(.*503|^after 3 tries \(.*Service Unavailable"):
            storage.read("shard-000000.tar", 0, 10)
        assert flaky.requests["kept/shard-000000.tar"] == 3
        storage.close()


def test_no_credentials_and_no_store_and_no_permission(server, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(UserError, match=r"after 2 tries \(EndpointConnectionError"):
            load_index("s3://photos/kept", retries=2)
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("HOME", str(tmp_path))
        with refused("no-credentials", "data.shards"):
            load_index("s3://photos/kept")


@pytest.mark.parametrize(
    ("code", "status", "lasts"),
    [
        ("AccessDenied", 403, True),
        ("ExpiredToken", 400, True),
        ("SlowDown", 503, False),
        ("RequestTimeout", 400, False),
    ],
)
def test_which_answers_of_s3_last(code, status, lasts):
    """As s3fs raises them."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert is_permanent(translate_boto_error(ClientError(answer, "GetObject"))) == lasts


def test_no_secret_is_reported_or_written(server, tmp_path, capfd):
    """All that a stream leaves behind and says, where it works and where it fails."""
    said = []
    seen("s3://photos/kept", last=24, cache=str(tmp_path / "cache"), workers=1)
    with pytest.raises(UserError, match=r"no shards at s3://nowhere/set; build them") as caught:
        seen("s3://nowhere/set")
    said.append(str(caught.value))
    said.extend(capfd.readouterr())
    said.extend(path.read_text(errors="replace") for path in Path(tmp_path).rglob("*") if path.is_file())
    assert len(said) > 8
    assert not any(SECRET in text for text in said)
