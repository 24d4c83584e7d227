"""Commands on checkpoints and bundles: import, export, info, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmim_serve.cli.common import BundleArgument, EngineOption, app, bundle_path, progress_console


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A released checkpoint of MixMIM, Swin or PVT.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The checkpoint to write.")],
    image_size: Annotated[int, typer.Option(help="Resize the weights to this input size, in pixels.")] = 0,
    decoder_heads: Annotated[int, typer.Option(help="Attention heads of the decoder, if not the published 16.")] = 0,
    window: Annotated[int, typer.Option(help="Resize the bias tables to windows of this many tokens.")] = 0,
) -> None:
    """Convert a released checkpoint; pickled code is never executed.

    From the official repositories, mmpretrain, timm or transformers, found by its keys.

    Example: mixmim import mixmim_base.pth base.safetensors
    """
    from mixmim_serve.model.released import import_checkpoint

    imported = import_checkpoint(source, target, image_size, decoder_heads, window)
    for note in imported.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {target}")


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT|RUN", help="A .safetensors checkpoint, or the folder of a run.")
    ],
    bundle_dir: Annotated[Path, typer.Argument(metavar="BUNDLE_DIR", help="The bundle folder to write.")],
    precision: Annotated[
        list[str], typer.Option(help="Precision of the graphs: fp32, fp16 or bf16; may be repeated.")
    ] = ["fp32"],  # noqa: B006 - typer wants a list
    target: Annotated[
        list[str], typer.Option(help="Runtimes: onnx, openvino, tensorrt or tensorrt-rtx; may be repeated.")
    ] = ["onnx"],  # noqa: B006
    batches: Annotated[
        tuple[int, int, int], typer.Option(metavar="MIN OPT MAX", help="TensorRT's batch sizes; OPT is fastest.")
    ] = (1, 8, 32),
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPUs to compile for, such as 8.9 (tensorrt-rtx only).")
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="A file that speeds up TensorRT's next build.")] = None,
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Store the weights in fp16, at half the size.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    name: Annotated[str, typer.Option(help="The model's name in answers and messages, if not BUNDLE_DIR's.")] = "",
    store: Annotated[str, typer.Option(help="Also save it in BentoML's model store as NAME or NAME:VERSION.")] = "",
) -> None:
    """Export a checkpoint as a bundle, verified against torch on real photos.

    Of a run, the final checkpoint; before it has one, the newest. The bundle is named after its folder.

    Example: mixmim export runs/mine bundles/mine --precision fp32 --precision fp16
    """
    from mixmim_serve.publish.store import check_new_tag, store_bundle
    from mixmim_serve.runs import checkpoint_of

    if store:
        check_new_tag(store)  # fail before torch loads and minutes of work
    run, (checkpoint, is_final) = checkpoint, checkpoint_of(checkpoint)
    from export.build import Options, export_bundle
    from export.tensorrt import EngineOptions

    engine = EngineOptions(batches=batches, capabilities=tuple(compute_capability or ()), timing_cache=timing_cache)
    options = Options(tuple(precision), tuple(target), half_weights, overwrite, engine, name)
    if not is_final:
        typer.echo(f"{run} is not finished: exporting its newest checkpoint, {checkpoint.name}", err=True)
    with progress_console().status("reading the checkpoint") as status:
        exported = export_bundle(checkpoint, bundle_dir, options, status.update)
    typer.echo(f"wrote {bundle_dir}: model {exported.bundle.name}, model fingerprint {exported.bundle.fingerprint}")
    for name, outputs in exported.agreement.items():
        cosine = min(agreement.cosine for agreement in outputs.values())
        error = max(agreement.error for agreement in outputs.values())
        typer.echo(f"{name}: cosine with torch at least {cosine:.6f}, error at most {error:.1e} of the largest value")
    if store:
        typer.echo(f"stored as {store_bundle(exported.bundle, store)}")


@app.command()
def info(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT|BUNDLE", help="What to describe.")],
) -> None:
    """Describe a checkpoint or bundle as JSON; a bundle's checksums are verified.

    Example: mixmim info tiny
    """
    import dataclasses
    import json

    from mixmim_serve.anomaly.calibration import abouts
    from mixmim_serve.bundle import open_bundle
    from mixmim_serve.config import size_name
    from mixmim_serve.description import read_description
    from mixmim_serve.engines.certificate import certificates
    from mixmim_serve.heads import read_heads

    if path.is_file():
        description = read_description(path)
        facts: dict[str, Any] = {"checkpoint": str(path)}
    else:
        bundle = open_bundle(bundle_path(path))
        bundle.verify()
        description = bundle.description
        facts = {
            "bundle": str(bundle.path),
            "name": bundle.name,
            "fingerprint": bundle.fingerprint,
            "model_fingerprint": bundle.fingerprint,
            "weights": bundle.weights,
            "precisions": bundle.precisions,
            "built": [dataclasses.asdict(engine) for engine in bundle.built],
            "outputs": bundle.graphs,
            "heads": read_heads(bundle).describe(),
            "versions": bundle.versions,
            "calibrations": [dataclasses.asdict(about) for about in abouts(bundle)],
            "certificates": [certificate.summary() for certificate in certificates(bundle)],
        }
    typer.echo(json.dumps(facts | {"size": size_name(description.arch)} | description.to_dict(), indent=2))


@app.command()
def serve(
    bundle: BundleArgument = Path("tiny"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    engine: EngineOption = "auto",
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with one API key per line; requests must then send one of them.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Allow browser requests from pages of this origin.")
    ] = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    jobs_root: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Accept extraction jobs over HTTP for images below it.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A limit or timeout; see docs/serving.md.")
    ] = None,
) -> None:
    """Serve a bundle over HTTP; ready when GET /readyz returns 200, interactive documentation at /docs.

    Example: mixmim serve tiny --port 3000 --set max_items=128
    """
    from mixmim_serve.service.server import launch
    from mixmim_serve.service.settings import from_assignments

    options = {"api_keys": str(api_keys or ""), "cors": tuple(cors or ()), "log_format": log_format}
    settings = from_assignments(set_ or [], jobs_roots=tuple(jobs_root or ()), **options)
    launch(bundle_path(bundle), host, port, engine, settings)
