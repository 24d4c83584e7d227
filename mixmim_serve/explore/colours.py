"""The colours of a column of values on the map: a legend, and the entry of each image.

Categories have the colours of Okabe and Ito, which people with colour blindness tell apart (Color Universal Design,
2008; without black, since the page is dark), then the same again in dashed frames. Numbers have five steps of viridis.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CATEGORIES = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2")
STEPS = ("#2c718e", "#21918c", "#35b779", "#7ad151", "#fde725")  # viridis from 0.35 on: lighter than the page
REST = "#999999"  # other values, and images without one
NO_VALUE = "no value"


@dataclass(frozen=True)
class Entry:
    """A line of the legend."""

    label: str
    colour: str
    count: int
    dashed: bool = False


@dataclass(frozen=True)
class Colouring:
    """A legend, and of each image the number of its entry."""

    entries: tuple[Entry, ...]
    of: tuple[int, ...]


def colouring(values: Sequence[str]) -> Colouring:
    """The colours of these values, one per image; an empty value is none."""
    numbers = _numbers(values)
    if numbers is None:
        return _legend(values, sorted(set(values) - {""}), CATEGORIES)
    labels, ordered = _steps(numbers)
    return _legend(labels, ordered, STEPS)


def _legend(labels: Sequence[str], ordered: Sequence[str], colours: Sequence[str]) -> Colouring:
    """An entry for each label, or for the most frequent ones and one for the others."""
    counts, room = Counter(labels), 2 * len(colours)
    named = list(ordered)
    if len(ordered) > room:
        frequent = set(sorted(ordered, key=lambda label: -counts[label])[: room - 1])
        named = [label for label in ordered if label in frequent]
    entries = [
        Entry(label, colours[number % len(colours)], counts[label], number >= len(colours))
        for number, label in enumerate(named)
    ]
    place = {label: number for number, label in enumerate(named)}
    if others := [label for label in ordered if label not in place]:
        place |= dict.fromkeys(others, len(entries))
        entries.append(Entry(f"{len(others):,} other values", REST, sum(counts[label] for label in others)))
    if counts[""]:
        place[""] = len(entries)
        entries.append(Entry(NO_VALUE, REST, counts[""], dashed=True))
    return Colouring(tuple(entries), tuple(place[label] for label in labels))


def _numbers(values: Sequence[str]) -> list[float] | None:
    """The values as finite numbers, nan for none; None if they are categories: other text, or few different ones."""
    try:
        numbers = [float(value) if value else math.nan for value in values]
    except ValueError:
        return None
    known = {number for value, number in zip(values, numbers, strict=True) if value}
    if len(known) <= len(CATEGORIES) or not all(map(math.isfinite, known)):
        return None
    return numbers


def _steps(numbers: Sequence[float]) -> tuple[list[str], list[str]]:
    """The label of each number's step ("" for nan), and the labels in order; steps have equally many numbers."""
    array = np.array(numbers)
    edges = np.unique(np.nanquantile(array, np.linspace(0, 1, len(STEPS) + 1)))
    ordered = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges.tolist())]
    steps = np.clip(np.searchsorted(edges, array, "right") - 1, 0, len(ordered) - 1)
    return ["" if math.isnan(n) else ordered[step] for n, step in zip(numbers, steps.tolist(), strict=True)], ordered
