"""The colours of the map: readable on its background, told apart by everybody, and right for each kind of column."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from mixmim_serve.explore.colours import CATEGORIES, NO_VALUE, REST, STEPS, colouring
from mixmim_serve.explore.map_page import TEMPLATE

BACKGROUND = "#1a1a1a"  # of the page


def contrast(colour: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(text: str) -> float:
        parts = [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    light, dark = sorted((luminance(colour), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def as_seen(colour: str, kind: str) -> np.ndarray:
    """A colour as people without red or green cones see it (Machado and others, 2009, severity 1), in CIE Lab."""
    matrix = {
        "": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }[kind]
    stored = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(matrix) @ linear, 0, 1)
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
        / (0.9505, 1, 1.089)
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("palette", [CATEGORIES, STEPS])
def test_colours_are_readable_for_everybody(palette: Sequence[str]) -> None:
    assert f"background: {BACKGROUND}" in TEMPLATE.read_text()
    assert min(contrast(colour, BACKGROUND) for colour in (*palette, REST)) >= 3
    for kind in ("", "protan", "deutan"):
        for one, other in itertools.combinations(palette, 2):
            assert np.linalg.norm(as_seen(one, kind) - as_seen(other, kind)) > 9, (kind, one, other)


def test_categories_beyond_the_colours_are_dashed_then_together() -> None:
    values = [f"class {number:02d}" for number in range(10) for _ in range(number + 1)]
    ten = colouring(values)
    assert [entry.label for entry in ten.entries] == sorted(set(values))
    assert len({(entry.colour, entry.dashed) for entry in ten.entries}) == 10
    assert [entry.dashed for entry in ten.entries] == [False] * 7 + [True] * 3
    many = colouring([*(f"c{number:02d}" for number in range(20) for _ in range(number + 1)), ""])
    assert [entry.label for entry in many.entries] == [*(f"c{n:02d}" for n in range(7, 20)), "7 other values", NO_VALUE]
    assert many.entries[13].count == sum(range(1, 8))
    assert many.of[0] == 13
    assert many.of[-1] == 14


def test_numbers_get_steps_and_few_numbers_categories() -> None:
    found = colouring([*(str(number / 10) for number in range(100)), ""])
    assert [entry.colour for entry in found.entries[:-1]] == list(STEPS)
    assert [entry.count for entry in found.entries] == [20] * 5 + [1]
    assert found.entries[0].label.startswith("0 to ")
    assert found.of[0] == 0
    assert found.of[99] == 4
    assert [entry.label for entry in colouring(["1", "0", "1"]).entries] == ["0", "1"]
    skewed = colouring([*["0"] * 90, *map(str, range(1, 11))])
    assert sum(entry.count for entry in skewed.entries) == 100
