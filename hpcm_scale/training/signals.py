"""Being asked to stop."""

from __future__ import annotations

import signal


class StopRequest:
    """Whether this process has been asked to stop (SIGTERM): the loop agrees on it with the others."""

    def __init__(self) -> None:
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def close(self) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: object) -> None:
        self.received = True
