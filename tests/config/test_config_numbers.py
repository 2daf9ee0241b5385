"""Every number of a configuration has a range: what lies outside is refused in one sentence, and nothing else fails."""

from __future__ import annotations

import faulthandler
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from datetime import timedelta
from operator import attrgetter
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from hpcm_scale.config.checks import check, check_pre_editor
from hpcm_scale.config.compose import compose, from_yaml, model_from_dict, to_dict
from hpcm_scale.config.deepspeed import ZERO_SIZES
from hpcm_scale.config.schema import AVERAGE, Config, PreEditorConfig
from hpcm_scale.config.sweeps import DeepSpeedOptions, SlurmOptions
from hpcm_scale.data.mixture import random_words
from hpcm_scale.errors import UserError
from hpcm_scale.limits import Range, entries
from hpcm_scale.model import families
from hpcm_scale.scaling.plan import Setting
from hpcm_scale.training.ema import exponent
from hpcm_scale.training.task import image_levels

NASTY = [
    math.nan,
    math.inf,
    -math.inf,
    0,
    -0.0,
    -1,
    1,
    1.5,
    5e-324,
    1e308,
    -1e308,
    1e30,
    10**12,
    2**63,
    2**70,
    10**5000,
]
KINDS = [Config, DeepSpeedOptions, SlurmOptions, Setting, *(families.family(name).options for name in families.names())]


def numbers(kind: type, prefix: str = "") -> Iterator[tuple[str, Range | None]]:
    """Every key of a dataclass that holds numbers, and its range."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        key, hint = f"{prefix}{entry.name}", hints[entry.name]
        if is_dataclass(hint):
            yield from numbers(hint, f"{key}.")
        elif re.search(r"\b(int|float)\b", str(hint)):
            yield key, entry.metadata.get("allowed")


KEYS = dict(numbers(Config))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_number_has_a_range_between_two_finite_ends(kind):
    for key, allowed in numbers(kind):
        assert allowed is not None, f"{key} has no range: write {key.rpartition('.')[2]}: … = number(default, Range(…))"
        assert max(allowed.least, allowed.above) > -math.inf and min(allowed.most, allowed.below) < math.inf, key
        assert math.nan not in allowed
        default = attrgetter(key)(kind())
        allowed.check(key, default)


def test_the_walk_finds_them():
    assert len(KEYS) > 60
    assert {"train.steps", "machine.layers", "model.prior_s3.refine", "schedule.factors", "eval.limit"} <= KEYS.keys()


def holding(key: str, value: object) -> Config:
    """The defaults with a number set, or in place of the first entry of a list or dictionary."""
    config = Config()
    parent, _, name = key.rpartition(".")
    owner = attrgetter(parent)(config)
    before: Any = getattr(owner, name)
    held = {"a/b": value} if isinstance(before, dict) else [value, *before[1:]] if isinstance(before, list) else value
    setattr(owner, name, held)
    return config


def refusal(key: str, value: object) -> str | None:
    """What a number is refused for; None if it is accepted."""
    try:
        check(holding(key, value), 1)
    except UserError as refused:
        return str(refused)
    return None


@pytest.mark.parametrize("key", KEYS)
def test_a_number_is_in_its_range_or_refused_by_name(key):
    """What a range allows may still be refused because of another key."""
    allowed = KEYS[key]
    ends = [end for end in (allowed.least, allowed.above, allowed.most, allowed.below) if math.isfinite(end)]
    near = [math.nextafter(end, towards) for end in ends for towards in (math.inf, -math.inf)]
    for value in (*NASTY, *ends, *near):
        reported = refusal(key, value)
        assert reported is None or ("\n" not in reported and len(reported) < 300)
        if value not in allowed:
            range_named = rf"^{re.escape(key)}=.* must be {re.escape(str(allowed))}(, each)?$"
            assert reported and re.match(range_named, reported), f"{key}={value}: {reported}"


@pytest.mark.parametrize("text", ["nan", "true", "9" * 400, "9" * 5000], ids=["nan", "true", "400 digits", "5000"])
@pytest.mark.parametrize("key", ["train.steps", "schedule.learning_rate", "schedule.factors", "machine.layers"])
def test_what_is_typed_is_read_or_refused_in_one_sentence(key, text):
    """Through Hydra: words, truth values, and integers that no float can hold or Python does not write."""
    hint = str(type(attrgetter(key)(Config())))
    plus = "+" if "dict" in hint else ""
    typed = f"{{a/b: {text}}}" if "dict" in hint else f"[{text}]" if "list" in hint else text
    with pytest.raises(UserError) as refused:
        check(compose([f"{plus}{key}={typed}"]), 1)
    reported = str(refused.value)
    assert key in reported and "\n" not in reported and len(reported) < 300, reported


LISTS = [key for key, value, _ in entries(Config()) if isinstance(value, list)]


@pytest.mark.parametrize("key", LISTS)
def test_a_list_holds_no_lists(key, tmp_path):
    """OmegaConf lets them pass; on the command line, in a run's config.yaml and in weights."""
    for text in ("[[1]]", "[{a: 1}]"):
        with pytest.raises(UserError, match=rf"^{re.escape(key)}=\[.* must have no lists or dictionaries in it$"):
            compose([f"{key}={text}"])
    file = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.from_dotlist([f"{key}=[[1]]"]), file)
    with pytest.raises(UserError, match=rf"config\.yaml is not a configuration of this version \({re.escape(key)}="):
        from_yaml(file)


