"""RUN/report.html from what the run folder holds; nothing on it is fetched from elsewhere."""

from __future__ import annotations

import base64
import functools
import html
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from mixmim_serve.files import atomic_path
from mixmim_serve.strict_json import read_json
from training.report.chart import draw, short
from training.report.curves import curves, last_epoch
from training.report.reading import CHARTS, Chart, Finding, findings
from training.report.style import STYLE

REPORT = "report.html"
REFRESH = 30  # seconds after which a browser loads the page of a running run again
WIDEST = 1100  # pixels of an embedded picture
HEADINGS = {
    "neighbours": (
        "Nearest neighbours",
        "Eight fixed photos, each followed by the seven whose embeddings are most similar to it. Good features find "
        "the same kind of thing, poor ones the same colour or layout. A green frame is the photo's own folder, orange "
        "another.",
    ),
    "reconstructions": (
        "Reconstructions",
        "Pairs of photos, mixed, and what the network makes of the covered parts. Mean and contrast of each patch are "
        "taken from the original, so look at the shapes: they get sharper for a long time.",
    ),
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>$refresh
<title>$title</title>
<style>$style</style></head><body>
<header><h1>$title</h1><p class="state">$state</p><progress max="$epochs" value="$done"></progress></header>
<ul class="findings">
$findings
</ul>
<h2>Curves</h2>
<div class="charts">
$charts
</div>
$pictures
<h2>The run</h2>
<dl>
$facts
</dl>
</body></html>
""")


def refresh(run: Path, say: Callable[[str], object]) -> None:
    """Write the page; what keeps it from being written is said, and the training goes on."""
    try:
        write_report(run)
    except OSError as error:
        say(f"{run / REPORT} could not be written: {error.strerror or error}")


def write_report(run: Path) -> Path:
    """Write RUN/report.html.

    Raises:
        OSError: it cannot be written, or the run has no config.json.
    """
    about, lines = read_json(run / "config.json"), read_lines(run / "metrics.jsonl")
    task, epochs, done = about["task"], about["config"]["epochs"], last_epoch(lines)
    is_over = done >= epochs
    page = _PAGE.substitute(
        title=html.escape(f"{TITLES.get(task, task)}: {run.absolute().name}"),
        refresh="" if is_over else f'\n<meta http-equiv="refresh" content="{REFRESH}"/>',
        style=STYLE,
        state=html.escape(state(done, epochs)),
        epochs=epochs,
        done=done,
        findings="\n".join(_finding(each) for each in findings(task, epochs, lines)),
        charts="\n".join(_charts(task, lines)) or "<p>Nothing has been logged yet.</p>",
        pictures="\n".join(_pictures(run / "samples", done)),
        facts="\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts(about)),
    )
    with atomic_path(run / REPORT) as path:
        path.write_text(page, encoding="utf-8")
    return run / REPORT


TITLES = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "distill": "Distillation"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none before the first, and without one that is being written."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def state(done: float, epochs: int) -> str:
    """How far the run is."""
    if done >= epochs:
        return f"Finished after {epochs:,} epochs."
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"Epoch {done:g} of {epochs:,}, as of {at}. The page is written again after each epoch."


def facts(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What config.json says of the run, by name."""
    config, images, origin = about["config"], about["images"], about.get("origin", {})
    yield "photos", f"{images['count']:,} in {images['source']}"
    size = f", {config['image_size']} px" if config["image_size"] else ""
    yield "network", f"{config['size'] or 'that of the checkpoint'}{size}"
    yield "starts from", str(origin.get("name", "random weights" if about["start"] == "scratch" else about["start"]))
    yield "epochs", f"{config['epochs']:,}, {config['warmup_epochs']:g} of them warm-up"
    processes = f", over {about['processes']} processes" if about.get("processes", 1) > 1 else ""
    yield "batch", f"{config['batch_size']:,} photos{processes}"
    rate = config["base_lr"] * config["batch_size"] / 256
    yield "learning rate", f"{short(rate)} after warm-up (base_lr {config['base_lr']:g} for a batch of 256)"
    if monitored := min(config.get("monitor", 0), images["count"]):
        yield "measured", f"embeddings of {monitored:,} fixed photos; the effective rank cannot exceed their number"
    yield "command", shlex.join(map(str, about.get("command", ())))
    yield "versions", ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())


def _finding(finding: Finding) -> str:
    kind, sign = ("warning", "!") if finding.is_warning else ("fine", "✓")
    return f'<li class="{kind}"><b aria-hidden="true">{sign}</b> {html.escape(finding.text)}</li>'


def _charts(task: str, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for chart in CHARTS:
        found = curves(lines, chart.metrics) if chart.is_for(task) else []
        if found:
            svg = draw(chart.title, found, log=chart.log, reference=chart.reference)
            caption = f"<figcaption>{html.escape(chart.reading)}</figcaption>"
            yield f"<figure>{_heading(chart, found)}\n{svg}\n{caption}</figure>"


def _heading(chart: Chart, found: Sequence[Any]) -> str:
    """Title and latest value; of several curves a legend with theirs."""
    if len(found) == 1:
        return f"<h3>{chart.title} <output>{short(found[0].last)}{chart.unit}</output></h3>"
    entries = "".join(
        f'<span class="s{number}">{html.escape(curve.label)} <output>{short(curve.last)}{chart.unit}</output></span>'
        for number, curve in enumerate(found)
    )
    return f'<h3>{chart.title}</h3><p class="legend">{entries}</p>'


def _pictures(samples: Path, done: float) -> Iterator[str]:
    """The latest and the first picture of each kind, under a heading; none of epochs that were rewound."""
    for name, (heading, reading) in HEADINGS.items():
        paths = {int(path.stem.rpartition("-")[2]): path for path in samples.glob(f"{name}-epoch-*.png")}
        epochs = sorted(epoch for epoch in paths if epoch <= done)
        if epochs:
            shown = [epochs[-1], epochs[0]] if len(epochs) > 1 else epochs
            figures = "\n".join(_picture(heading, epoch, paths[epoch]) for epoch in shown)
            yield f'<h2>{heading}</h2><p class="reading">{reading}</p><div class="pictures {name}">\n{figures}</div>'


def _picture(heading: str, epoch: int, path: Path) -> str:
    said = f"after epoch {epoch:,}" if epoch else "before the first epoch"
    source = _embedded(path, path.stat().st_mtime_ns)
    return f'<figure><figcaption>{said}</figcaption><img alt="{heading} {said}" src="{source}"/></figure>'


@functools.lru_cache(maxsize=8)
def _embedded(path: Path, _written: int) -> str:
    """The picture as a JPEG data URI; kept, because the same few are on the page after each epoch."""
    with Image.open(path) as picture:
        smaller = picture.convert("RGB")
    smaller.thumbnail((WIDEST, 4 * WIDEST))
    buffer = BytesIO()
    smaller.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
