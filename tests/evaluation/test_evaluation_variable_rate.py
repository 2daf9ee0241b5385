"""Curves of variable-rate weights: one file, a point per quality, beside curves of other weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from hpcm_scale.coding.codec import Codec
from hpcm_scale.commands.evaluate import main
from hpcm_scale.config.schema import RateConfig
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.curves import model_curve, read_weights
from hpcm_scale.evaluation.points import find_curves
from hpcm_scale.model.weights import load_weights

CPU = torch.device("cpu")
RATE = RateConfig(levels=3, lowest=0.001, highest=0.1, reference=0.01)


@pytest.fixture(scope="module")
def images(small_images) -> ImageSet:
    """Two of a few thousand pixels."""
    return ImageSet(small_images.folder, limit=2)


@pytest.fixture(scope="module")
def weights(save_untrained) -> str:
    return save_untrained("variable", rate=RATE)


@pytest.mark.launch
def test_one_file_makes_a_curve(weights, images):
    """Real files: a point for every level that was learned, at the λ of that level."""
    curve = model_curve(read_weights([weights])[0], images, device=CPU, estimate=False)
    assert curve.name == "hpcm nano variable"
    assert "variable rate with 3 levels, λ = 0.001 to 0.1" in curve.codec
    assert [point.setting for point in curve.points] == ["quality 0", "quality 50", "quality 100"]
    assert [point.facts["lmbda"] for point in curve.points] == [
        0.001,
        pytest.approx(0.001 * 100 ** (128 / 255)),
        pytest.approx(0.1),
    ]
    codec = Codec(load_weights(weights)[0])
    for point, level in zip(curve.points, (0, 128, 255), strict=True):
        sizes = [len(codec.compress(images.load(i), level)) for i in range(len(images))]
        assert [image.bits for image in point.images] == [8 * size for size in sizes]
        assert point.weights == weights and point.kmac_per_pixel == curve.points[0].kmac_per_pixel


@pytest.mark.launch
def test_estimates_are_near_the_files_of_the_same_quality(weights, images):
    files, estimates = (
        model_curve(read_weights([weights], [30, 80.5])[0], images, device=CPU, estimate=estimate).points
        for estimate in (False, True)
    )
    assert (
        [point.setting for point in files] == [point.setting for point in estimates] == ["quality 30", "quality 80.4"]
    )
    for coded, estimated in zip(files, estimates, strict=True):
        assert coded.mean["bpp"] == pytest.approx(estimated.mean["bpp"], rel=0.05)  # untrained
        assert coded.mean["psnr"] == pytest.approx(estimated.mean["psnr"], abs=0.01)
        for image in estimated.images:
            assert image.loss == pytest.approx(estimated.facts["lmbda"] * 255**2 * image.mse + image.bpp, rel=1e-5)


def test_curves_side_by_side(weights, save_untrained):
    """Weights of one rate and of several, of one preset; and any that are given names."""
    fixed = [save_untrained(f"beside{lmbda}", lmbda=lmbda) for lmbda in (0.01, 0.02)]
    groups = read_weights([*fixed, weights])
    assert [group[0].curve for group in groups] == ["hpcm nano", "hpcm nano variable"]
    assert [[weights.path for weights in group] for group in groups] == [fixed, [weights]]
    other = save_untrained("other variable", rate=RATE, seed=1)
    named = [f"for people={weights}", f"for machines={other}", *(f"one rate={path}" for path in fixed)]
    groups = read_weights(named)
    assert [group[0].curve for group in groups] == ["for people", "for machines", "one rate"]
    assert [[weights.path for weights in group] for group in groups] == [[weights], [other], fixed]


def test_a_path_may_have_an_equals_sign(save_untrained, monkeypatch):
    path = Path(save_untrained("lmbda=0.5"))
    monkeypatch.chdir(path.parent)
    for name in (str(path), path.name):
        ((found,),) = read_weights([name])
        assert (found.path, found.curve) == (name, "hpcm nano")
    ((found,),) = read_weights([f"mine={path.name}"])
    assert (found.path, found.curve) == (path.name, "mine")


def test_curves_that_mean_nothing_are_refused(weights, save_untrained):
    other, fixed = save_untrained("second variable", rate=RATE, seed=1), save_untrained("fixed")
    for names, qualities, code in (
        ([weights, other], None, "weights-of-two-curves"),
        ([f"a={weights}", f"a={fixed}"], None, "weights-of-two-curves"),
        ([weights, f"{weights}"], None, "duplicate-weights"),
        ([fixed], [50], "qualities-at-fixed-rate"),
    ):
        with pytest.raises(UserError) as error:
            read_weights(names, qualities)
        assert error.value.code == code
    with pytest.raises(UserError, match="nowhere"):
        read_weights(["a=nowhere.safetensors"])


@pytest.mark.launch
def test_the_command(weights, save_untrained, small_images, tmp_path, monkeypatch, capsys):
    """What it writes is what `hpcm bd-rate` reads."""
    names = [f"ours={weights}", save_untrained("beside")]
    command = ["evaluate", "--images", small_images.folder, "--estimate", "--device", "cpu", "--limit", 1, "--weights"]
    options = ["--qualities", 0, 20.0, 60, "--out", tmp_path, "--visual", 0]
    monkeypatch.setattr(sys, "argv", [*map(str, [*command, *names, *options])])
    main()
    assert "quality 20" in capsys.readouterr().out
    written = json.loads((tmp_path / "evaluation.json").read_text())["curves"]
    assert [[point["setting"] for point in curve["points"]] for curve in written] == [
        ["quality 0", "quality 20", "quality 60"],
        ["λ = 0.013"],
    ]
    assert [(curve.name, len(curve.bpp)) for curve in find_curves(str(tmp_path))] == [("ours", 3), ("hpcm nano", 1)]
    monkeypatch.setattr(sys, "argv", [*map(str, [*command, *names, "--qualities", 101])])
    with pytest.raises(SystemExit) as end:
        main()
    assert (
        end.value.code == 2
        and capsys.readouterr().err
        == "hpcm: argument --qualities: 101 must be at least 0 and at most 100; see hpcm evaluate --help\n"
    )
