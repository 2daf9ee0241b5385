"""`hpcm import` and `hpcm export`: what they print, and one line with exit code 2 for a wrong or hostile file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.model.public_checkpoints import export_state, published_config
from hpcm_scale.model.weights import load_weights, save_weights


def published(preset: str) -> dict[str, torch.Tensor]:
    """A state dict as the authors' training left it, without channel scales; each parameter is one number."""
    config = published_config(preset)
    state = export_state(on_meta(config).state_dict(), config)
    return {
        name: torch.full((1,), float(number)).expand(tensor.shape) if tensor.is_meta else tensor
        for number, (name, tensor) in enumerate(state.items())
        if not name.startswith("adaptive_params_list.")
    }


@pytest.mark.launch
def test_a_published_file(run, tmp_path):
    source, weights, exported = (tmp_path / name for name in ("phi.pth.tar", "w.safetensors", "again.pth.tar"))
    public = published("64m_phi")
    torch.save(public, source)
    code, out, err = run("import", source, "--preset", "64m_phi", "--out", weights)
    assert code == 0, err
    assert out.splitlines() == [
        f"{weights}: 64m_phi, 63,582,419 parameters, from HPCM_Base_PhiContext of github.com/lyq133/LIC-HPCM, "
        "phi.pth.tar",
        "it has no adaptive_params_list: these channel scales are ones, as in the authors' training",
    ]
    model, facts = load_weights(weights)
    assert facts["lmbda"] is None and facts["step"] is None
    assert all(torch.equal(q.weight, torch.ones_like(q.weight)) for q in model.context.q)
    code, out, err = run("export", weights, "--out", exported)
    assert code == 0, err
    assert out == f"{exported}: HPCM_Base_PhiContext of github.com/lyq133/LIC-HPCM, 63,582,419 parameters\n"
    again = torch.load(exported, weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in public.items())
    for path in (weights, exported):
        path.unlink()  # 250 MB each


class Trap:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("format", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code(format, run, tmp_path):
    source, sprung = tmp_path / "hostile.pth.tar", tmp_path / "sprung"
    state = published("68m") | {"means_hyper": Trap(sprung)}
    if format == "plain pickle":
        source.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    else:
        torch.save({"state_dict": state}, source, _use_new_zipfile_serialization=format == "zip")
    code, out, err = run("import", source, "--preset", "68m", "--out", tmp_path / "w.safetensors")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"{source} refers to {os.mkdir.__module__}.mkdir, but only tensors" in err
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pth.tar"]
    if format == "plain pickle":
        pickle.loads(source.read_bytes())
    else:
        torch.load(source, weights_only=False)
    assert sprung.is_dir()  # the trap was a real one


@pytest.mark.parametrize(
    "case",
    ["no file", "folder", "damaged", "cut", "other preset", "lacks", "unknown preset", "λ", "out"],
)
def test_import_refuses_in_one_line(case, run, tmp_path):
    source, large, lacking, cut, damaged = (
        tmp_path / name for name in ("a.pth.tar", "large.pth.tar", "lacking.pth.tar", "cut.pth.tar", "damaged.pth.tar")
    )
    state = published("68m")
    torch.save(state, source)
    torch.save(published("90m"), large)
    torch.save({name: tensor for name, tensor in state.items() if name != "means_hyper"}, lacking)
    cut.write_bytes(source.read_bytes()[:-1000])
    damaged.write_bytes(b"\x89PNG\r\n" + bytes(1000))
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    change, message = {
        "no file": ({"": tmp_path / "nowhere"}, f"there is no checkpoint at {tmp_path / 'nowhere'}; give a .pth.tar"),
        "folder": ({"": tmp_path / "folder"}, f"there is no checkpoint at {tmp_path / 'folder'}"),
        "damaged": ({"": damaged}, f"{damaged} is damaged or not a PyTorch checkpoint; download it again"),
        "cut": ({"": cut}, f"{cut} is damaged or not a PyTorch checkpoint"),
        "other preset": ({"": large}, "this is HPCM_Large, not HPCM_Base; give --preset 90m"),
        "lacks": ({"": lacking}, "does not fit HPCM_Base: it lacks means_hyper; give a published one"),
        "unknown preset": ({"--preset": "nano"}, "argument --preset: invalid choice: 'nano'"),
        "λ": ({"--lmbda": "nan"}, "--lmbda: nan must be at least 1e-09"),
        "out": ({"--out": tmp_path / "folder"}, "is a folder; give a file"),
    }[case]
    arguments = {"": source, "--preset": "68m", "--out": tmp_path / "w.safetensors"} | change
    code, out, err = run("import", *(part for pair in arguments.items() for part in pair if part != ""))
    assert code == 2
    assert err.startswith("hpcm: ") and message in err and err.count("\n") == 1 and out == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", ["no weights", "own structure", "out"])
def test_export_refuses_in_one_line(case, run, tmp_path):
    model = HPCM(compose_model("nano"))
    weights, out_file = tmp_path / "w.safetensors", tmp_path / "a.pth.tar"
    save_weights(weights, model.state_dict(), model.config, {"lmbda": 0.013})
    arguments, message = {
        "no weights": ((tmp_path / "nowhere", "--out", out_file), "there are no weights at"),
        "own structure": ((weights, "--out", out_file), "the public implementation has no model with the structure of"),
        "out": ((weights, "--out", tmp_path), "is a folder; give a file"),
    }[case]
    code, out, err = run("export", *arguments)
    assert code == 2
    assert err.startswith("hpcm: ") and message in err and err.count("\n") == 1 and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
