"""Secrets in URLs and commands are refused without being repeated, and hidden wherever such text is reported."""

from __future__ import annotations

import os

import pytest

from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose
from hpcm_scale.data.index import load_index
from hpcm_scale.errors import UserError
from hpcm_scale.files import without_secrets

SECRET = "hunter2secret"
WITH = [
    f"https://user:{SECRET}@host/photos",
    f"ftp://user:{SECRET}@host/photos",
    f"s3://AKIA0:{SECRET}@bucket/photos",
    f"https://{SECRET}@host/photos",
    f"https://user:x{SECRET}@host:8080/photos?v=1",
    f"https://host/photos?X-Amz-Signature={SECRET}",
    f"https://host/photos?v=1&token={SECRET}",
    f"https://host/photos?sig={SECRET}&v=1",
    f"https://host/photos?AWSAccessKeyId={SECRET}",
    f"https://host/photos?access_token={SECRET}",
    f"simplecache::https://user:{SECRET}@host/photos",
    f"pipe:curl https://user:{SECRET}@host/{{}}",
    f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://host/{{}}",
]
WITHOUT = [
    "shards",
    "/data/a:b@c/shards",
    "https://host:8080/photos/a@b?version=3&design=4",
    "sftp://user@host/photos",
    "s3://bucket/photos",
    'pipe:curl -H "Authorization: Bearer $TOKEN" https://host/{}',
    "pipe:curl https://user:$PASSWORD@host/{}",
    "pipe:aws s3 cp s3://bucket/{} -",
]


@pytest.mark.parametrize("location", WITH)
def test_a_secret_is_refused_and_not_repeated(location):
    assert SECRET not in without_secrets(location)
    config = compose(["data.shards=shards", "data.pipe=true", "data.cache=cache"])
    config.data.shards = location
    with pytest.raises(UserError, match=r"^data\.shards holds a password, token or signature.*environment") as caught:
        check(config, 1)
    assert SECRET not in str(caught.value)
    with pytest.raises(UserError) as caught:
        load_index(location)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("location", WITHOUT)
def test_what_holds_no_secret_passes(location):
    assert without_secrets(location) == location
    config = compose(["data.pipe=true", "data.cache=cache"])
    config.data.shards = location
    check(config, 1)


@pytest.mark.launch
@pytest.mark.parametrize("several", [[], ["-m"]], ids=["run", "sweep"])
@pytest.mark.parametrize(
    "override", [f"data.shards='{WITH[0]}'", f"data.shard='{WITH[6]}'"], ids=["known key", "unknown key"]
)
def test_a_training_command_with_a_secret_writes_and_tells_nothing(tmp_path, fork_server, override, several):
    """Even where a later override would take its place."""
    command = [*several, "model=nano", override, "data.shards=shards"]
    process = fork_server.start("hpcm_scale.train", command, cwd=tmp_path, env=os.environ)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 2 and output == "" and errors.count("\n") == 1
    assert "holds a password, token or signature" in errors and SECRET not in errors
    assert list(tmp_path.iterdir()) == []
