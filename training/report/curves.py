"""The values of metrics.jsonl as curves over the epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

POINTS = 120  # of a drawn curve; a longer one is drawn as means of so many parts, with their range


class Point(NamedTuple):
    """A value, or the mean and the range of some consecutive ones."""

    epoch: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One metric over the epochs; it has a value at least."""

    label: str
    epochs: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The latest value."""
        return self.values[-1]

    @property
    def is_thinned(self) -> bool:
        """Whether `points` are means of several values."""
        return len(self.values) > POINTS

    def points(self) -> list[Point]:
        """At most `POINTS` points."""
        if not self.is_thinned:
            return [Point(*pair, pair[1], pair[1]) for pair in zip(self.epochs, self.values, strict=True)]
        epochs, values = (np.array_split(np.array(each), POINTS) for each in (self.epochs, self.values))
        return [
            Point(float(part.mean()), float(value.mean()), float(value.min()), float(value.max()))
            for part, value in zip(epochs, values, strict=True)
        ]

    def tenths(self) -> list[float]:
        """Means of ten parts in order, or the values where there are fewer."""
        parts = np.array_split(np.array(self.values), min(10, len(self.values)))
        return [float(part.mean()) for part in parts]


def curves(lines: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[Curve]:
    """Those of these metrics that the lines of metrics.jsonl have, in the order of `labels`."""
    found = []
    for name, label in labels.items():
        pairs = [(line["epoch"], line[name]) for line in lines if _is_number(line.get(name)) and "epoch" in line]
        if pairs:
            epochs, values = zip(*pairs, strict=True)
            found.append(Curve(label, tuple(map(float, epochs)), tuple(map(float, values))))
    return found


def last_epoch(lines: Iterable[Mapping[str, Any]]) -> float:
    """How far the run has come, in epochs."""
    return max((float(line.get("epoch", 0)) for line in lines), default=0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
