"""Commands for many images and their features: extract, neighbours, duplicates, map."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmim_serve.cli.common import BundleArgument, EngineOption, app, bundle_path, progress_console, say_passed_over

if TYPE_CHECKING:
    from mixmim_serve.extract.progress import ExtractProgress

PLAIN_EVERY = 10.0  # seconds between lines of progress without a terminal

FeaturesArgument = Annotated[str, typer.Argument(metavar="FEATURES", help="A folder that `mixmim extract` wrote.")]


@app.command()
def extract(
    bundle: BundleArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, list, .tar or .parquet files, or a URL.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write or resume; or a URL.")],
    features: Annotated[list[str] | None, typer.Option(help="Also store stage1 to stage4 or logits.")] = None,
    classes: Annotated[
        bool | None,
        typer.Option("--classes/--no-classes", help="Store each image's class; by default with a model of your own."),
    ] = None,
    head: Annotated[str, typer.Option(help="The head of classes and logits, as `mixmim info` lists them.")] = "",
    format: Annotated[str, typer.Option(help="parquet, npy or lance.")] = "parquet",  # noqa: A002
    float16: Annotated[bool, typer.Option(help="Store float16 instead of float32: half the size.")] = False,
    fast_jpeg: Annotated[bool, typer.Option(help="Decode large JPEGs at reduced resolution.")] = False,
    retry_failed: Annotated[bool, typer.Option(help="Only retry the images that could not be read.")] = False,
    max_failures: Annotated[float, typer.Option(min=0, max=1, help="Stop above this share of failures.")] = 0.1,
    executor: Annotated[str, typer.Option(help="local, or ray on one machine or a cluster.")] = "local",
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE; see docs/extract.md.")] = None,
    runtime: EngineOption = "auto",
) -> None:
    """Embed millions of images into a folder of Parquet files; after a kill the same command resumes.

    Example: mixmim extract tiny photos features
    """
    from mixmim_serve.errors import ConfigError
    from mixmim_serve.extract.job import ExtractJob
    from mixmim_serve.extract.lead import run
    from mixmim_serve.extract.local import LocalExecutor
    from mixmim_serve.extract.options import ExtractOptions, Resources
    from mixmim_serve.settings import override
    from mixmim_serve.signals import stop_signals

    options = ExtractOptions(
        tuple(features or ()),
        format=format,
        dtype="float16" if float16 else "float32",
        fast_jpeg=fast_jpeg,
        classes=classes,
        head=head,
    )
    job = ExtractJob(
        bundle_path(bundle),
        source,
        out,
        runtime,
        options=options,
        effort=Resources(max_failures),
        retry_failed=retry_failed,
    )
    job = override(job, settings or ())
    if executor not in ("local", "ray"):
        raise ConfigError(f"unknown executor {executor!r}: choose local or ray.")
    chosen: Any = LocalExecutor
    if executor == "ray":
        from mixmim_serve.extract.ray import RayExecutor

        chosen = RayExecutor
    # SIGTERM may end it at once: complete shards are kept. Without this, Ctrl-C would wait for the threads' shards.
    with _progress_display() as progress, stop_signals(signal.SIGINT) as stopping:
        summary = run(job, executor=chosen, progress=progress, cancelled=stopping.is_set)
    say_passed_over(summary.passed_over)
    for key, reason in summary.examples:
        typer.echo(f"could not read {key}: {reason}", err=True)
    typer.echo(f"{out}: {summary.rows:,} rows for {summary.images:,} images, {summary.errors:,} could not be read")
    if stopping.is_set() and not summary.complete:
        typer.echo("stopped before the end; the same command resumes", err=True)
        raise typer.Exit(130)


@contextlib.contextmanager
def _progress_display() -> Iterator[Callable[[ExtractProgress], None]]:
    """A progress bar in a terminal, otherwise a line every few seconds."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = progress_console()
    if not console.is_terminal:
        yield _ProgressLines(lambda line: console.print(line, highlight=False, soft_wrap=True))
        return
    columns = TextColumn("extract"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None, text="")
        yield lambda now: bar.update(task, total=now.total, completed=now.done, text=str(now))


