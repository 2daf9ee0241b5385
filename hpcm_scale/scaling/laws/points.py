"""What a law is fitted to: trainings, one point each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


class CannotFit(ValueError):
    """The points do not determine the law: the text is a sentence that says why."""


@dataclass(frozen=True, eq=False)
class Points:
    """Trainings that a law is fitted to, one point each, so that what is left out or resampled is a training."""

    of: str
    """Ends the law's name: "parameters", "compute", "compute_whole"; "both" for the joint law."""
    variables: dict[str, np.ndarray]
    """"N" (parameters), "C" (PFLOPs), "D" (pixels): float64 (n,), positive."""
    loss: np.ndarray
    """float64 (n,), positive."""
    runs: tuple[str, ...]
    models: tuple[str, ...]
    data: str = ""
    """What they are, in words."""
    warnings: tuple[str, ...] = ()
    """On their choice: sentences."""

    def __post_init__(self) -> None:
        for values in (self.loss, *self.variables.values()):
            if values.shape != (len(self.runs),) or not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError("a law is fitted to positive finite numbers, one of each per run")

    @classmethod
    def bare(cls, loss: np.ndarray, of: str, **variables: np.ndarray) -> Points:
        """Points of numbers alone, for data that come from no run."""
        names = tuple(f"point {index + 1}" for index in range(len(loss)))
        arrays = {name: np.asarray(values, np.float64) for name, values in variables.items()}
        return cls(of, arrays, np.asarray(loss, np.float64), names, names)

    def __len__(self) -> int:
        return len(self.runs)

    def take(self, chosen: Sequence[int] | np.ndarray) -> Points:
        """The points of these indices, which may repeat."""
        chosen = np.asarray(chosen, int)
        return replace(
            self,
            variables={name: values[chosen] for name, values in self.variables.items()},
            loss=self.loss[chosen],
            runs=tuple(self.runs[index] for index in chosen),
            models=tuple(self.models[index] for index in chosen),
        )

    def different(self, variable: str, tolerance: float = 0.01) -> int:
        """How many values of a variable differ by more than a hundredth (a run is rarely ended on the very pixel)."""
        steps = np.diff(np.sort(np.log(self.variables[variable])))
        return 1 + int(np.sum(steps > tolerance)) if len(self) else 0

    def require_different_losses(self) -> None:
        """Raise CannotFit where all losses are equal: no exponent, error or correlation follows from them."""
        if np.ptp(self.loss) == 0:
            raise CannotFit(f"all losses{self.origin} are equal, so they say nothing of {' or '.join(self.variables)}")

    @property
    def origin(self) -> str:
        """Ends a sentence on how many there are: " among …", or nothing for bare numbers."""
        return f" among {self.data}" if self.data else ""

    def observed(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each variable."""
        return {name: (float(values.min()), float(values.max())) for name, values in self.variables.items()}
