"""Commands on images: embed, classify, score, reconstruct.

An image that cannot be read is named on standard error and skipped; the others are written, and the exit code is 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmim_serve.cli.common import BundleArgument, EngineOption, app, bundle_path, say_passed_over

if TYPE_CHECKING:
    from mixmim_serve.config import Preprocessing
    from mixmim_serve.engines import Engine
    from mixmim_serve.engines.base import Arrays
    from mixmim_serve.preprocess import Pixels

Seed = Annotated[int, typer.Option(min=0, help="Selects the units that image B covers.")]


@app.command()
def embed(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files, or folders of them.")],
    output: Annotated[
        Path | None, typer.Option(help="A .npy file: float32, one row per image; paths in .json.")
    ] = None,
    runtime: EngineOption = "auto",
) -> None:
    """Embed images: JSON lines on standard output, or one .npy file with the paths in a .json file beside it.

    Example: mixmim embed tiny examples/hat.jpg --output hat.npy
    """
    import json

    from mixmim_serve.engines import identity, open_engine

    paths, vectors = [], []
    engine = open_engine(bundle_path(bundle), runtime)
    with _skipping() as skipped:
        for path, outputs in _each_image(engine, images, ["embedding"], skipped):
            vector = outputs["embedding"]
            if output is None:
                line = {"path": str(path), "embedding": vector.tolist()} | identity(engine)
                typer.echo(json.dumps(line))
            else:
                paths.append(str(path))
                vectors.append(vector)
        if output is not None and vectors:
            _write_vectors(output, paths, vectors, identity(engine))


@app.command()
def classify(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes per image.")] = 5,
    head: Annotated[
        str, typer.Option(help="Name of a head, as `mixmim info` lists them; the default one without.")
    ] = "",
    runtime: EngineOption = "auto",
) -> None:
    """Classify images: one JSON line per image. The bundle needs a classification head.

    Example: mixmim classify tiny examples/hat.jpg --top 3
    """
    import dataclasses
    import json

    from mixmim_serve.engines import open_engine
    from mixmim_serve.heads import read_heads
    from mixmim_serve.tasks import top_classes

    engine = open_engine(bundle_path(bundle), runtime)
    chosen = read_heads(engine.bundle).choose(head)
    with _skipping() as skipped:
        for path, outputs in _each_image(engine, images, chosen.inputs, skipped):
            guesses = [dataclasses.asdict(guess) for guess in top_classes(chosen, chosen.logits(outputs), top)]
            typer.echo(json.dumps({"path": str(path), "classes": guesses} | chosen.identity))


@app.command()
def score(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files, or folders of them.")],
    masks: Annotated[int, typer.Option(min=1, max=16, help="Pairs of masks; each covers every unit once.")] = 2,
    map_: Annotated[bool, typer.Option("--map", help="Add the error of each unit of 32 x 32 pixels.")] = False,
    runtime: EngineOption = "auto",
) -> None:
    """Measure how badly the network reconstructs each image: one JSON line per image, as POST /score answers.

    A high score is not a defect: flat, plain or defective images can score lower than good ones, because they are
    easy to reconstruct; `mixmim anomaly` raises alarms. See docs/serving.md#what-a-score-says.

    Example: mixmim score tiny examples/hat.jpg --map
    """
    import json

    from safetensors.numpy import load_file

    from mixmim_serve.anomaly.detector import detector_if_any
    from mixmim_serve.bundle import GOLDEN
    from mixmim_serve.engines import identity, open_engine
    from mixmim_serve.sources.names import expand
    from mixmim_serve.tasks import partner_of, require_decoder, score_image

    engine = open_engine(bundle_path(bundle), runtime)
    require_decoder(engine.bundle)
    partner = partner_of(load_file(engine.bundle.path / GOLDEN))
    detector = detector_if_any(engine)
    files, passed_over = expand(images)
    say_passed_over(passed_over)
    with _skipping() as skipped:
        for path, pixels in _readable(files, engine.bundle.description.preprocessing, skipped):
            errors = score_image(engine, pixels, partner, masks)
            place = detector.reconstruction_percentile(float(errors.mean()), masks) if detector else {}
            line = {"path": str(path), "score": _short(errors.mean())}
            line |= {name: _short(value) for name, value in place.items()} | ({"map": _short(errors)} if map_ else {})
            typer.echo(json.dumps(line | identity(engine)))
        _count(skipped, files)


def _short(values: Any) -> Any:
    """float32 as JSON numbers in their shortest exact form."""
    return [_short(value) for value in values] if values.ndim else float(str(values))


@app.command()
def reconstruct(
    bundle: BundleArgument,
    image_a: Annotated[Path, typer.Argument(metavar="A", help="The image to cover partly.")],
    image_b: Annotated[Path, typer.Argument(metavar="B", help="The image that covers it.")],
    output: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("panel.png"),
    ratio: Annotated[float, typer.Option(help="Share of units that B covers.")] = 0.5,
    seed: Seed = 0,
    runtime: EngineOption = "auto",
) -> None:
    """Mix two images, reconstruct both, and draw a panel.

    Example: mixmim reconstruct tiny examples/hat.jpg examples/shoes.jpg --output panel.png
    """
    from mixmim_serve.engines import open_engine
    from mixmim_serve.files import atomic_path
    from mixmim_serve.panel import draw_panel, png
    from mixmim_serve.tasks import reconstruct_pair

    engine = open_engine(bundle_path(bundle), runtime)
    preprocessing = engine.bundle.description.preprocessing
    with _skipping() as skipped:  # both are read, so that both are named if neither can be
        pixels = [pixels for _, pixels in _readable([image_a, image_b], preprocessing, skipped)]
    a, b = pixels
    panel = draw_panel(reconstruct_pair(engine, a, b, ratio, seed), preprocessing)
    with atomic_path(output) as temporary:
        temporary.write_bytes(png(panel))
    typer.echo(f"wrote {output}")


def _each_image(
    engine: Engine, images: list[Path], outputs: Sequence[str], skipped: list[Path]
) -> Iterator[tuple[Path, Arrays]]:
    """These encoder outputs of each image, in order; unreadable ones are named and added to `skipped`."""
    from mixmim_serve.extract.pipeline import run_files
    from mixmim_serve.sources.names import expand

    files, passed_over = expand(images)
    say_passed_over(passed_over)
    for result in run_files(engine, files, outputs):
        if result.error:
            skipped.append(result.path)
            _name(result.path, result.error)
        else:
            yield result.path, result.outputs
    _count(skipped, files)


@contextlib.contextmanager
def _skipping() -> Iterator[list[Path]]:
    """Collects the images that are skipped, and ends the command with exit code 1 if there are any."""
    skipped: list[Path] = []
    yield skipped
    if skipped:
        raise typer.Exit(1)


def _count(skipped: Sequence[Path], files: Sequence[Path]) -> None:
    """Say how many images were skipped, if it is one of several."""
    if skipped and len(files) > 1:
        typer.echo(f"mixmim: {len(skipped):,} of {len(files):,} images could not be read and were skipped", err=True)


def _name(path: Path, error: Exception) -> None:
    """Say on standard error which image cannot be read, and why."""
    reason = str(error)
    typer.echo(f"mixmim: {reason}" if str(path) in reason else f"mixmim: {path}: {reason}", err=True)


def _readable(
    paths: Sequence[Path], preprocessing: Preprocessing, skipped: list[Path]
) -> Iterator[tuple[Path, Pixels]]:
    """The pixels of each image, in order; unreadable ones are named and added to `skipped`."""
    from mixmim_serve.errors import ImageError
    from mixmim_serve.preprocess import preprocess, read_limited

    for path in paths:
        try:
            pixels = preprocess(read_limited(path), preprocessing)
        except ImageError as error:
            skipped.append(path)
            _name(path, error)
        else:
            yield path, pixels


def _write_vectors(output: Path, paths: Sequence[str], vectors: Sequence[Any], origin: dict[str, str]) -> None:
    """Write the vectors, and beside them the path of each row and the model and fingerprints of what made them."""
    import json

    import numpy as np

    from mixmim_serve.files import atomic_path

    names = output.with_suffix(".json") if output.suffix == ".npy" else output.with_name(f"{output.name}.json")
    with atomic_path(output) as array, atomic_path(names) as listed:
        with array.open("wb") as file:
            np.save(file, np.stack(vectors))
        listed.write_text(json.dumps(origin | {"paths": paths}, indent=1) + "\n")
    typer.echo(f"wrote {output}: {len(vectors):,} rows of {len(vectors[0])} numbers; their paths are in {names}")
