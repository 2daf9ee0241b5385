"""From `conf/` and a command line to a checked `Config`, by Hydra; mistakes become one sentence."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from hpcm_scale.config.checks import check_model
from hpcm_scale.config.schema import Config, ModelConfig
from hpcm_scale.errors import UserError
from hpcm_scale.files import check_no_secret
from hpcm_scale.limits import COUNT, Range, abbreviated

# What a key that does not exist may have been meant to be.


_MOST = 3
"""Keys that a hint proposes."""
_LONGEST = 160
"""Characters that the keys of a group take in a hint."""


def hint(key: str, known: Collection[str]) -> str:
    """The end of a sentence: the `known` keys that `key` may stand for, and those of its group where there is one."""
    group, _ = _split(key)
    members = [name for name in known if group and _split(name)[0] == group]
    listed = textwrap.shorten(", ".join(_split(name)[1] for name in members), _LONGEST, placeholder=" …")
    proposed = " or ".join(_proposed(key, known, members))
    if not proposed:
        return f"{group} has {listed}" if members else "the keys are in hpcm_scale/config/schema.py"
    return f"did you mean {proposed}?{f' ({group} has {listed})' if members else ''}"


def _proposed(key: str, known: Collection[str], members: Collection[str]) -> list[str]:
    """The best explanation of a wrong key: wrong dots or capitals, an abbreviation, a wrong group, a typing mistake.

    A typing mistake in a word of another group is too far-fetched where the keys of the group are listed.
    """
    group, word = _split(key)
    if not word:
        return []
    explained = (
        [name for name in known if _flat(name) == _flat(key) or ("." in name and _flat(name) == _flat(word))],
        [name for name in members if _abbreviates(word, name)],
        _close(word, members),
        [name for name in known if word in (_split(name)[1], _initials(name))],
        difflib.get_close_matches(key, known, n=1) if group and not members else [],
        [name for name in known if _abbreviates(word, name)],
        [] if members else _close(word, known),
    )
    found = next(filter(None, explained), [])
    return sorted(found, key=lambda name: -difflib.SequenceMatcher(None, key, name).ratio())[:_MOST]


def _close(word: str, names: Collection[str]) -> list[str]:
    """The names whose last part is nearest to `word`."""
    near = difflib.get_close_matches(word, {_split(name)[1] for name in names}, n=1)
    return [name for name in names if _split(name)[1] in near]


def _abbreviates(word: str, name: str) -> bool:
    """Whether `word` stands for the last part of `name`: by its initials, its beginning, or one of its words; or says
    more than it, as warmup_steps for warmup."""
    whole = _split(name)[1]
    part = len(word) > 2 and (whole.startswith(word) or word in whole.split("_"))
    return part or word == _initials(name) or word.startswith(f"{whole}_")


def _initials(name: str) -> str:
    """Those of the last part's words, where it has several: lr of schedule.learning_rate."""
    words = _split(name)[1].split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _flat(key: str) -> str:
    """A key without what is easily mistaken: dots and capitals."""
    return key.replace(".", "_").lower()


def _split(key: str) -> tuple[str, str]:
    """The group of a key, empty where it has none, and its last part."""
    group, _, word = key.rpartition(".")
    return group, word


CONFIG_NAME = "config"
_OPTIONAL_GROUPS = ("stage", "experiment", "debug")
_OPEN = ("hydra.", "hydra/", "engine.options.", "model.options.")
"""What keys may begin with that are no fields of a dataclass here."""
_RUNS = Range(least=1, most=10_000)
"""Of a sweep."""
T = TypeVar("T")
Sized = Callable[[ModelConfig], ModelConfig]
"""A model of some size to its widths and depths (`model.ladder.sized`)."""
ConfigStore.instance().store(name="schema", node=Config)
# For values that follow from others, as a learning rate from a width: ${divide:0.03,${model.channels.1}}
OmegaConf.register_new_resolver("divide", lambda dividend, divisor: dividend / divisor, replace=True)


@cache
def config_folder() -> Path:
    """The folder `conf/`: beside the package in a checkout, inside it when installed as a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise UserError("the folder conf/ is missing; install hpcm_scale again")


def compose(overrides: Sequence[str] = (), sized: Sized | None = None) -> Config:
    """The configuration of one run, from Hydra overrides such as `model=nano` or `train.steps=80`; see `typed`.

    Raises UserError for an unknown key or group, or a value of the wrong type.
    """
    check_overrides(overrides)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return translated(lambda: typed(hydra_compose(CONFIG_NAME, list(overrides)), sized))


def compose_model(name: str) -> ModelConfig:
    """The preset `conf/model/<name>.yaml`, or a family there with its `size`."""
    return compose([f"model={name}"]).model


def preset_names(group: str) -> list[str]:
    """The names that `group=…` may take, for example `model`."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def typed(config: DictConfig, sized: Sized | None = None) -> Config:
    """Hydra's composed configuration as dataclasses.

    With `sized`, model.size has become widths and depths before other keys that refer to them are worked out, such as
    a learning rate that follows from a width. Raises UserError for a size of a preset that has widths of its own, and
    for values of the wrong type.
    """
    name, family, size = (config.model[key] for key in ("name", "family", "size"))
    preset = config_folder() / "model" / f"{name}.yaml"
    if size is not None and preset.is_file() and "size" not in OmegaConf.load(preset):
        raise UserError(
            f"model={name} has widths and depths of its own, and model.size={size} would replace them; use "
            f"model={family} model.size={size}, or leave model.size out"
        )
    if sized and size is not None:
        config.model = sized(OmegaConf.to_object(config.model))
    return translated(lambda: _objects(config))


