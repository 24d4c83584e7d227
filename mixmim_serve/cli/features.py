"""Commands on many images and their features: extract, neighbours, duplicates, map."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmim_serve.cli.common import BundleArgument, EngineOption, app, bundle_path, progress_console

if TYPE_CHECKING:
    from mixmim_serve.extract.progress import Progress

PLAIN_EVERY = 10.0  # seconds between two lines of progress where there is no terminal


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
    from mixmim_serve.extract import job as jobs
    from mixmim_serve.extract.options import Effort, Options
    from training.settings import apply

    options = Options(
        tuple(features or ()), format=format, dtype="float16" if float16 else "float32", fast_jpeg=fast_jpeg
    )
    job = jobs.Job(
        bundle_path(bundle),
        source,
        out,
        runtime,
        options=options,
        effort=Effort(max_failures),
        retry_failed=retry_failed,
    )
    job = apply(job, settings or ())
    if executor not in ("local", "ray"):
        raise ConfigError(f"unknown executor {executor!r}: choose local or ray.")
    chosen: Any = jobs.local
    if executor == "ray":
        from mixmim_serve.extract.ray import RayExecutor

        chosen = RayExecutor
    with _shown() as progress:
        summary = jobs.run(job, executor=chosen, progress=progress)
    for key, reason in summary.examples:
        typer.echo(f"could not read {key}: {reason}", err=True)
    typer.echo(f"{out}: {summary.rows:,} rows of {summary.images:,} images, {summary.errors:,} could not be read")


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
