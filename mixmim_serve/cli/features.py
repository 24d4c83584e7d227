"""Commands on many images and their features: extract, neighbours, duplicates, map."""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmim_serve.cli.common import BundleArgument, EngineOption, app, bundle_path, progress_console

if TYPE_CHECKING:
    from mixmim_serve.extract.progress import Progress

PLAIN_EVERY = 10.0  # seconds between two lines of progress where there is no terminal
GROUPS_SHOWN, DOUBLES_SHOWN = 100, 24  # on a page: of each group so many

FeaturesArgument = Annotated[str, typer.Argument(metavar="FEATURES", help="A folder that `mixmim extract` wrote.")]


@app.command()
def extract(
    bundle: BundleArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, list, .tar or .parquet files; or a URL.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write, or go on with; or a URL.")],
    features: Annotated[list[str] | None, typer.Option(help="Also stage1 to stage4 or logits; several times.")] = None,
    format: Annotated[str, typer.Option(help="parquet, npy or lance.")] = "parquet",  # noqa: A002
    float16: Annotated[bool, typer.Option(help="Store half as many bytes.")] = False,
    fast_jpeg: Annotated[bool, typer.Option(help="Decode large JPEGs at a fraction of their size.")] = False,
    retry_failed: Annotated[bool, typer.Option(help="Only the images that could not be read before.")] = False,
    max_failures: Annotated[float, typer.Option(min=0, max=1, help="A larger share of bad images stops it.")] = 0.1,
    executor: Annotated[str, typer.Option(help="local, or ray: on one machine or a cluster.")] = "local",
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value; docs/extract.md has them.")] = None,
    runtime: EngineOption = "auto",
) -> None:
    """Embed millions of images into a folder of Parquet files. The same command goes on with what was killed.

    Example: mixmim extract tiny photos features
    """
    from mixmim_serve.errors import ConfigError
    from mixmim_serve.extract.job import Job
    from mixmim_serve.extract.lead import run
    from mixmim_serve.extract.local import LocalExecutor
    from mixmim_serve.extract.options import Options, Resources
    from mixmim_serve.settings import override
    from mixmim_serve.signals import stop_signals

    options = Options(
        tuple(features or ()), format=format, dtype="float16" if float16 else "float32", fast_jpeg=fast_jpeg
    )
    job = Job(
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
    # SIGTERM may end it at once: nothing that is whole is lost. Ctrl-C would wait for the threads' shards.
    with _shown() as progress, stop_signals(signal.SIGINT) as stopping:
        summary = run(job, executor=chosen, progress=progress, cancelled=stopping.is_set)
    for key, reason in summary.examples:
        typer.echo(f"could not read {key}: {reason}", err=True)
    typer.echo(f"{out}: {summary.rows:,} rows of {summary.images:,} images, {summary.errors:,} could not be read")
    if stopping.is_set() and not summary.complete:
        typer.echo("stopped before the end; the same command goes on", err=True)
        raise typer.Exit(130)


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """A bar in a terminal, else a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = progress_console()
    if not console.is_terminal:
        yield _Plain(lambda line: console.print(line, highlight=False, soft_wrap=True))
        return
    columns = TextColumn("extract"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None, text="")
        yield lambda now: bar.update(task, total=now.total, completed=now.done, text=str(now))


class _Plain:
    """Progress as lines."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.last = write, time.monotonic()

    def __call__(self, now: Progress) -> None:
        if time.monotonic() - self.last >= PLAIN_EVERY:
            self.last = time.monotonic()
            self.write(f"{now.done:,} of {now.total:,}  {now}")


@app.command()
def neighbours(
    features: FeaturesArgument,
    query: Annotated[Path, typer.Argument(metavar="QUERY", help="An image file.")],
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page of pictures.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="The bundle of the features, where it lies elsewhere now.")
    ] = None,
) -> None:
    """Find the images nearest to one, by cosine: JSON lines, the nearest first.

    Example: mixmim neighbours features examples/hat.jpg --html hats.html
    """
    import json

    from mixmim_serve.explore import neighbours as nearest
    from mixmim_serve.explore import pages
    from mixmim_serve.extract.features import Features, embed_query
    from mixmim_serve.preprocess import decode, read_limited

    opened = Features(features)
    data = read_limited(query)
    vector = embed_query(opened.manifest, data, bundle and bundle_path(bundle))
    with _rows("rows", len(opened)) as progress:
        found = nearest.neighbours(opened, vector, top, progress=progress)
    if html:
        asked = pages.Picture(pages.data_uri(pages.shrink(decode(data))), query.name)
        near = pages.pictures(opened, [(each.key, each.cosine) for each in found])
        _write(html, pages.gallery(f"Nearest to {query.name}", [("query", [asked]), (f"in {features}", near)]))
    for each in found:
        typer.echo(json.dumps({"key": each.key, "cosine": round(each.cosine, 6)}))


@app.command()
def duplicates(
    features: FeaturesArgument,
    threshold: Annotated[float, typer.Option(help="Cosine from which two images are doubles.")] = 0.995,
    html: Annotated[Path | None, typer.Option(help="Write a page of pictures, of the largest groups.")] = None,
) -> None:
    """Find near-doubles by cosine, exactly: groups as JSON lines, the largest first.

    Example: mixmim duplicates features --html doubles.html
    """
    import json

    from mixmim_serve.explore import pages
    from mixmim_serve.explore.duplicates import duplicates as find
    from mixmim_serve.extract.features import Features

    opened = Features(features)
    with _rows("pairs", len(opened) ** 2 // 2) as progress:
        groups = find(opened, threshold, progress)
    if html and groups:
        shown = [list(zip(group.keys, group.cosines, strict=True))[:DOUBLES_SHOWN] for group in groups[:GROUPS_SHOWN]]
        made = iter(pages.pictures(opened, [each for group in shown for each in group]))
        sections = [(f"{len(group)} images", list(itertools.islice(made, len(group)))) for group in shown]
        _write(html, pages.gallery(f"Near-doubles in {features}", sections))
    for group in groups:
        typer.echo(json.dumps({"keys": group.keys, "cosines": [round(cosine, 6) for cosine in group.cosines]}))
    double = sum(len(group.keys) - 1 for group in groups)
    typer.echo(f"{len(groups):,} groups; {double:,} of {len(opened):,} images have a double before them", err=True)


@app.command("map")
def draw_map(
    features: FeaturesArgument,
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("map.html"),
    images: Annotated[int, typer.Option(min=4, help="On the map at most, evenly from all.")] = 3000,
) -> None:
    """Draw the images where t-SNE puts their embeddings: a page to zoom and move in.

    Example: mixmim map features --html map.html
    """
    from mixmim_serve.explore import pages
    from mixmim_serve.explore.map import layout
    from mixmim_serve.extract.features import Features

    opened = Features(features)
    with progress_console().status("t-SNE"):
        found = layout(opened, images)
    small = pages.thumbnails(opened, found.keys, pages.ON_MAP)
    _write(html, pages.map_page(f"{len(found.keys):,} of {len(opened):,} images in {features}", found, small))


@contextlib.contextmanager
def _rows(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for what takes long; gone when it is done."""
    from rich.progress import Progress as Bar

    with Bar(console=progress_console(), transient=True, disable=not progress_console().is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _write(path: Path, page: str) -> None:
    from mixmim_serve.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(page)
    typer.echo(f"wrote {path}", err=True)