def from_yaml(path: str | Path) -> Config:
    """The configuration that `to_yaml` wrote, for example a run folder's config.yaml.

    Raises UserError if the file is damaged or holds keys that there are no more.
    """
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: it is no YAML; choose another run.dir, or mend it") from error
    try:
        return _objects(OmegaConf.merge(OmegaConf.structured(Config), loaded))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path} is no configuration of this version ({_one_sentence(error)})") from error


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: object) -> dict:
    """A configuration dataclass as plain JSON-able values, enums by name."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def from_dict(kind: type[T], values: dict) -> T:
    """The inverse of `to_dict` for a configuration of a `kind`. Raises UserError if the values describe none."""
    try:
        return _objects(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(values)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"it is not described as in this version ({_one_sentence(error)})") from error


def model_from_dict(values: dict) -> ModelConfig:
    """The inverse of `to_dict` for a model's configuration. Raises UserError if it describes no model."""
    model = from_dict(ModelConfig, values)
    check_model(model)
    return model


def translated(action: Callable[[], Config]) -> Config:
    """Run `action`; Hydra's and OmegaConf's complaints become a UserError."""
    try:
        return action()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_sentence(error)) from error
    except OverflowError as error:  # OmegaConf's, of an integer with hundreds of digits for a float
        key = str(error).partition("full_key: ")[2].split("\n")[0]
        raise UserError(f"{key or 'a number'} is too large; give a smaller one") from error


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse keys that do not exist, naming the nearest ones that do."""
    groups = sorted(path.name for path in config_folder().iterdir() if path.is_dir() and path.name != "hydra")
    known = dict.fromkeys([*_keys(Config), *groups])
    for line in overrides:  # before all else: Hydra writes them down, and errors repeat them
        check_no_secret(line, line.split("=")[0])
    parsed = [*map(_parsed, overrides)]
    for override in parsed:
        key = override.key_or_group
        if key in groups and not (override.is_delete() and key in _OPTIONAL_GROUPS):
            _check_choice(key, override.input_line, override.value())
        if key in known or key.startswith(_OPEN):
            continue
        raise UserError(f"unknown key {abbreviated(key)} in {abbreviated(override.input_line)}; {hint(key, known)}")
    _check_runs(parsed)


def _check_runs(overrides: Sequence[Override]) -> None:
    """Refuse a multirun that would be composed for ever, or that Hydra's sweeper does not take."""
    runs = 1
    for override in overrides:
        value = override.value()
        if isinstance(value, RangeSweep):
            runs *= -((value.start - value.stop) // value.step) if value.step else 0
        elif isinstance(value, ChoiceSweep):
            runs *= len(value.list)
        if runs not in _RUNS:
            raise UserError(
                f"with {abbreviated(override.input_line)} the sweep has too many runs, or none; ask for {_RUNS}"
            )
        if override.key_or_group == "hydra.sweeper.max_batch_size" and isinstance(value, int):
            COUNT.check(override.key_or_group, value)


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except ValueError as error:  # Python's limit is 4,300
        raise UserError(f"{abbreviated(override)} has a number with too many digits; give a smaller one") from error
    except HydraException as error:
        raise UserError(
            f"{abbreviated(override)} cannot be read ({_one_sentence(error)}); write key=value, and quote a value with "
            "other characters than letters, digits and /:-._ inside the shell's quotes: 'key=\"value\"'"
        ) from error


def _check_choice(group: str, line: str, value: object) -> None:
    """Refuse `group=value` where conf/group has no such file; sweeps (`a,b`) are checked part by part."""
    choices = preset_names(group)
    if isinstance(value, Glob):
        return
    for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
        if str(choice) not in choices:
            near = difflib.get_close_matches(str(choice), choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}."
            raise UserError(f"{line} names no file in conf/{group}; {hint}")


def _keys(kind: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass."""
    hints = get_type_hints(kind)
    keys = []
    for entry in fields(kind):
        keys.append(f"{prefix}{entry.name}")
        if is_dataclass(hints[entry.name]):
            keys += _keys(hints[entry.name], f"{prefix}{entry.name}.")
    return keys


def _objects(config: DictConfig) -> Any:
    """A configuration as dataclasses. Raises ValidationError for a list in a list of numbers or names: OmegaConf does
    not look at it."""
    made = OmegaConf.to_object(config)
    _check_entries(made)
    return made


def _check_entries(config: Any, prefix: str = "") -> None:
    hints = get_type_hints(type(config))
    for entry in fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            _check_entries(value, f"{key}.")
        elif isinstance(value, list | dict) and Any not in get_args(hints[entry.name]):
            for member in value.values() if isinstance(value, dict) else value:
                if isinstance(member, list | dict):
                    raise ValidationError(f"{key}={abbreviated(value)} must have no lists or dictionaries in it")


def _one_sentence(error: Exception) -> str:
    """Hydra's message in one line, without its traceback advice: first what cannot be set, then why."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for text in (error, cause) if text for line in str(text).splitlines()]
    noise = ("reference_type", "object_type", "See ", "full_key")
    kept = [line.strip(".") for line in lines if line and not line.startswith(noise)]
    return "; ".join(dict.fromkeys(kept)).replace("Error merging override", "cannot set")
