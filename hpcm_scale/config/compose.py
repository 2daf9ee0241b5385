"""From `conf/` and a command line to a `Config`, by Hydra; Hydra's errors become one sentence."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from hpcm_scale.config.checks import check_model
from hpcm_scale.config.schema import Config, ModelConfig, Start
from hpcm_scale.config.sweeps import LAUNCHERS
from hpcm_scale.errors import UserError
from hpcm_scale.files import check_no_secret
from hpcm_scale.limits import COUNT, Range, abbreviated, entries

CONFIG_NAME = "config"
_OPTIONAL_GROUPS = ("stage", "experiment", "debug")
_OPEN = ("hydra.", "hydra/", "engine.options.", "model.options.")
"""Prefixes of keys that are not fields of a dataclass here."""
_RUNS = Range(least=1, most=10_000)
"""Of a sweep."""
_PROPOSALS = 3
"""Keys that a hint proposes."""
_HINT_CHARACTERS = 160
"""Of the keys of a group in a hint."""
T = TypeVar("T")
ConfigStore.instance().store(name="schema", node=Config)
for _name, _options in LAUNCHERS.items():
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_options, provider="hpcm_scale")
# For values that follow from others, such as a learning rate from a width: ${divide:0.03,${model.channels.1}}
OmegaConf.register_new_resolver("divide", lambda dividend, divisor: dividend / divisor, replace=True)


def _at_horizon(rate: float, images: float, exponent: float, *, _root_: Any) -> float:
    return rate * (_root_.train.steps * _root_.train.batch_size / images) ** -exponent


# A learning rate tuned for so many images, for the length of this run: ${horizon:RATE,IMAGES,EXPONENT}
OmegaConf.register_new_resolver("horizon", _at_horizon, replace=True)


@cache
def config_folder() -> Path:
    """The folder `conf/`: beside the package in a checkout, inside it if installed as a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise UserError("no-conf-folder", "", "the folder conf/ is missing; install hpcm_scale again")


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration of one run, from Hydra overrides such as `model=nano` or `train.steps=80`.

    `model.size` is unchanged; `model.ladder.compose_sized` resolves it. Raises UserError for an unknown key or
    group, or a value of the wrong type.
    """
    return typed(composed(overrides))


def composed(overrides: Sequence[str]) -> DictConfig:
    """Hydra's configuration, with interpolations not yet resolved. Raises UserError for an unknown key or group."""
    check_overrides(overrides)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return translated(lambda: hydra_compose(CONFIG_NAME, list(overrides)))


def typed(config: DictConfig) -> Config:
    """Hydra's configuration as dataclasses. Raises UserError for values of the wrong type."""
    return translated(lambda: _objects(config))


def compose_model(name: str) -> ModelConfig:
    """The preset `conf/model/<name>.yaml`, or a family there with its `size`."""
    return compose([f"model={name}"]).model


def preset_names(group: str) -> list[str]:
    """The names that `group=…` accepts, for example `model`."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


_STORED_MODEL = ModelConfig(start=Start.random)
"""Defaults of keys that a stored configuration lacks."""


def from_yaml(path: str | Path) -> Config:
    """The inverse of `to_yaml`, for example for a run folder's config.yaml.

    Raises UserError if the file is damaged or has keys of another version.
    """
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            "damaged-yaml", "run.dir", f"{path} is not valid YAML; restore it, or choose another run.dir"
        ) from error
    try:
        return _objects(OmegaConf.merge(OmegaConf.structured(Config(model=_STORED_MODEL)), loaded))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(
            "other-version-yaml",
            "run.dir",
            f"{path} is not a configuration of this version ({_one_sentence(error)}); choose another run.dir",
        ) from error


def to_yaml(config: object) -> str:
    """A configuration dataclass as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: object) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values, enums by name."""
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def from_dict(kind: type[T] | T, values: dict[str, Any]) -> T:
    """The inverse of `to_dict` for a configuration dataclass, or one with other defaults.

    Raises UserError if the values do not fit it.
    """
    try:
        return _objects(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(values)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(
            "other-version-description",
            "",
            f"its description is not of this version ({_one_sentence(error)}); read it with the version that wrote it",
        ) from error


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_dict` for a model's configuration. Raises UserError if it describes no model."""
    model = from_dict(_STORED_MODEL, values)
    check_model(model)
    return model


def translated(action: Callable[[], T]) -> T:
    """Run `action`; errors of Hydra and OmegaConf become a UserError."""
    try:
        return action()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError("hydra-error", getattr(error, "full_key", None) or "", _one_sentence(error)) from error
    except OverflowError as error:  # OmegaConf's, of an integer with hundreds of digits for a float
        key = str(error).partition("full_key: ")[2].split("\n")[0]
        raise UserError("overflow", key, f"{key or 'a number'} is too large; give a smaller value") from error


