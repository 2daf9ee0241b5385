"""What a key that does not exist may have been meant to be."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Collection

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
