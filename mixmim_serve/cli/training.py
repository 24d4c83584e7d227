"""Commands that need torch: pretrain, finetune, probe, evaluate, check, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmim_serve.cli.common import app, bundle_path, first_process, progress_console
from mixmim_serve.cli.environment import prepare_training

DATA = "a folder of any depth, tar shards, Parquet files, or a list of paths; local or a URL"
Out = Annotated[Path, typer.Option(metavar="RUN", help="The run folder; must be new or empty.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any field of the recipe."),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the images; warm-up keeps its share.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per update, over all processes.")]
ImageSize = Annotated[int | None, typer.Option(help="Input size in pixels, a multiple of 32.")]
Workers = Annotated[int | None, typer.Option(help="Processes that decode images.")]
Track = Annotated[list[str] | None, typer.Option(help="Also log to mlflow or wandb, besides TensorBoard.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in RUN.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in RUN.")]
From = Annotated[Path, typer.Option("--from", metavar="CHECKPOINT", help="A checkpoint, a bundle, a RUN, or tiny.")]
Val = Annotated[str, typer.Option(help="Validation images; default: DATA/val if DATA/train exists.")]


@app.command()
def pretrain(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos, without labels: {DATA}.")],
    out: Out,
    start: Annotated[
        str, typer.Option("--from", metavar="CHECKPOINT", help="Go on from a checkpoint, a bundle, a RUN, or tiny.")
    ] = "",
    new_decoder: Annotated[bool, typer.Option("--new-decoder", help="Take only the encoder of --from.")] = False,
    recipe: Annotated[str, typer.Option(help="tiny-cpu, tiny-continue-cpu (default with --from) or base-600ep.")] = "",
    size: Annotated[str | None, typer.Option(help="tiny, base, base-384, large, large-384 or huge.")] = None,
    image_size: ImageSize = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    knn: Annotated[str, typer.Option(metavar="DATA", help="Labelled photos (train, val) for k-NN accuracy.")] = "",
    settings: Set = None,
    track: Track = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Pretrain a backbone on your own photos.

    Example: mixmim pretrain photos --from tiny --out runs/mine
    """
    prepare_training()
    from mixmim_serve.errors import ConfigError, DataError
    from mixmim_serve.sources import open_source
    from training.evaluation.labelled import open_labelled
    from training.pretraining import Pretraining
    from training.recipes import PRETRAIN
    from training.recipes import recipe as named_recipe
    from training.start import SCRATCH, read_start
    from training.trainer import train

    start = "" if start == SCRATCH else start
    if new_decoder and not start:
        raise ConfigError("--new-decoder needs --from: without it encoder and decoder are both new.")
    if start and size is None:
        size = ""  # the checkpoint's own, whatever the recipe says
    options = {"size": size, "image_size": image_size, "batch_size": batch_size, "workers": workers}
    chosen = recipe or ("tiny-continue-cpu" if start else "tiny-cpu")
    config = _with_options(named_recipe(chosen, PRETRAIN), options, epochs, settings)
    source, checkpoint = open_source(data), read_start(bundle_path(Path(start))) if start else None
    labelled = None
    if knn:
        train_part, val_part = open_labelled(knn)
        if val_part is None:
            raise DataError(f"{knn} has no folders train and val: k-NN needs reference images and queries.")
        labelled = train_part, val_part
    _print_config(config)
    task = Pretraining(config, source, labelled, start=checkpoint, new_decoder=new_decoder)
    if task.loaded and not resume:
        progress_console().print(task.loaded, soft_wrap=True, highlight=False, markup=False)
    final = train(task, source, out, progress_console(), resume=resume, overwrite=overwrite, trackers=track or ())
    if final is not None and first_process():
        typer.echo(f"wrote {final}; next: mixmim export {final} BUNDLE_DIR")