# Checks of the overrides on a command line.


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for unknown keys, naming the nearest known ones, and for sweeps with too many runs."""
    groups = sorted(path.name for path in config_folder().iterdir() if path.is_dir() and path.name != "hydra")
    known = dict.fromkeys([*(key for key, *_ in entries(Config())), *groups])
    for line in overrides:  # first: other errors repeat them, and some sweepers write them to files
        check_no_secret(line, line.split("=")[0])
    parsed = [*map(_parsed, overrides)]
    for override in parsed:
        key = override.key_or_group
        if key in groups and not (override.is_delete() and key in _OPTIONAL_GROUPS):
            _check_choice(override)
        if key in known or key.startswith(_OPEN):
            continue
        raise UserError(
            "unknown-key",
            key,
            f"unknown key {abbreviated(key)} in {abbreviated(override.input_line)}; {hint(key, known)}",
        )
    _check_runs(parsed)


def _check_runs(overrides: Sequence[Override]) -> None:
    """Raise UserError for a multirun that would never be composed completely, or that Hydra's sweeper cannot run."""
    runs = 1
    for override in overrides:
        value = override.value()
        if isinstance(value, RangeSweep):
            assert value.start is not None and value.stop is not None
            runs *= -((value.start - value.stop) // value.step) if value.step else 0
        elif isinstance(value, ChoiceSweep):
            runs *= len(value.list)
        if runs not in _RUNS:
            raise UserError(
                "sweep-size",
                override.key_or_group,
                f"with {abbreviated(override.input_line)} the number of runs of the sweep must be {_RUNS}; give other "
                "values",
            )
        if override.key_or_group == "hydra.sweeper.max_batch_size" and isinstance(value, int):
            COUNT.check(override.key_or_group, value)


def _parsed(override: str) -> Override:
    key = override.partition("=")[0]
    try:
        return OverridesParser.create().parse_override(override)
    except ValueError as error:  # Python's limit is 4,300
        raise UserError(
            "too-many-digits", key, f"{abbreviated(override)} has a number with too many digits; give a smaller value"
        ) from error
    except HydraException as error:
        raise UserError(
            "unparsable-override",
            key,
            f"{abbreviated(override)} cannot be parsed ({_one_sentence(error)}); write key=value, and put a value "
            "with characters other than letters, digits and /:-._ in double quotes inside the shell's quotes: "
            "'key=\"value\"'",
        ) from error


def _check_choice(override: Override) -> None:
    """Raise UserError if conf/group lacks a file that `group=value`, or a part of a sweep, names."""
    group, value = override.key_or_group, override.value()
    choices = preset_names(group)
    if isinstance(value, Glob):
        return
    for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
        if str(choice) not in choices:
            near = difflib.get_close_matches(str(choice), choices, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
            raise UserError("unknown-preset", group, f"{override.input_line} names no file in conf/{group}; {remedy}")


def _objects(config: DictConfig | ListConfig) -> Any:
    """As dataclasses. Raises ValidationError for a list inside a list, which OmegaConf does not check."""
    made = OmegaConf.to_object(config)
    for key, value, entry in entries(made):
        if isinstance(value, list | dict) and "Any" not in str(entry.type):
            for member in value.values() if isinstance(value, dict) else value:
                if isinstance(member, list | dict):
                    raise ValidationError(f"{key}={abbreviated(value)} must have no lists or dictionaries in it")
    return made


def _one_sentence(error: Exception) -> str:
    """Hydra's message in one line, without its traceback advice: first what cannot be set, then why."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for text in (error, cause) if text for line in str(text).splitlines()]
    noise = ("reference_type", "object_type", "See ", "full_key")
    kept = [line.strip(".") for line in lines if line and not line.startswith(noise)]
    return "; ".join(dict.fromkeys(kept)).replace("Error merging override", "cannot set")


# Hints for unknown keys.


def hint(key: str, known: Collection[str]) -> str:
    """The remedy for an unknown key: the `known` keys that it may stand for, and those of its group if there is one."""
    group, _ = _split(key)
    members = [name for name in known if group and _split(name)[0] == group]
    listed = textwrap.shorten(", ".join(_split(name)[1] for name in members), _HINT_CHARACTERS, placeholder=" …")
    proposed = " or ".join(_proposals(key, known, members))
    if not proposed:
        return f"{group} has {listed}" if members else "the keys are in hpcm_scale/config/schema.py"
    return f"did you mean {proposed}?{f' ({group} has {listed})' if members else ''}"


def _proposals(key: str, known: Collection[str], members: Collection[str]) -> list[str]:
    """The best explanation of a wrong key: wrong dots or capitals, an abbreviation, a wrong group, a typing error.

    Typing errors in words of other groups are not considered if the key's own group exists.
    """
    group, word = _split(key)
    if not word:
        return []
    explanations = (
        [name for name in known if _flat(name) == _flat(key) or ("." in name and _flat(name) == _flat(word))],
        [name for name in members if _abbreviates(word, name)],
        _close(word, members),
        [name for name in known if word in (_split(name)[1], _initials(name))],
        difflib.get_close_matches(key, known, n=1) if group and not members else [],
        [name for name in known if _abbreviates(word, name)],
        [] if members else _close(word, known),
    )
    found = next(filter(None, explanations), [])
    return sorted(found, key=lambda name: -difflib.SequenceMatcher(None, key, name).ratio())[:_PROPOSALS]


def _close(word: str, names: Collection[str]) -> list[str]:
    """The names whose last part is nearest to `word`."""
    near = difflib.get_close_matches(word, {_split(name)[1] for name in names}, n=1)
    return [name for name in names if _split(name)[1] in near]


def _abbreviates(word: str, name: str) -> bool:
    """Whether `word` stands for the last part of `name`: by its initials, its beginning, or one of its words; or
    extends it, as warmup_steps does warmup."""
    whole = _split(name)[1]
    part = len(word) > 2 and (whole.startswith(word) or word in whole.split("_"))
    return part or word == _initials(name) or word.startswith(f"{whole}_")


def _initials(name: str) -> str:
    """Those of the last part's words if there are several: lr of schedule.learning_rate."""
    words = _split(name)[1].split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _flat(key: str) -> str:
    """A key without dots and capitals."""
    return key.replace(".", "_").lower()


def _split(key: str) -> tuple[str, str]:
    """The group of a key, empty if it has none, and its last part."""
    group, _, word = key.rpartition(".")
    return group, word