class _ProgressLines:
    """Writes progress as lines, at most one every PLAIN_EVERY seconds."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.last = write, time.monotonic()

    def __call__(self, now: ExtractProgress) -> None:
        if time.monotonic() - self.last >= PLAIN_EVERY:
            self.last = time.monotonic()
            self.write(f"{now.done:,} of {now.total:,}  {now}")


@app.command()
def neighbours(
    features: FeaturesArgument,
    query: Annotated[Path, typer.Argument(metavar="QUERY", help="An image file.")],
    top: Annotated[int, typer.Option(min=1, help="Number of images.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page with the pictures.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="The bundle of the features, if it has moved.")] = None,
) -> None:
    """Find the images nearest to a query image by cosine similarity: JSON lines, nearest first.

    Example: mixmim neighbours features examples/hat.jpg --html hats.html
    """
    import json

    from mixmim_serve.explore import neighbours as nearest
    from mixmim_serve.explore import pages
    from mixmim_serve.extract.features import FeatureFolder, embed_query
    from mixmim_serve.preprocess import decode, read_limited

    opened = FeatureFolder(features)
    data = read_limited(query)
    vector = embed_query(opened.manifest, data, bundle and bundle_path(bundle))
    with _progress_bar("rows", len(opened)) as progress:
        matches = nearest.neighbours(opened, vector, top, progress=progress)
    if html:
        picture = pages.Picture(pages.data_uri(pages.shrink(decode(data))), query.name)
        pictures = pages.pictures(opened, [(match.key, match.cosine) for match in matches])
        title = f"Nearest to {query.name} ({opened.model})"
        _write(html, pages.gallery(title, [("query", [picture]), (f"in {features}", pictures)]))
    for match in matches:
        typer.echo(json.dumps({"key": match.key, "cosine": round(match.cosine, 6)}))


@app.command()
def duplicates(
    features: FeaturesArgument,
    threshold: Annotated[
        float | None, typer.Option(help="Cosine from which two images are duplicates; default: chosen from the data.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page with the largest groups.")] = None,
) -> None:
    """Find near-duplicates by cosine similarity, exactly: groups as JSON lines, largest first.

    Example: mixmim duplicates features --html duplicates.html
    """
    import json

    from mixmim_serve.explore.duplicates import check_threshold
    from mixmim_serve.explore.duplicates import duplicates as find
    from mixmim_serve.explore.duplicates_page import duplicates_page
    from mixmim_serve.explore.threshold import choose, suspicion
    from mixmim_serve.extract.features import FeatureFolder

    if threshold is not None:
        check_threshold(threshold)
    opened = FeatureFolder(features)
    with _progress_bar("nearest", len(opened)) as progress:
        choice = choose(opened, progress).replaced(threshold)
    with _progress_bar("pairs", len(opened) ** 2 // 2) as progress:
        groups = find(opened, choice.threshold, progress)
    for group in groups:
        typer.echo(json.dumps({"keys": group.keys, "cosines": [round(cosine, 6) for cosine in group.cosines]}))
    copies = sum(len(group.keys) - 1 for group in groups)
    typer.echo(f"threshold {choice.threshold:.6g}, {choice.reason}", err=True)
    typer.echo(f"{len(groups):,} groups; {copies:,} of {len(opened):,} images duplicate an earlier one", err=True)
    if warning := suspicion(groups, choice):
        typer.echo(f"warning: {warning}", err=True)
    if html:
        _write(html, duplicates_page(f"Near-duplicates in {features} ({opened.model})", opened, groups, choice))


@app.command("map")
def draw_map(
    features: FeaturesArgument,
    html: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("map.html"),
    images: Annotated[int, typer.Option(min=4, help="Maximum number of images, sampled evenly.")] = 3000,
    labels: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Columns to colour by: path,label,... a row for each image.")
    ] = None,
    colour: Annotated[
        str, typer.Option(metavar="COLUMN", help="Colour by this column first; the page offers all of them.")
    ] = "",
) -> None:
    """Draw a t-SNE map of the images: an HTML page to zoom and pan.

    Example: mixmim map features --html map.html --labels labels.csv
    """
    from mixmim_serve.explore import columns as known
    from mixmim_serve.explore.map import layout, sampled_rows
    from mixmim_serve.explore.map_page import map_page, map_pictures
    from mixmim_serve.extract.features import FeatureFolder
    from mixmim_serve.sources import open_source

    opened = FeatureFolder(features)
    rows = sampled_rows(opened, images)
    keys = opened.keys(rows)
    columns, labelled = known.read_csv(labels, keys) if labels else ([], 0)
    source = open_source(opened.manifest["source"]["name"])
    columns = known.unique_names([*columns, *known.known_columns(opened, source, rows, keys)])
    first = known.chosen(columns, colour)
    if labelled < len(keys) and labels:
        typer.echo(f"{labels} names {labelled:,} of the {len(keys):,} images; the others have no value", err=True)
    with progress_console().status("t-SNE"):
        positions = layout(opened, images)
    title = f"{len(keys):,} of {len(opened):,} images in {features} ({opened.model})"
    _write(html, map_page(title, positions, map_pictures(opened, keys), columns, first))


@contextlib.contextmanager
def _progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A transient progress bar, in a terminal only."""
    from rich.progress import Progress as Bar

    with Bar(console=progress_console(), transient=True, disable=not progress_console().is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _write(path: Path, page: str) -> None:
    from mixmim_serve.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(page)
    typer.echo(f"wrote {path}", err=True)
