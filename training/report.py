"""RUN/report.html: a run's curves, pictures and what they say, in one self-contained page."""

from __future__ import annotations

import base64
import html
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mixmim_serve.errors import MixMIMError
from mixmim_serve.files import atomic_path

REPORT = "report.html"
COLLAPSED = 0.5  # of its highest value: below it a falling effective rank is a warning
FALLEN = 0.95  # of the first loss: a loss above it after the warm-up has hardly fallen
DEAD = 0.1  # share of dead channels that is worth a warning
OVERFIT = 10.0  # k-NN points below the best: something went wrong since

Series = tuple[list[float], list[float]]  # epochs and values


@dataclass(frozen=True)
class Chart:
    """One curve of the page: the key in metrics.jsonl (or how it ends), and how to read it."""

    key: str
    title: str
    reading: str
    log: bool = False


CHARTS = (
    Chart("loss", "loss", "Falls fast in the first epochs, then slowly until the end. Flat from the start: the rate is "
          "too high or too low. It says that the network learns to reconstruct, not how good its features are."),
    Chart("effective_rank", "effective rank (RankMe)", "Dimensions that the embeddings use. Rises, then stays. "
          "A fall to half of its best is a collapse, even while the loss still falls."),
    Chart("_top1", "accuracy on the labelled images, %", "The judge, where labels exist: k nearest neighbours in "
          "pretraining, the classifier in fine-tuning. Rises and flattens; stop where it falls."),
    Chart("spectrum_decay", "decay of the spectrum (alpha-ReQ)", "How fast the directions lose weight. Near 1 is rich; "
          "far above 2, few directions hold everything."),
    Chart("uniformity", "uniformity", "How evenly the embeddings cover the sphere: 0 is one point, -4 is even. Falls "
          "as features become distinct."),
    Chart("dead_channels", "dead channels", "Share of the channels that hardly vary. Stays at or near 0."),
    Chart("lr", "learning rate", "Warm-up, then half a cosine."),
    Chart("grad_norm", "gradient norm", "Spikes that do not calm down mean that the rate is too high.", log=True),
    Chart("rate", "images per second", "Falls when other work uses the machine, or when decoding cannot keep up."),
)  # fmt: skip

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }} figure svg, figure img {{ width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: .85rem; }}
li.bad {{ color: #a40000; font-weight: 600; }} dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }}
dt {{ color: #555; }} dd {{ margin: 0; }}
</style></head><body>
<h1>{title}</h1>
<dl>{facts}</dl>
<h2>What it says</h2>
<ul>{verdict}</ul>
<h2>Curves</h2>
<div class="charts">{charts}</div>
{pictures}
</body></html>
"""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what the run folder holds.

    Raises:
        MixMIMError: when matplotlib is not installed.
    """
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    described = json.loads((run / "config.json").read_text())
    curves = {chart: series(metrics, chart.key) for chart in CHARTS}
    figures = "".join(_figure(chart, curve) for chart, curve in curves.items() if len(curve[0]) > 1)
    page = _PAGE.format(
        title=html.escape(f"{described.get('task', 'run')}: {run.name}"),
        facts="".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts(described, metrics)
        ),
        verdict="".join(
            f'<li class="{"bad" if bad else "good"}">{html.escape(sentence)}</li>'
            for bad, sentence in verdict({chart.key: curve for chart, curve in curves.items()})
        ),
        charts=figures or "<p>No epoch has ended yet.</p>",
        pictures="".join(_pictures(run)),
    )
    with atomic_path(run / REPORT) as path:
        path.write_text(page)
    return run / REPORT


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> Series:
    """The values whose name is `key`, or ends in it if it begins with an underscore, over the epochs."""
    epochs, values = [], []
    for line in metrics:
        for name, value in line.items():
            if (name == key or (key.startswith("_") and name.endswith(key))) and value is not None:
                epochs.append(float(line["epoch"]))
                values.append(float(value))
                break
    return epochs, values


def facts(described: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What the page says first, by name."""
    config = described["config"]
    yield "images", f"{described['images']['count']:,} of {described['images']['source']}"
    yield "network", f"{config['size']}, {config['image_size'] or 'its own'} px"
    yield (
        "epochs",
        f"{metrics[-1]['epoch'] if metrics else 0:g} of {config['epochs']}, batches of {config['batch_size']}",
    )
    yield "base rate", f"{config['base_lr']:g} for a batch of 256"
    yield "start", str(described["start"])
    yield "versions", ", ".join(f"{name} {version}" for name, version in described["versions"].items())


def verdict(curves: Mapping[str, Series]) -> Iterator[tuple[bool, str]]:
    """Sentences about the run, each with whether it is a warning."""
    _, losses = curves.get("loss", ([], []))
    if len(losses) >= 10:
        tenth = max(1, len(losses) // 10)
        first, last = statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])
        if last > FALLEN * first:
            yield True, f"The loss has hardly fallen ({first:.3f} to {last:.3f}): try another base_lr, or train longer."
        else:
            yield False, f"The loss fell from {first:.3f} to {last:.3f}."
    _, ranks = curves.get("effective_rank", ([], []))
    if ranks:
        best = max(ranks)
        if ranks[-1] < COLLAPSED * best:
            yield (
                True,
                (
                    f"The effective rank fell from {best:.0f} to {ranks[-1]:.0f}: the embeddings collapse. Lower base_lr, "
                    "or use the checkpoint from before the fall."
                ),
            )
        else:
            yield False, f"The embeddings use about {ranks[-1]:.0f} dimensions (best so far {best:.0f})."
    _, dead = curves.get("dead_channels", ([], []))
    if dead and dead[-1] > DEAD:
        yield True, f"{dead[-1]:.0%} of the channels hardly vary."
    _, accuracies = curves.get("_top1", ([], []))
    if accuracies:
        best = max(accuracies)
        is_bad = accuracies[-1] < best - OVERFIT
        yield is_bad, f"Accuracy on the labelled images is {accuracies[-1]:.1f} % (best so far {best:.1f})."


def _figure(chart: Chart, curve: Series) -> str:
    return f"<figure>{_svg(chart, curve)}<figcaption>{html.escape(chart.reading)}</figcaption></figure>"


def _svg(chart: Chart, curve: Series) -> str:
    """The curve as an SVG element."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MixMIMError("the report needs matplotlib: run pip install matplotlib.") from error
    epochs, values = curve
    with mpl.rc_context({"svg.hashsalt": chart.key, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        noisy = len(values) > 100
        axes.plot(epochs, values, color="#4477aa", linewidth=0.6 if noisy else 1.4, alpha=0.5 if noisy else 1)
        if noisy:
            axes.plot(epochs, smooth(values, len(values) // 40), color="#4477aa", linewidth=1.6)
        axes.set_title(chart.title, loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_yscale("log" if chart.log and min(values) > 0 else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each position."""
    return [statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def _pictures(run: Path) -> Iterator[str]:
    """The first and the latest picture of each kind, under a heading."""
    headings = {
        "neighbours": "Nearest neighbours",
        "reconstructions": "Reconstructions",
    }
    for name, heading in headings.items():
        paths = sorted((run / "samples").glob(f"{name}-epoch-*.png"))
        shown = [paths[-1], paths[0]] if len(paths) > 1 else paths
        if shown:
            yield f"<h2>{heading}</h2><div class='charts'>"
            for path in shown:
                epoch = int(path.stem.rsplit("-", 1)[1])
                yield f"<figure><img alt='{heading} after epoch {epoch}' src='{_data_uri(path)}'/>"
                yield f"<figcaption>after epoch {epoch}</figcaption></figure>"
            yield "</div>"


def _data_uri(path: Path) -> str:
    """The picture as a JPEG data URI, at most 1,200 pixels wide."""
    with Image.open(path) as picture:
        smaller = picture.convert("RGB")
    smaller.thumbnail((1200, 4800))
    buffer = BytesIO()
    smaller.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
