"""Commands that turn a score into an alarm: calibrate, anomaly, drift."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmim_serve.cli.common import BundleArgument, EngineOption, app, bundle_path, progress_console, say_passed_over

if TYPE_CHECKING:
    from mixmim_serve.errors import ImageError

DataArgument = Annotated[
    str, typer.Argument(metavar="DATA", help="An image file, a folder, list, .tar or .parquet files, or a URL.")
]
RateOption = Annotated[
    float | None,
    typer.Option("--false-alarms", metavar="RATE", help="Share of normal photos to alarm for; default: as calibrated."),
]


@app.command()
def calibrate(
    bundle: BundleArgument,
    normal: Annotated[
        str, typer.Argument(metavar="NORMAL_PHOTOS", help="A folder, list, .tar or .parquet files, or a URL.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="BUNDLE_DIR", help="Write a calibrated copy, and leave BUNDLE as it is.")
    ] = None,
    false_alarms: Annotated[
        float, typer.Option("--false-alarms", metavar="RATE", help="Share of normal photos to call abnormal.")
    ] = 0.01,
    patches: Annotated[int, typer.Option(help="Patches to remember, at most.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Selects the parts and the patches.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle in --output.")] = False,
    runtime: EngineOption = "auto",
) -> None:
    """Write into a bundle what normal photos look like, for `anomaly`, `drift` and POST /anomaly.

    It holds for the engine that it was made with. Use photos that are all normal: 50 at least, better 500.

    Example: mixmim calibrate tiny photos/normal --output bundles/calibrated
    """
    from mixmim_serve.anomaly.calibrate import Options
    from mixmim_serve.anomaly.calibrate import calibrate as run
    from mixmim_serve.anomaly.calibration import store
    from mixmim_serve.anomaly.detector import Detector
    from mixmim_serve.anomaly.rates import caution, percent
    from mixmim_serve.bundle import check_target, open_bundle
    from mixmim_serve.engines import open_engine
    from mixmim_serve.errors import ConfigError
    from mixmim_serve.files import atomic_folder
    from mixmim_serve.sources import open_source

    options = Options(patches, false_alarms, seed=seed)
    path = bundle_path(bundle)
    if output is None and path != bundle:
        raise ConfigError(f"{bundle} is shared: write a calibrated copy with --output BUNDLE_DIR.")
    if output is not None:
        check_target(output, overwrite)
    source = open_source(normal)
    say_passed_over(source.passed_over)
    engine = open_engine(path, runtime)
    with _progress("photos") as advance:
        calibration, failed = run(engine, source, options, lambda done: advance(done, len(source.keys)))
    if output is None:
        store(engine.bundle, calibration)
    else:
        with atomic_folder(output) as folder:
            store(engine.bundle.copy(folder), calibration)
    for key, error in failed:
        _name(key, error)
    detector = Detector(calibration)
    written = open_bundle(output or path)
    about, memory = calibration.about, calibration.memory
    size = f"{about.photos:,} photos, {len(memory.patches):,} patches"
    typer.echo(f"wrote {written.path}: calibrated for {about.engine} on {size}")
    typer.echo(f"threshold {detector.threshold:.3f} at a false-alarm rate of {percent(detector.rate)}")
    typer.echo(f"held-out check, photos beyond the threshold of the others: {detector.held_out_check()}")
    if text := caution(about.photos, detector.rate):
        typer.echo(f"note: {text}", err=True)


@app.command()
def anomaly(
    bundle: BundleArgument,
    data: DataArgument,
    false_alarms: RateOption = None,
    map_: Annotated[bool, typer.Option("--map", help="Add the distance of each place, rows of columns.")] = False,
    overlays: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write each photo with its heat map here, as PNG.")
    ] = None,
    runtime: EngineOption = "auto",
) -> None:
    """Judge photos by a calibrated bundle: one JSON line each with score, percentile and whether it is normal.

    Example: mixmim anomaly bundles/calibrated examples/hat.jpg
    """
    import json

    from mixmim_serve.anomaly.detector import open_detector
    from mixmim_serve.anomaly.heatmap import overlay, overlay_name
    from mixmim_serve.anomaly.photos import open_photos, run_photos
    from mixmim_serve.engines import identity, open_engine
    from mixmim_serve.files import atomic_path
    from mixmim_serve.panel import png

    source = open_photos(data)
    say_passed_over(source.passed_over)
    engine = open_engine(bundle_path(bundle), runtime)
    detector = open_detector(engine, _rate(false_alarms))
    failed = 0
    for group in run_photos(engine, source, detector.outputs):
        failed += len(group.failed)
        for index, error in group.failed:
            _name(source.keys[index], error)
        found = detector.verdicts(group.outputs) if group.indices else []
        for index, pixels, verdict in zip(group.indices, group.pixels, found, strict=True):
            line: dict[str, Any] = {"path": source.keys[index]} | verdict.to_json(with_map=map_)
            if overlays is not None:
                target = overlays / overlay_name(source.keys[index])
                with atomic_path(target) as temporary:
                    temporary.write_bytes(png(overlay(pixels, verdict.places, detector.calibration.places)))
                line["overlay"] = str(target)
            typer.echo(json.dumps(line | identity(engine)))
    if failed:
        raise typer.Exit(1)


@app.command()
def drift(
    bundle: BundleArgument,
    data: DataArgument,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page with the worst photos.")] = None,
    normal_class: Annotated[
        str, typer.Option("--normal", metavar="CLASS", help="The class folder of normal photos: adds AUROC and curve.")
    ] = "",
    false_alarms: RateOption = None,
    worst: Annotated[int, typer.Option(min=1, max=1000, help="Photos with the highest scores to show.")] = 24,
    json_: Annotated[bool, typer.Option("--json", help="Print the full report as JSON.")] = False,
    runtime: EngineOption = "auto",
) -> None:
    """Compare a folder with the normal photos of a calibrated bundle, for a scheduler.

    Exit code 3: more photos are beyond the threshold than the false-alarm rate explains. 4: not so, but their scores
    come from another distribution. 1: neither, but images could not be read; or an error. 0: nothing of these.

    Example: mixmim drift bundles/calibrated photos/today --html today.html
    """
    import json

    from mixmim_serve.anomaly.detector import open_detector
    from mixmim_serve.anomaly.drift import compare, score_source
    from mixmim_serve.anomaly.photos import open_photos
    from mixmim_serve.engines import open_engine
    from mixmim_serve.files import atomic_path

    source = open_photos(data)
    say_passed_over(source.passed_over)
    engine = open_engine(bundle_path(bundle), runtime)
    detector = open_detector(engine, _rate(false_alarms))
    with _progress("photos") as advance:
        scored = score_source(engine, detector, source, worst, lambda done: advance(done, len(source.keys)))
    for key, error in scored.failed:
        _name(key, error)
    report = compare(detector, scored, normal_class)
    if html:
        from mixmim_serve.anomaly.page import drift_page

        title = f"{len(scored.scores):,} photos of {data} against {detector.calibration.about.photos:,} normal ones"
        page = drift_page(f"{title} ({engine.bundle.name})", report, detector.normal, detector.calibration.places)
        with atomic_path(html) as temporary:
            temporary.write_text(page)
        typer.echo(f"wrote {html}", err=True)
    typer.echo(json.dumps(report.to_json(), indent=2) if json_ else "\n".join(report.sentences()))
    raise typer.Exit(int(report.code))


def _rate(false_alarms: float | None) -> float:
    """The rate that was asked for; 0 for that of the calibration.

    Raises:
        ConfigError: for a rate that cannot be one.
    """
    from mixmim_serve.anomaly.rates import check_rate

    return 0.0 if false_alarms is None else check_rate(false_alarms)


def _name(key: str, error: ImageError) -> None:
    """Say on standard error which image cannot be read, and why."""
    typer.echo(f"mixmim: {error}" if key in str(error) else f"mixmim: {key}: {error}", err=True)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A transient progress bar, in a terminal only."""
    from rich.progress import Progress

    with Progress(console=progress_console(), transient=True, disable=not progress_console().is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
