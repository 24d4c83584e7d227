"""The page of `mixmim drift`: one HTML file with the numbers, histogram, curve, and the worst photos."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mixmim_serve.anomaly.drift import Drift, Ranking, Worst
from mixmim_serve.anomaly.heatmap import overlay
from mixmim_serve.anomaly.patches import Floats
from mixmim_serve.explore.pages import THUMBNAIL, Picture, data_uri, gallery

WIDTH, HEIGHT, FOOT = 640, 160, 34  # of the histogram, in pixels
CURVE = 260  # of the curve
BINS = 40
_STYLE = """<style>
.chart { display: block; width: 100%; font-size: 12px; fill: #444; }
.chart .normal { fill: #888; opacity: .55; } .chart .folder { fill: #b35900; opacity: .6; }
.chart line, .chart polyline { stroke: #444; fill: none; } .chart .dashed { stroke-dasharray: 4 3; }
</style>"""


def drift_page(title: str, drift: Drift, normal: Floats, place_quantiles: Floats) -> str:
    """The page; `normal` are the scores of the normal photos, `place_quantiles` scale the heat maps."""
    lines = "\n".join(f"<p>{html.escape(line)}</p>" for line in drift.sentences())
    failed = len(drift.scored.failed)
    unread = f'<p class="warning">{failed:,} images could not be read.</p>' if failed else ""
    intro = [_STYLE, lines, unread, histogram(normal, drift.scored.scores, drift.threshold)]
    if drift.ranking:
        intro.append(curve(drift.ranking))
    heading = f"The {len(drift.scored.worst):,} highest scores, each above its heat map"
    return gallery(title, [(heading, _pictures(drift.scored.worst, place_quantiles))], "\n".join(intro))


def _pictures(worst: Sequence[Worst], place_quantiles: Floats) -> list[Picture]:
    return [
        Picture(
            data_uri(photo_and_map(each, place_quantiles)),
            f"{each.verdict.score:.2f}{'' if each.verdict.normal else ' beyond the threshold'}, {each.key}",
        )
        for each in worst
    ]


def photo_and_map(worst: Worst, place_quantiles: Floats) -> Image.Image:
    """The photo above its heat map, as wide as a thumbnail."""
    pair = Image.new("RGB", (THUMBNAIL, 2 * THUMBNAIL))
    drawn = overlay(worst.pixels, worst.verdict.places, place_quantiles)
    for row, image in enumerate((Image.fromarray(worst.pixels), drawn)):
        pair.paste(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC), (0, row * THUMBNAIL))
    return pair


def histogram(normal: Floats, scores: Floats, threshold: float) -> str:
    """Shares of normal photos and of the folder's by score, with the threshold, as SVG."""
    low = float(min(normal.min(), scores.min()))
    high = float(max(np.quantile(scores, 0.995), normal.max(), threshold)) + 1e-6  # the last bin has all above
    bins = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(np.minimum(values, high), bins)[0] / len(values) for values in (normal, scores)]
    highest, step = max(float(count.max()) for count in counts), WIDTH / BINS
    parts = [
        f'<svg class="chart" style="max-width: {WIDTH}px" viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" role="img" '
        f'aria-label="Scores of normal photos (grey) and of this folder (orange); threshold {threshold:.3g}">'
    ]
    for name, count in zip(("normal", "folder"), counts, strict=True):
        for number, share in enumerate(count.tolist()):
            height = HEIGHT * share / highest
            title = f"<title>{name}: {share:.1%} from {bins[number]:.2f} to {bins[number + 1]:.2f}</title>"
            parts.append(
                f'<rect class="{name}" x="{number * step:.1f}" y="{HEIGHT - height:.1f}" width="{step - 1:.1f}" '
                f'height="{height:.1f}">{title}</rect>'
            )
    x = (threshold - low) / (high - low) * WIDTH
    anchor = "end" if x > WIDTH / 2 else "start"
    parts += [
        f'<line x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}"/>',
        f'<line class="dashed" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{HEIGHT}"/>',
        f'<text x="{x + (-5 if anchor == "end" else 5):.1f}" y="12" text-anchor="{anchor}">threshold '
        f"{threshold:.3g}</text>",
        f'<text x="0" y="{HEIGHT + 15}">{low:.2f}</text>',
        f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">{high:.2f} and above</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT + 30}" text-anchor="middle">score: normal photos grey, this folder '
        "orange</text>",
        "</svg>",
    ]
    return "\n".join(parts)


def curve(ranking: Ranking) -> str:
    """The receiver operating characteristic as SVG."""
    points = " ".join(
        f"{x * CURVE:.1f},{CURVE - y * CURVE:.1f}"
        for x, y in zip(ranking.false_alarms.tolist(), ranking.found.tolist(), strict=True)
    )
    label = f"AUROC {ranking.auroc:.3f}"
    return (
        f'<svg class="chart" style="max-width: {CURVE + 40}px" viewBox="-2 -2 {CURVE + 4} {CURVE + FOOT}" role="img" '
        f'aria-label="{label}"><line x1="0" y1="{CURVE}" x2="{CURVE}" y2="{CURVE}"/>'
        f'<line x1="0" y1="0" x2="0" y2="{CURVE}"/><line class="dashed" x1="0" y1="{CURVE}" x2="{CURVE}" y2="0"/>'
        f'<polyline points="{points}" stroke-width="2"/>'
        f'<text x="{CURVE - 6}" y="{CURVE - 8}" text-anchor="end">{label}</text>'
        f'<text x="{CURVE / 2}" y="{CURVE + 20}" text-anchor="middle">false alarms; upwards: found; both 0 to 1</text>'
        "</svg>"
    )
