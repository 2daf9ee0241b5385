"""The photos of the training set that turned out to be unreadable, counted by all processes alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from hpcm_scale.data.photos import BadPhoto
from hpcm_scale.errors import UserError


class BadPhotos:
    """Each photo counts once, however often its turn comes; others took its place in the batches."""

    def __init__(self, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        """By sample: why it could not be read; of the steps done, and so a checkpoint's."""
        self.ahead: dict[str, str] = {}
        """Those met first among the images of the next step."""

    def __len__(self) -> int:
        return len(self.reasons) + len(self.ahead)

    def told(self, photos: Iterable[BadPhoto]) -> str:
        """What a process tells the others of the photos it could not read; empty if it is nothing new."""
        new = {str(photo.sample): photo.reason for photo in photos if str(photo.sample) not in self.reasons}
        return json.dumps(new) if new else ""

    def add(self, texts: Sequence[str]) -> list[str]:
        """Take in what all processes told; returns a line for each photo that is new."""
        new: dict[str, str] = {}
        for text in filter(None, texts):
            new = json.loads(text) | new
        self.ahead = new
        return [f"left out: {new[sample]}" for sample in sorted(new, key=int)]

    def passed(self) -> None:
        """The next step is being done."""
        self.reasons |= self.ahead
        self.ahead = {}

    def too_many(self, limit: int) -> bool:
        """Whether they are more than `data.max_bad` allows."""
        return len(self) > limit

    def error(self, limit: int) -> UserError:
        """What ends the run then."""
        first = next(iter((self.reasons | self.ahead).values()))
        return UserError(
            f"{len(self)} photos could not be read, more than data.max_bad={limit} (the first: {first}); "
            "restore the shards (`hpcm shards verify` lists all damage), or raise data.max_bad, and the same command "
            "goes on"
        )
