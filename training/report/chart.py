"""Curves as inline SVG: a few milliseconds a page, where matplotlib would take longer than a short epoch.

Colours come from the page's style sheet, so the same chart is readable on light and on dark ground.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training.report.curves import Curve, Point

WIDTH, HEIGHT = 360, 176  # in the SVG's own units, which are pixels at its natural size
LEFT, RIGHT, TOP, FOOT = 48, 12, 10, 24
SERIES = 3  # colours in the style sheet

Reference = tuple[float, str]  # a horizontal line: value and label


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands."""
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values with their labels."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def draw(title: str, curves: Sequence[Curve], *, log: bool = False, reference: Reference | None = None) -> str:
    """An SVG element with these curves, one at least; the scale stays linear where a value is not positive."""
    drawn = [curve.points() for curve in curves]
    lows = [point.low for points in drawn for point in points]
    highs = [point.high for points in drawn for point in points]
    log = log and min(lows) > 0
    if reference:
        lows, highs = [*lows, reference[0]], [*highs, reference[0]]
    epochs = [epoch for curve in curves for epoch in curve.epochs]
    x = Axis(*_padded(min(epochs), max(epochs), 0), LEFT, WIDTH - RIGHT)
    y = Axis(*_padded(min(lows), max(highs), 0.06, log), HEIGHT - FOOT, TOP, log)
    said = "; ".join(f"{curve.label} {short(curve.last)}" for curve in curves)
    marks = [*_grid(x, y), *(_reference(y, *reference) if reference else ())]
    for number, (curve, points) in enumerate(zip(curves, drawn, strict=True)):
        marks += _curve(curve, points, x, y, f"s{number % SERIES}")
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{title}: {said}")}">',
            *marks,
            "</svg>",
        ]
    )


def short(value: float) -> str:
    """Three digits, as a person would write them."""
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def _curve(curve: Curve, points: Sequence[Point], x: Axis, y: Axis, name: str) -> Iterator[str]:
    """The line of the means, above the range of what they are means of."""
    line = " ".join(f"{x.place(point.epoch):.1f},{y.place(point.value):.1f}" for point in points)
    if curve.is_thinned:
        upper = [f"{x.place(point.epoch):.1f},{y.place(point.high):.1f}" for point in points]
        lower = [f"{x.place(point.epoch):.1f},{y.place(point.low):.1f}" for point in reversed(points)]
        yield f'<polygon class="band {name}" points="{" ".join([*upper, *lower])}"/>'
    yield f'<polyline class="line {name}" points="{line}"/>'
    for point in [points[-1]] if curve.is_thinned else points:
        title = f"<title>{html.escape(curve.label)} {short(point.value)} after epoch {point.epoch:g}</title>"
        place = f'cx="{x.place(point.epoch):.1f}" cy="{y.place(point.value):.1f}"'
        yield f'<circle class="dot {name}" {place} r="{3 if point is points[-1] else 1.6}">{title}</circle>'


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for value, label in y.ticks():
        place = y.place(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{place + 3.5:.1f}" text-anchor="end">{label}</text>'
    base = HEIGHT - FOOT
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
    ticks = x.ticks()
    for value, label in ticks:
        unit = "epoch " if value == ticks[-1][0] else ""
        anchor = "end" if x.place(value) > WIDTH - 3 * RIGHT else "middle"
        yield f'<text class="tick" x="{x.place(value):.1f}" y="{base + 15}" text-anchor="{anchor}">{unit}{label}</text>'


def _reference(y: Axis, value: float, label: str) -> Iterator[str]:
    place = y.place(value)
    yield f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
    yield f'<text class="tick" x="{WIDTH - RIGHT}" y="{place - 4:.1f}" text-anchor="end">{html.escape(label)}</text>'


def _padded(low: float, high: float, share: float, log: bool = False) -> tuple[float, float]:
    """The range with some room at both ends; never empty."""
    if log:
        room = max(share * math.log10(high / low), 0.05)
        return low / 10**room, high * 10**room
    room = share * (high - low)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.1 or 0.5
        return (0.0, 1.0) if low == high == 0 else (low - room, high + room)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Three to six multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(number, _label(number, decimals)) for number in numbers]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten, and within few of them also twice and five times these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    numbers = [factor * 10.0**power for power in powers for factor in factors]
    inside = [number for number in numbers if low <= number <= high]
    every = -(-len(inside) // 6)
    return [(number, short(number)) for number in inside[::every]] if every else [(low, short(low))]


def _label(value: float, decimals: int) -> str:
    if abs(value) < 1e-12:
        return "0"
    return f"{value:,.{decimals}f}" if decimals < 5 else f"{value:.0e}".replace("e-0", "e-")
