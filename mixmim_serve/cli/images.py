"""Commands on images: embed, classify, reconstruct."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmim_serve.cli.common import BundleArgument, EngineOption, app, bundle_path, say_passed_over

if TYPE_CHECKING:
    from mixmim_serve.engines import Engine

Seed = Annotated[int, typer.Option(min=0, help="Selects the units that image B covers.")]


@app.command()
def embed(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files, or folders of them.")],
    output: Annotated[Path | None, typer.Option(help="A .npy file: float32, one row per image, in order.")] = None,
    runtime: EngineOption = "auto",
) -> None:
    """Embed images: JSON lines on standard output, or one .npy file.

    Example: mixmim embed tiny examples/hat.jpg --output hat.npy
    """
    import json

    import numpy as np

    from mixmim_serve.engines import engine_fingerprint, open_engine
    from mixmim_serve.files import atomic_path

    vectors = []
    engine = open_engine(bundle_path(bundle), runtime)
    for path, vector in _each_image(engine, images, "embedding"):
        if output is None:
            line = {"path": str(path), "embedding": vector.tolist(), "fingerprint": engine_fingerprint(engine)}
            typer.echo(json.dumps(line))
        else:
            vectors.append(vector)
    if output is not None:
        with atomic_path(output) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack(vectors))


@app.command()
def classify(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes per image.")] = 5,
    runtime: EngineOption = "auto",
) -> None:
    """Classify images: one JSON line per image. The bundle needs a classification head.

    Example: mixmim classify my-bundle examples/hat.jpg --top 3
    """
    import dataclasses
    import json

    from mixmim_serve.engines import open_engine
    from mixmim_serve.tasks import require_head, top_classes

    engine = open_engine(bundle_path(bundle), runtime)
    require_head(engine.bundle)
    for path, logits in _each_image(engine, images, "logits"):
        guesses = [dataclasses.asdict(guess) for guess in top_classes(engine.bundle, logits, top)]
        typer.echo(json.dumps({"path": str(path), "classes": guesses}))


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
    from mixmim_serve.preprocess import preprocess, read_limited
    from mixmim_serve.tasks import reconstruct_pair

    engine = open_engine(bundle_path(bundle), runtime)
    preprocessing = engine.bundle.description.preprocessing
    a, b = (preprocess(read_limited(path), preprocessing) for path in (image_a, image_b))
    panel = draw_panel(reconstruct_pair(engine, a, b, ratio, seed), preprocessing)
    with atomic_path(output) as temporary:
        temporary.write_bytes(png(panel))
    typer.echo(f"wrote {output}")


def _each_image(engine: Engine, images: list[Path], output: str) -> Iterator[tuple[Path, Any]]:
    """One encoder output per image, in order; raises the error of the first unreadable image."""
    from mixmim_serve.extract.pipeline import run_files
    from mixmim_serve.sources.names import expand

    files, passed_over = expand(images)
    say_passed_over(passed_over)
    for result in run_files(engine, files, [output]):
        if result.error:
            raise type(result.error)(f"{result.path}: {result.error}")
        yield result.path, result.outputs[output]
