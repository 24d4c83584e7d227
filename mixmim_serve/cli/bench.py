"""The command `bench`: prints a table, writes JSON and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmim_serve.cli.common import BundleArgument, app, bundle_path, progress_console

if TYPE_CHECKING:
    from mixmim_serve.bench import Report

WIDTH = 110  # characters of the table


@app.command()
def bench(
    bundle: BundleArgument = Path("tiny"),
    batch: Annotated[list[int], typer.Option(min=1, help="Images per call; may be repeated.")] = [1, 8, 32],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration per engine, batch and round.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often engines take turns; the best round counts.")] = 2,
    output: Annotated[Path | None, typer.Option(help="A .json file; a chart is written beside it as .png.")] = None,
) -> None:
    """Benchmark every installed engine: throughput, latency, memory, and agreement with torch.

    Example: mixmim bench tiny --output bench.json
    """
    import dataclasses
    import json

    from rich.console import Console

    from mixmim_serve.bench import bench as measure
    from mixmim_serve.files import atomic_path

    with progress_console().status("") as status:
        report = measure(
            bundle_path(bundle), batches=tuple(batch), seconds=seconds, rounds=rounds, progress=status.update
        )
    console = Console()
    console.width = max(console.width, WIDTH)  # a narrow table would be unreadable, a wide one only wraps
    console.print(_table(report))
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in report.rates.items())
    console.print(f"{report.about['hardware']}; matrix products: {rates} TFLOP/s. Share: the encoder's part of that.")
    for name, reason in report.missing.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    if output:
        with atomic_path(output) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        _draw(report, output.with_suffix(".png"))
        console.print(f"wrote {output} and {output.with_suffix('.png')}", markup=False)


def _table(report: Report) -> object:
    from rich.table import Table

    table = Table(title=f"{report.about['bundle']}, {report.about['gflop_an_image']} GFLOP per image")
    for heading in ("engine", "precision"):
        table.add_column(heading)
    on_gpu = any(row.gpu_memory is not None for row in report.rows)
    gpu_headings = ("GPU MB",) if on_gpu else ()
    for heading in ("batch", "images/s", "p50 ms", "p99 ms", "MB", *gpu_headings, "load s", "cosine", "error", "share"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        share = "" if row.share is None else f"{row.share:.0%}"
        gpu_memory = ("" if row.gpu_memory is None else f"{row.gpu_memory:.0f}",) if on_gpu else ()
        table.add_row(
            row.engine, row.precision, str(row.batch), f"{row.images_per_second:.1f}", f"{row.p50:.1f}",
            f"{row.p99:.1f}", f"{row.memory:.0f}", *gpu_memory, f"{row.load:.2f}",
            f"{row.cosine:.6f}", f"{row.error:.1e}", share,
        )  # fmt: skip
    return table


def _draw(report: Report, target: Path) -> None:
    """Draw bars of images/s, one group per batch size."""
    from io import BytesIO

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from mixmim_serve.files import atomic_path

    batches = sorted({row.batch for row in report.rows})
    engines = list(dict.fromkeys((row.engine, row.precision) for row in report.rows))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.8 / len(engines)
    for number, (engine, precision) in enumerate(engines):
        rows = [row for row in report.rows if (row.engine, row.precision) == (engine, precision)]
        places = [batches.index(row.batch) + (number - (len(engines) - 1) / 2) * width for row in rows]
        bars = axes.bar(places, [row.images_per_second for row in rows], width, label=f"{engine} {precision}")
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("images/s")
    axes.set_title(f"{report.about['bundle']} on {report.about['hardware']}")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    pyplot.close(figure)
    with atomic_path(target) as temporary:
        temporary.write_bytes(buffer.getvalue())
