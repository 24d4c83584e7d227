"""The `mixmim` command. Each body builds a config and calls one function; heavy imports live inside the bodies."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmim_serve.errors import MixMIMError

if TYPE_CHECKING:
    from mixmim_serve.engines import Engine

app = typer.Typer(
    name="mixmim",
    help="MixMIM backbones: pretrain on your own photos, export, embed, classify, reconstruct, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, or the name of a shipped one: tiny.")
]
Seed = Annotated[int, typer.Option(min=0, help="Chooses the units that image B covers.")]

# Which extra brings a package that a command turned out to need.
EXTRAS = {
    "torch": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "pyarrow": "extract",
}


def main() -> None:
    """Run the command; errors of ours are one sentence on standard error and exit code 1."""
    warnings.filterwarnings("ignore", module="PIL")  # of odd files that decode all the same
    try:
        app()
    except MixMIMError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs {error.name}: run pip install 'mixmim-serve[{extra}]'.")
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}.")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="An official or mmpretrain checkpoint (.pth).")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Where to write ours.")],
    image_size: Annotated[int, typer.Option(help="Carry the weights to this input size, in pixels.")] = 0,
    decoder_heads: Annotated[int, typer.Option(help="Attention heads of the decoder, when not the published 16.")] = 0,
) -> None:
    """Read a released checkpoint; pickled code is never run.

    Example: mixmim import mixmim_base.pth base.safetensors
    """
    from mixmim_serve.model.released import import_checkpoint

    imported = import_checkpoint(source, target, image_size, decoder_heads)
    for note in imported.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {target}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .safetensors checkpoint of ours.")],
    bundle_dir: Annotated[Path, typer.Argument(metavar="BUNDLE_DIR", help="The folder to write.")],
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Store weights in fp16 (half the size); computing stays float32.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
) -> None:
    """Turn a checkpoint into a bundle, checked against torch on real photos.

    Example: mixmim export runs/tiny/final.safetensors bundles/tiny
    """
    from export.build import export_bundle

    exported = export_bundle(checkpoint, bundle_dir, half_weights=half_weights, overwrite=overwrite)
    worst = max(exported.differences.values())
    typer.echo(
        f"wrote {bundle_dir}  fingerprint {exported.bundle.fingerprint}  ONNX Runtime = torch within {worst:.1e}"
    )


@app.command()
def info(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT|BUNDLE_DIR", help="What to describe.")],
) -> None:
    """Say what a checkpoint or bundle is, as JSON; a bundle's files are compared with their checksums.

    Example: mixmim info tiny
    """
    import json

    from mixmim_serve.bundle import open_bundle
    from mixmim_serve.config import size_name
    from mixmim_serve.description import read_description

    if path.is_file():
        description = read_description(path)
        about: dict[str, Any] = {"checkpoint": str(path)}
    else:
        bundle = open_bundle(_bundle_path(path))
        bundle.verify()
        description = bundle.description
        about = {
            "bundle": str(bundle.path),
            "fingerprint": bundle.fingerprint,
            "precision": bundle.precision,
            "outputs": bundle.graphs,
            "versions": bundle.versions,
        }
    typer.echo(json.dumps(about | {"size": size_name(description.arch)} | description.to_dict(), indent=2))


@app.command()
def embed(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Files; a folder counts as its images.")],
    output: Annotated[Path | None, typer.Option(help="A .npy file: float32, one row an image, in order.")] = None,
) -> None:
    """Embed images: JSON lines on standard output, or one .npy file.

    Example: mixmim embed tiny examples/hat.jpg --output hat.npy
    """
    import json

    import numpy as np

    from mixmim_serve.engines import open_engine
    from mixmim_serve.files import atomic_path

    vectors = []
    engine = open_engine(_bundle_path(bundle))
    for path, vector in _each_image(engine, images, "embedding"):
        if output is None:
            line = {"path": str(path), "embedding": vector.tolist(), "fingerprint": engine.bundle.fingerprint}
            typer.echo(json.dumps(line))
        else:
            vectors.append(vector)
    if output is not None:
        with atomic_path(output) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack(vectors))


@app.command()
def classify(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Files; a folder counts as its images.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
) -> None:
    """Classify images, one JSON line each; the bundle needs a head.

    Example: mixmim classify my-bundle examples/hat.jpg --top 3
    """
    import dataclasses
    import json

    from mixmim_serve.engines import open_engine
    from mixmim_serve.tasks import require_head, top_classes

    engine = open_engine(_bundle_path(bundle))
    require_head(engine.bundle)
    for path, logits in _each_image(engine, images, "logits"):
        guesses = [dataclasses.asdict(guess) for guess in top_classes(engine.bundle, logits, top)]
        typer.echo(json.dumps({"path": str(path), "classes": guesses}))


@app.command()
def reconstruct(
    bundle: BundleArgument,
    image_a: Annotated[Path, typer.Argument(metavar="A", help="The image that is partly covered.")],
    image_b: Annotated[Path, typer.Argument(metavar="B", help="The image that covers it.")],
    output: Annotated[Path, typer.Option(help="The panel to write.")] = Path("panel.png"),
    ratio: Annotated[float, typer.Option(help="Share of units that B covers.")] = 0.5,
    seed: Seed = 0,
) -> None:
    """Mix two images, let the network complete both, and draw a panel.

    Example: mixmim reconstruct tiny examples/hat.jpg examples/shoes.jpg --output panel.png
    """
    from mixmim_serve.engines import open_engine
    from mixmim_serve.files import atomic_path
    from mixmim_serve.panel import draw_panel, png
    from mixmim_serve.preprocess import preprocess, read_limited
    from mixmim_serve.tasks import reconstruct_pair

    engine = open_engine(_bundle_path(bundle))
    preprocessing = engine.bundle.description.preprocessing
    a, b = (preprocess(read_limited(path), preprocessing) for path in (image_a, image_b))
    panel = draw_panel(reconstruct_pair(engine, a, b, ratio, seed), preprocessing)
    with atomic_path(output) as temporary:
        temporary.write_bytes(png(panel))
    typer.echo(f"wrote {output}")


@app.command()
def extract(
    bundle: BundleArgument,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of images, at any depth.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="The file to write.")],
) -> None:
    """Embed a folder into one Parquet file (path, embedding); unreadable images are named and skipped.

    Example: mixmim extract tiny photos features.parquet
    """
    from rich.progress import track

    from mixmim_serve.engines import open_engine
    from mixmim_serve.extract.parquet import write_parquet
    from mixmim_serve.extract.run import run_files
    from mixmim_serve.images import list_images

    engine = open_engine(_bundle_path(bundle))
    paths = list_images(source)
    errors: list[str] = []

    def results() -> Any:
        for result in track(run_files(engine, paths, ["embedding"]), "extract", len(paths), console=_console()):
            if result.error:
                errors.append(f"{result.path}: {result.error}")
            yield result

    rows = write_parquet(results(), engine.bundle, source, target)
    for error in errors:
        typer.echo(f"skipped {error}", err=True)
    typer.echo(f"wrote {rows} embeddings to {target}, skipped {len(errors)}")


@app.command()
def pretrain(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="A folder of photos, at any depth; no labels needed.")
    ],
    out: Annotated[Path, typer.Option(metavar="RUN_DIR", help="The run folder; must be new or empty.")],
    recipe: Annotated[str, typer.Option(help="tiny-cpu or base-600ep.")] = "tiny-cpu",
    size: Annotated[str | None, typer.Option(help="tiny, base, base-384, large, large-384 or huge.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Input size in pixels, a multiple of 32.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode images.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in RUN_DIR.")] = False,
) -> None:
    """Pretrain a backbone on your own photos.

    Example: mixmim pretrain photos --out runs/tiny
    """
    import dataclasses

    from training.recipes import recipe as named_recipe
    from training.trainer import pretrain as run

    given: dict[str, Any] = {
        "size": size,
        "image_size": image_size,
        "epochs": epochs,
        "batch_size": batch_size,
        "workers": workers,
    }
    config = named_recipe(recipe)
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if epochs is not None:  # keep the recipe's share of warm-up
        changes["warmup_epochs"] = config.warmup_epochs * epochs / config.epochs
    final = run(dataclasses.replace(config, **changes), images, out, _console(), resume=resume)
    if final is not None:
        typer.echo(f"wrote {final}; next: mixmim export {final} BUNDLE_DIR")


@app.command()
def serve(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, or the name of a shipped one.")
    ] = Path("tiny"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    engine: Annotated[str, typer.Option(help="onnx or torch.")] = "onnx",
) -> None:
    """Serve a bundle over HTTP; ready when GET /readyz answers 200.

    Example: mixmim serve tiny --port 3000
    """
    from mixmim_serve.service.launch import launch

    launch(_bundle_path(bundle), host, port, engine)


def _each_image(engine: Engine, images: list[Path], output: str) -> Iterator[tuple[Path, Any]]:
    """One encoder output of each image, in order; the first that cannot be read ends the command."""
    from mixmim_serve.extract.run import run_files
    from mixmim_serve.images import expand

    for result in run_files(engine, expand(images), [output]):
        if result.error:
            raise type(result.error)(f"{result.path}: {result.error}")
        yield result.path, result.outputs[output]


def _bundle_path(path: Path) -> Path:
    """The folder itself, or a shipped bundle by its name."""
    shipped = Path(__file__).parent / "bundles" / path
    return shipped if not path.exists() and shipped.is_dir() else path


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _fail(message: str) -> None:
    typer.echo(f"mixmim: {message}", err=True)
    sys.exit(1)
