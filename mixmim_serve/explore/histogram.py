"""A histogram of nearest cosines as SVG, with the threshold of near-duplicates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, FOOT, HEAD = 640, 150, 36, 18  # in pixels; foot and head hold the labels
BINS = 40
NINES = 6  # the scale ends at a cosine of 0.999999; identical images stand there


def histogram(nearest: NDArray[np.float32], threshold: float) -> str:
    """Bars of the number of images by the cosine of their nearest image, on a scale of nines (0.9, 0.99, 0.999)."""
    places = _nines(nearest)
    low = min(math.floor(2 * places.min()) / 2, float(_nines([threshold])[0]) - 0.5)
    counts, edges = np.histogram(places, BINS, (low, NINES))
    step = WIDTH / BINS
    bars = []
    for count, left in zip(counts.tolist(), edges.tolist(), strict=False):
        height = HEIGHT * math.sqrt(count / counts.max())  # the few copies should be seen beside the many others
        side = "above" if left + (NINES - low) / BINS / 2 >= _nines([threshold])[0] else "below"
        x, y = (left - low) / (NINES - low) * WIDTH, HEAD + HEIGHT - height
        title = f"<title>{count} images near {_cosine(left)}</title>"
        bars.append(
            f'<rect class="{side}" x="{x:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{height:.1f}">{title}</rect>'
        )
    return "\n".join(
        [
            f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEAD + HEIGHT + FOOT}" role="img" '
            f'aria-label="Number of images by the cosine of their nearest image; threshold {threshold:.6g}">',
            *bars,
            *_axis(low),
            _line((float(_nines([threshold])[0]) - low) / (NINES - low) * WIDTH, f"threshold {threshold:.6g}"),
            "</svg>",
        ]
    )


def _nines(cosines: Sequence[float] | NDArray[np.float32]) -> NDArray[np.float64]:
    """0.9 -> 1, 0.99 -> 2: the scale of the histogram."""
    distances = np.clip(1 - np.asarray(cosines, np.float64), 10.0**-NINES, 2)
    return np.asarray(-np.log10(distances))


def _cosine(nines: float) -> str:
    return f"{1 - 10**-nines:.{max(2, math.ceil(nines) + 1)}f}"


def _axis(low: float) -> list[str]:
    base = HEAD + HEIGHT
    marks = [f'<line class="axis" x1="0" y1="{base}" x2="{WIDTH}" y2="{base}"/>']
    for nines in range(max(0, math.ceil(low)), NINES + 1):
        x = (nines - low) / (NINES - low) * WIDTH
        anchor = "end" if nines == NINES else "start" if x < 10 else "middle"
        label = {0: "0", NINES: "1"}.get(nines, f"{1 - 10.0**-nines:.{nines}f}")
        marks.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="{anchor}">{label}</text>')
    marks.append(f'<text x="{WIDTH / 2}" y="{base + 31}" text-anchor="middle">cosine with the nearest image</text>')
    return marks


def _line(x: float, label: str) -> str:
    anchor = "end" if x > WIDTH / 2 else "start"
    return (
        f'<line class="threshold" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{HEAD + HEIGHT}"/>'
        f'<text class="threshold" x="{x + (-5 if anchor == "end" else 5):.1f}" y="12" text-anchor="{anchor}">'
        f"{label}</text>"
    )
