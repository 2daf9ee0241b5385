"""Sizes by rule: of every family, from 0.1 million to 10 billion parameters."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from hpcm_scale.commands import models
from hpcm_scale.config.checks import check_model
from hpcm_scale.config.compose import check_overrides, compose_model
from hpcm_scale.config.schema import Fusion, ModelConfig, RateConfig
from hpcm_scale.errors import UserError
from hpcm_scale.model import families
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.ladder import WITHIN, compose_sized, parameters_of, size_name, sized
from hpcm_scale.model.parameters import on_meta, parameter_count

SIZES = ["100k", "300k", "1m", "3m", "10m", "30m", "100m", "300m", "1b", "10b"]
DEPTHS = ("g_a_blocks", "g_s_blocks", "hyper_blocks", "adaptor_blocks", "prior_s1_s2", "prior_s3")


def _params(sizes: list[str], prefix: str = "", marks: tuple[pytest.MarkDecorator, ...] = ()) -> list:
    return [pytest.param((family, sizes), marks=marks, id=f"{prefix}{family}") for family in families.names()]


@pytest.fixture(scope="module", params=[*_params(SIZES[::2]), *_params(SIZES, "whole ", (pytest.mark.long,))])
def ladder(request) -> dict[str, ModelConfig]:
    """A family's sizes, every other one or all."""
    family, sizes = request.param
    return {size: sized(ModelConfig(family=family, size=size)) for size in sizes}


def test_every_size_is_met_and_can_be_built(ladder):
    for size, model in ladder.items():
        asked = parameters_of(size)
        assert parameter_count(on_meta(model)) == pytest.approx(asked, rel=WITHIN)
        check_model(model)
        families.check(model)
        assert (model.name, model.size) == (f"{model.family}_{size}", None)


def test_widths_and_depths_grow_with_the_size(ladder):
    """Depths from the base on alone, and then evenly; no width without the others."""
    base = families.family(ladder["1m"].family).base
    models = list(ladder.values())
    for smaller, larger in pairwise(models):
        assert smaller.latent_channels < larger.latent_channels
        assert sum(smaller.channels) < sum(larger.channels)
        assert all(sum(getattr(smaller, key)) <= sum(getattr(larger, key)) for key in DEPTHS[:4])
    for size in ladder.keys() & SIZES[:6]:
        assert all(getattr(ladder[size], key) == getattr(base, key) for key in DEPTHS)
    for size in ladder.keys() & SIZES[5:]:  # in proportion, but for rounding
        model = ladder[size]
        factor = model.latent_channels / base.latent_channels
        step = families.family(model.family).multiple
        assert model.channels == pytest.approx([factor * channels for channels in base.channels], rel=0.15, abs=step)
        assert model.hyper_channels == pytest.approx(factor * base.hyper_channels, rel=0.25)
    deeper = [sum(ladder[size].g_a_blocks) / sum(base.g_a_blocks) for size in ("100m", "1b", "10b") if size in ladder]
    for less, more in pairwise(deeper):
        assert more / less == pytest.approx(10**0.5, rel=0.15)


def test_wide_channels_suit_the_blocks(ladder):
    for model in ladder.values():
        assert model.latent_channels % 8 == 0
        assert all(width % 8 == 0 for width in (model.hyper_channels, model.hyper_latent_channels) if width > 64)
        assert all(width % families.family(model.family).multiple == 0 for width in model.channels if width > 64)
        assert 10 <= 2 * model.latent_channels / model.attention_heads <= 40


def test_the_count_of_the_base_gives_the_base():
    model, base = sized(ModelConfig(size="68505299")), compose_model("68m")
    assert model.name == "hpcm_68.505299m"
    base.name = model.name
    assert model == base


@pytest.mark.parametrize("name", ["swin_250m", "swin_500m"])
def test_presets_of_swin_are_its_rule(name):
    """0.25 and 0.5 billion parameters within 1 %."""
    preset = compose_model(name)
    assert preset == sized(ModelConfig(family="swin", size=name.removeprefix("swin_")))
    assert parameter_count(on_meta(preset)) == pytest.approx(parameters_of(name.removeprefix("swin_")), rel=0.01)


@pytest.mark.launch
def test_what_is_no_width_or_depth_stays():
    rate = RateConfig(levels=8)
    given = ModelConfig(family="swin", size="1m", fusion=Fusion.none, rate=rate, options={"window": 4})
    model = sized(given)
    assert (model.fusion, model.rate, model.options) == (Fusion.none, rate, {"window": 4})
    assert model.channels != given.channels == ModelConfig().channels and given.size == "1m"
    assert parameter_count(on_meta(model)) == pytest.approx(1e6, rel=WITHIN)
    assert sized(model) is model  # it names no size any more