def test_a_dictionary_of_numbers_and_the_lists_of_weights_hold_no_lists():
    with pytest.raises(UserError, match=r"^machine\.layers=.* must have no lists or dictionaries in it$"):
        compose(["+machine.layers={a/b: [1]}"])
    values = to_dict(Config().model) | {"channels": [96, [192], 384]}
    with pytest.raises(UserError, match=r"channels=\[96, \[192\], 384\] must have no lists"):
        model_from_dict(values)


@pytest.mark.parametrize("options", ["a=nan", "a.b=1e400", "a.b.c=[1,-inf]", f"zero_optimization.some_size={'9' * 40}"])
def test_numbers_of_deepspeeds_own_options_are_finite(options):
    key = options.partition("=")[0]
    with pytest.raises(UserError, match=rf"^engine\.options\.{key}\S* must be at least -1e\+30 and at most 1e\+30$"):
        check(compose([f"+engine.options.{options}"]), 1)


@pytest.mark.parametrize("size", sorted(ZERO_SIZES))
def test_sizes_of_zero_are_numbers_of_parameters(size):
    for text, reason in {"-5": "must be at least 0", "abc": "must be a number", "null": "must be a number"}.items():
        with pytest.raises(UserError, match=rf"^engine\.options\.zero_optimization\.{size}=\S+ {reason}"):
            check(compose([f"+engine.options.zero_optimization.{size}={text}"]), 1)
    with pytest.raises(UserError, match="zero_optimization=3 must be a dictionary"):
        check(compose(["+engine.options.zero_optimization=3"]), 1)


@pytest.mark.parametrize(
    ("family", "option"),
    [("swin", "window"), ("swin", "hyper_window"), ("swin", "head_channels"), ("convnext", "kernel")],
)
def test_numbers_of_a_familys_options(family, option):
    for value in (0, -1, 10**12, 2**70):
        config = compose([f"model={family}", f"+model.options.{option}={value}"]).model
        with pytest.raises(UserError, match=rf"^model\.options\.{option}={value} must be at least"):
            families.options_of(config)


def test_numbers_of_the_pre_editor():
    for editor in (PreEditorConfig(blocks=-1), PreEditorConfig(blocks=10**9), PreEditorConfig(channels=[4, 4, 3])):
        with pytest.raises(UserError, match=r"^machine\.pre_editor\.\w+=.* must be at least"):
            check_pre_editor(editor)


def test_more_pixels_than_a_forward_pass_can_hold():
    text = r"1,000,000 images with data.crop=256 are more than 10,000,000,000 pixels.*train.micro_batch_size"
    with pytest.raises(UserError, match=text):
        check(compose(["train.batch_size=1000000"]), 1)
    check(compose(["train.batch_size=1000000"]), 1_000_000)
    check(compose(["train.batch_size=1000000", "train.micro_batch_size=8"]), 1)


def test_times_fit_whatever_waits():
    for key, seconds in {"train.watchdog_timeout": 60, "engine.init_timeout": 60, "train.max_hours": 3600}.items():
        longest = seconds * KEYS[key].most
        assert longest < threading.TIMEOUT_MAX
        assert timedelta(seconds=longest + 300).total_seconds() * 1000 < 2**63
        faulthandler.dump_traceback_later(longest + 50)
        faulthandler.cancel_dump_traceback_later()


def test_seeds_and_lengths_of_averages_at_their_ends():
    seed = KEYS["train.seed"].most
    torch.Generator().manual_seed(seed)
    assert random_words(seed, 0, 0, 0, 2).dtype == np.uint64
    assert image_levels(4, torch.tensor([0, 1]), seed).shape == (2,)
    for length in (AVERAGE.least, math.nextafter(AVERAGE.below, 0)):
        power = exponent(length)
        assert 0 <= power < math.inf
        assert length**2 * (power + 2) ** 2 * (power + 3) == pytest.approx(power + 1, rel=1e-6)
