"""`hpcm scaling publish --watch`: fits while runs train."""

from __future__ import annotations

import pytest

from hpcm_scale.commands.scaling import main
from hpcm_scale.errors import UserError
from hpcm_scale.scaling.analysis import read_laws
from hpcm_scale.sweeps import watch


@pytest.fixture
def sweep(make_run, tmp_path):
    """Two runs, the second with one step left."""
    for name, done in (("nano", 10), ("micro", 9)):
        make_run(f"sweep/{name}", done, f"model={name}", "run.sweep=sweep", evaluate=1)
    return tmp_path / "sweep"


def test_runs_are_fitted_anew_until_all_are_finished(sweep, make_run, tmp_path, monkeypatch):
    published = []

    def finish(seconds: float) -> None:
        assert seconds == 60 * watch.MINUTES and len(published) == 1
        (sweep / "micro" / "metrics.jsonl").write_text((sweep / "nano" / "metrics.jsonl").read_text())

    monkeypatch.setattr(watch.time, "sleep", finish)

    def publish(folder, mode, forecasts) -> str:
        assert mode == "offline" and forecasts == []  # too few lines
        published.append(sorted(point.images for point in read_laws(folder).observations))
        return ""

    monkeypatch.setattr(watch, "publish", publish)
    watch.publish_while_training([sweep], tmp_path / "laws", mode="offline")
    assert published == [[36, 40], [40, 40]]


def test_what_cannot_be_published_is_a_message_while_runs_train(sweep, tmp_path, monkeypatch, capsys):
    refusal = UserError("no-common-group", "--group", "the runs have no common sweep")

    def publish(folder, forecasts) -> str:
        raise refusal

    def finish(seconds: float) -> None:
        (sweep / "micro" / "metrics.jsonl").write_text((sweep / "nano" / "metrics.jsonl").read_text())

    monkeypatch.setattr(watch.time, "sleep", finish)
    monkeypatch.setattr(watch, "publish", publish)
    with pytest.raises(UserError) as raised:
        watch.publish_while_training([sweep], tmp_path / "laws")
    assert raised.value is refusal
    assert capsys.readouterr().err == "hpcm: the runs have no common sweep; the next attempt is in 5 minutes\n"


@pytest.mark.launch
def test_the_command_replaces_the_run_of_wandb(sweep, tmp_path, capsys):
    (sweep / "micro" / "metrics.jsonl").write_text((sweep / "nano" / "metrics.jsonl").read_text())
    for _ in range(2):
        main(["publish", str(tmp_path / "laws"), "--watch", str(sweep)])
        assert "group sweep" in capsys.readouterr().out
    assert len(list((tmp_path / "laws" / "wandb").glob("offline-run-*"))) == 1