def test_the_smallest_trains_for_real(ladder):
    """Its exact count is that of tensors in memory, too, and a gradient reaches every one of them."""
    model = HPCM(ladder["100k"])
    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    coded = model(x)
    (coded.bits_y.sum() + coded.bits_z.sum() + coded.x_hat.square().sum()).backward()
    assert parameter_count(model) == pytest.approx(1e5, rel=WITHIN)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("100k", 10**5),
        ("0.3m", 3 * 10**5),
        ("30M", 3 * 10**7),
        ("1.5b", 1_500_000_000),
        ("10B", 10**10),
        ("2e6", 2 * 10**6),
    ],
)
def test_sizes_are_read_and_written(text, count):
    assert parameters_of(text) == count
    assert parameters_of(size_name(count)) == count


@pytest.mark.parametrize(
    ("given", "code", "reason"),
    [
        ({"size": "99k"}, "size-out-of-range", "model.size=99k must lie between 100k and 10b parameters"),
        ({"size": "11b"}, "size-out-of-range", "model.size=11b"),
        ({"size": "nan"}, "size-out-of-range", "model.size=nan"),
        ({"size": "big"}, "malformed-size", "model.size=big"),
        ({"size": ""}, "malformed-size", "model.size="),
        ({"size": "1m", "family": "resnet"}, "unknown-family", "model.family=resnet"),
        ({"size": "1m", "options": {"window": 4}}, "unknown-option", "model.options.window"),
        ({"size": "1m", "partial_ratio": 0}, None, "model.partial_ratio=0"),
        ({"size": "100k", "expansion": 64}, "unreachable-size", "model.size=100k"),
    ],
)
def test_an_impossible_size_is_refused_in_one_sentence(given, code, reason):
    with pytest.raises(UserError, match=reason) as refused:
        sized(ModelConfig(**given))
    assert code in (None, refused.value.code) and "\n" not in str(refused.value)


def test_other_keys_follow_from_the_widths_of_a_size():
    """And not from those that were there before the rule."""
    follow = ["run.dir='runs/${model.name}'", "model=hpcm", "model.size=300k", "train.steps=${model.channels.1}"]
    config = compose_sized(follow)
    assert (config.run.dir, config.train.steps) == ("runs/hpcm_300k", config.model.channels[1])
    check_overrides(["+model.options.window=4"])
    assert compose_sized([*follow[1:], "model.family=swin", "+model.options.window=4"]).model.options == {"window": 4}


@pytest.mark.parametrize("preset", ["68m", "swin_250m"])
def test_a_size_does_not_replace_a_preset_in_silence(preset):
    family = compose_model(preset).family
    with pytest.raises(UserError) as refused:
        compose_sized([f"model={preset}", "model.size=300k"])
    reported = str(refused.value)
    assert reported.startswith(
        f"model={preset} has widths and depths of its own, and model.size=300k would replace them"
    )
    [remedy] = re.findall(r"use (model=\w+ model\.size=300k)", reported)
    assert remedy == f"model={family} model.size=300k" and compose_sized(remedy.split()).model.name == f"{family}_300k"


@pytest.mark.parametrize("key", ["channels=[8,16,32]", "latent_channels=64", "prior_s3.before=1", "attention_heads=4"])
def test_a_size_does_not_replace_widths_and_depths_in_silence(key):
    name = key.split("=")[0].split(".")[0]
    with pytest.raises(UserError) as refused:
        compose_sized(["model=hpcm", "model.size=300k", f"model.{key}"])
    assert (refused.value.code, refused.value.key) == ("size-and-shape", f"model.{name}")


def test_a_size_that_is_none_yet_is_never_trained():
    """Its widths are those of another."""
    with pytest.raises(UserError, match=r"model\.size=30m has not been resolved to widths and depths"):
        check_model(compose_model("hpcm"))


@pytest.mark.launch
def test_the_table_has_them(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    for arguments, there in {
        ("--family", "convnext"): ["convnext_30m", "2 2 6 2", "s1 s2"],
        ("--size", "3m,100k"): ["hpcm_100k", "hpcm_3m", "c1 c2 c3", "2 2 4 0", "3+2"],
    }.items():
        monkeypatch.setattr("sys.argv", ["hpcm models", *arguments])
        models.main()
        text = capsys.readouterr().out
        assert all(part in text for part in there) and "…" not in text and "68m" not in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
