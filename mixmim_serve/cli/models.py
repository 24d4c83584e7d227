"""Commands on checkpoints and bundles: import, export, info, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmim_serve.cli.common import app, bundle_path


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
        bundle = open_bundle(bundle_path(path))
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

    launch(bundle_path(bundle), host, port, engine)