@app.command()
def finetune(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos in one folder per class: {DATA}.")],
    start: Annotated[
        str, typer.Option("--from", metavar="CHECKPOINT", help="A checkpoint, a bundle, a RUN, tiny, or scratch.")
    ],
    out: Out,
    val: Val = "",
    recipe: Annotated[str, typer.Option(help="tiny-finetune-cpu or base-finetune-100ep.")] = "tiny-finetune-cpu",
    image_size: ImageSize = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    settings: Set = None,
    track: Track = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a pretrained backbone as a classifier; folder names are the classes.

    Example: mixmim finetune clothing10 --from tiny --out runs/clothing
    """
    prepare_training()
    from training.evaluation.labelled import open_labelled
    from training.finetuning import Finetuning
    from training.recipes import FINETUNE
    from training.recipes import recipe as named_recipe
    from training.start import SCRATCH, read_start
    from training.trainer import train

    options = {"image_size": image_size, "batch_size": batch_size, "workers": workers}
    config = _with_options(named_recipe(recipe, FINETUNE), options, epochs, settings)
    images, validation = open_labelled(data, val)
    checkpoint = None if start == SCRATCH else read_start(bundle_path(Path(start)))
    _print_config(config)
    task = Finetuning(config, images.classes, checkpoint, validation)
    final = train(
        task, images.source, out, progress_console(), resume=resume, overwrite=overwrite, trackers=track or ()
    )
    if final is not None and first_process():
        typer.echo(f"wrote {final}; next: mixmim evaluate TEST_DATA --from {final} or mixmim export {final} BUNDLE_DIR")


@app.command()
def probe(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos in one folder per class: {DATA}.")],
    start: From,
    val: Val = "",
    save: Annotated[Path | None, typer.Option(help="Write a checkpoint with the linear probe as its head.")] = None,
    workers: Workers = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probe's held-out images and order.")] = 0,
) -> None:
    """Evaluate frozen features with k nearest neighbours and a linear probe: JSON.

    Example: mixmim probe clothing10 --from runs/tiny/final.safetensors
    """
    prepare_training()
    import json

    from rich.progress import Progress

    from mixmim_serve.errors import DataError
    from training.distributed import join_world
    from training.evaluation.labelled import open_labelled
    from training.evaluation.probe import probe as run_probe
    from training.evaluation.probe import save_with_head
    from training.start import read_start

    checkpoint = read_start(bundle_path(start))
    images, validation = open_labelled(data, val)
    if validation is None:
        raise DataError(f"{data} has no folders train and val: give the validation images with --val.")
    with join_world() as world, Progress(console=progress_console()) as bar:
        task = bar.add_task("embed", total=len(images.source.keys) + len(validation.source.keys))
        result = run_probe(
            checkpoint.model(), checkpoint.description, images, validation, world,
            seed=seed, workers=workers or 0, progress=lambda count: bar.advance(task, count),
        )  # fmt: skip
    if not first_process():
        return
    typer.echo(json.dumps(result.to_dict(), indent=2))
    if result.head.warning:
        typer.echo(f"note: {result.head.warning}", err=True)
    if save:
        save_with_head(save, checkpoint, images.classes, result)
        typer.echo(f"wrote {save}; next: mixmim export {save} BUNDLE_DIR", err=True)


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos in one folder per class: {DATA}.")],
    start: From,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report.json and confusion.png.")] = Path("report"),
    workers: Workers = 0,
) -> None:
    """Evaluate a classifier: top-1, top-5, per-class results, and a picture of the confusion matrix.

    Example: mixmim evaluate clothing10/test --from runs/clothing/final.safetensors --out report
    """
    prepare_training()
    from rich.progress import Progress

    from mixmim_serve.sources import open_source
    from training.distributed import join_world
    from training.evaluation.evaluate import evaluate as run_evaluation
    from training.evaluation.evaluate import write_report
    from training.start import read_start

    checkpoint, source = read_start(bundle_path(start)), open_source(data)
    with join_world() as world, Progress(console=progress_console()) as bar:
        task = bar.add_task("classify", total=len(source.keys))
        result = run_evaluation(checkpoint, source, world, workers or 0, lambda count: bar.advance(task, count))
    if not first_process():
        return
    write_report(out, checkpoint, source, result)
    accuracy = result.accuracy
    typer.echo(
        f"top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % of {accuracy.images} images; "
        f"see {out / 'confusion.png'}"
    )


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos: {DATA}.")],
    val: Val = "",
    image_size: Annotated[int, typer.Option(help="Input size of the planned training, in pixels.")] = 224,
    as_json: Annotated[bool, typer.Option("--json", help="Print the full report as JSON.")] = False,
) -> None:
    """Check a data set before a long run: sizes, classes, unreadable images, duplicates, leaks into val.

    Example: mixmim check clothing10
    """
    import json

    from rich.progress import Progress

    from mixmim_serve.sources import open_source
    from training.check import check as run_check
    from training.evaluation.labelled import train_and_val

    data, val = train_and_val(data, val)
    source, validation = open_source(data), open_source(val) if val else None
    with Progress(console=progress_console()) as bar:
        task = bar.add_task("check", total=None)
        report = run_check(
            source,
            validation,
            image_size=image_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else "\n".join(report.lines()))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run that stopped at a non-finite gradient.")],
) -> None:
    """Run the step again that stopped a run, in bf16 and float32, and report where it stops being finite.

    Example: mixmim replay runs/tiny
    """
    prepare_training()
    from training.replay import replay as replay_run

    for line in replay_run(run):
        typer.echo(line)


def _with_options(config: Any, options: dict[str, Any], epochs: int | None, settings: list[str] | None) -> Any:
    """The recipe with the options that are set, then with `--set` settings."""
    import dataclasses

    from mixmim_serve.settings import override

    changes = {name: value for name, value in options.items() if value is not None}
    if epochs is not None:
        config = config.with_epochs(epochs)
    return override(dataclasses.replace(config, **changes), settings or ())


def _print_config(config: Any) -> None:
    import dataclasses
    import json

    progress_console().print_json(json.dumps(dataclasses.asdict(config)), indent=None)
