"""Commands that need torch: pretrain, finetune, probe, evaluate, check, replay."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmim_serve.cli.common import app, bundle_path, first_process, progress_console, say_passed_over, shell
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
Knn = Annotated[str, typer.Option(metavar="DATA", help="Labelled photos (train, val) for k-NN accuracy.")]
Workers = Annotated[int | None, typer.Option(help="Processes that decode images.")]
Track = Annotated[list[str] | None, typer.Option(help="Also log to mlflow or wandb, besides TensorBoard.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in RUN.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in RUN.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print every setting of the run, as JSON.")]
From = Annotated[Path, typer.Option("--from", metavar="CHECKPOINT", help="A checkpoint, a bundle, a RUN, or tiny.")]
Json = Annotated[bool, typer.Option("--json", help="Print the full report as JSON.")]
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
    size: Annotated[
        str | None, typer.Option(help="tiny, base, large, huge, swin-tiny, pvt-small...; docs/method.md has all.")
    ] = None,
    image_size: ImageSize = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    knn: Knn = "",
    settings: Set = None,
    track: Track = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Pretrain a backbone on your own photos.

    Example: mixmim pretrain photos --from tiny --out runs/mine
    """
    prepare_training()
    from mixmim_serve.errors import ConfigError
    from mixmim_serve.sources import open_source
    from training.evaluation.labelled import open_for_knn
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
    config = with_options(named_recipe(chosen, PRETRAIN), options, epochs, settings)
    source, checkpoint = open_source(data), read_start(bundle_path(Path(start))) if start else None
    config = follow_data(config, source, options | {"epochs": epochs}, settings, out if resume else None)
    labelled = open_for_knn(knn) if knn else None
    print_config(config, named_recipe(chosen, PRETRAIN), verbose)
    task = Pretraining(config, source, labelled, start=checkpoint, new_decoder=new_decoder)
    if task.loaded and not resume:
        progress_console().print(task.loaded, soft_wrap=True, highlight=False, markup=False)
    final = train(task, source, out, progress_console(), resume=resume, overwrite=overwrite, trackers=track or ())
    if final is not None and first_process():
        typer.echo(f"wrote {final}; next: {shell('mixmim', 'export', final, 'BUNDLE_DIR')}")


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
    verbose: Verbose = False,
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
    config = with_options(named_recipe(recipe, FINETUNE), options, epochs, settings)
    images, validation = open_labelled(data, val)
    config = follow_data(config, images.source, options | {"epochs": epochs}, settings, out if resume else None)
    checkpoint = None if start == SCRATCH else read_start(bundle_path(Path(start)))
    print_config(config, named_recipe(recipe, FINETUNE), verbose)
    task = Finetuning(config, images.classes, checkpoint, validation)
    final = train(
        task, images.source, out, progress_console(), resume=resume, overwrite=overwrite, trackers=track or ()
    )
    if final is not None and first_process():
        evaluating = shell("mixmim", "evaluate", "TEST_DATA", "--from", final)
        typer.echo(f"wrote {final}; next: {evaluating} or {shell('mixmim', 'export', final, 'BUNDLE_DIR')}")


@app.command()
def probe(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos in one folder per class: {DATA}.")],
    start: From,
    val: Val = "",
    save: Annotated[Path | None, typer.Option(help="Write a checkpoint with the linear probe as its head.")] = None,
    workers: Workers = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probe's held-out images and order.")] = 0,
    as_json: Json = False,
) -> None:
    """Evaluate frozen features with k nearest neighbours and a linear probe.

    Without validation images every image is judged by the others (cross-validation).

    Example: mixmim probe clothing10 --from runs/tiny/final.safetensors
    """
    prepare_training()
    import json

    from rich.console import Console
    from rich.progress import Progress

    from training.distributed import join_world
    from training.evaluation.labelled import open_labelled
    from training.evaluation.probe import probe as run_probe
    from training.evaluation.probe import save_with_head
    from training.evaluation.tables import probe_notes, probe_table
    from training.start import read_start

    checkpoint = read_start(bundle_path(start))
    images, validation = open_labelled(data, val)
    for part in (images, validation) if validation else (images,):
        say_passed_over(part.source.passed_over)
    total = len(images.source.keys) + (len(validation.source.keys) if validation else 0)
    with join_world() as world, Progress(console=progress_console()) as bar:
        task = bar.add_task("embed", total=total)
        result = run_probe(
            checkpoint.model(), checkpoint.description, images, validation, world,
            seed=seed, workers=workers or 0, progress=lambda count: bar.advance(task, count),
        )  # fmt: skip
    if not first_process():
        return
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        typer.echo(f"judged on {result.judged_on}")
        Console().print(probe_table(result, len(images.classes)))
    for note in probe_notes(result):
        typer.echo(note, err=True)
    if save:
        save_with_head(save, checkpoint, images, result)
        typer.echo(f"wrote {save}; next: {shell('mixmim', 'export', save, 'BUNDLE_DIR')}", err=True)


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos in one folder per class: {DATA}.")],
    start: From,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report.json and confusion.png.")] = Path("report"),
    train: Annotated[
        str, typer.Option(help="Training images, to warn of those in DATA; default: what the checkpoint names.")
    ] = "",
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Evaluate a classifier: top-1, top-5, per-class results, and a picture of the confusion matrix.

    Of a folder with train and val it takes val.

    Example: mixmim evaluate clothing10/test --from runs/clothing/final.safetensors --out report
    """
    prepare_training()
    import json

    from rich.console import Console
    from rich.progress import Progress

    from mixmim_serve.sources import open_source
    from mixmim_serve.sources.parts import train_and_val
    from training.distributed import join_world
    from training.evaluation.confusion import per_class
    from training.evaluation.evaluate import evaluate as run_evaluation
    from training.evaluation.evaluate import write_report
    from training.evaluation.tables import class_table, headline, trained_on
    from training.start import read_start

    checkpoint, source = read_start(bundle_path(start)), open_source(train_and_val(data)[1] or data)
    say_passed_over(source.passed_over)
    training = open_source(train) if train else None
    with join_world() as world, Progress(console=progress_console()) as bar:
        task = bar.add_task("classify", total=len(source.keys))
        advance = functools.partial(bar.advance, task)
        result = run_evaluation(checkpoint, source, world, workers or 0, advance, training)
    if not first_process():
        return
    report = write_report(out, checkpoint, source, result)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo(f"{headline(result)}; see {out / 'confusion.png'}")
        Console().print(class_table(per_class(result.matrix, checkpoint.description.labels)))
    if result.in_training:
        typer.echo(trained_on(result.in_training), err=True)


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos: {DATA}.")],
    val: Val = "",
    image_size: Annotated[
        int | None, typer.Option(help="Input size of the planned training in pixels, if not the default recipe's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a data set before a long run: what it is enough for, sizes, classes, duplicates, leaks into val.

    Exits with 1 when an image cannot be read, or when there are too few to train on.

    Example: mixmim check clothing10
    """
    import json

    from rich.progress import Progress

    from mixmim_serve.errors import DataError
    from mixmim_serve.sources import open_source
    from mixmim_serve.sources.parts import train_and_val
    from training.check import IMAGE_SIZE
    from training.check import check as run_check

    data, val = train_and_val(data, val)
    source, validation = open_source(data), open_source(val) if val else None
    with Progress(console=progress_console()) as bar:
        task = bar.add_task("check", total=None)
        report = run_check(
            source,
            validation,
            image_size=image_size or IMAGE_SIZE,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else "\n".join(report.lines()))
    if report.refusal:
        raise DataError(report.refusal)
    if report.unreadable:
        raise typer.Exit(1)


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


def with_options(config: Any, options: dict[str, Any], epochs: int | None, settings: list[str] | None) -> Any:
    """The recipe with the options that are set, then with `--set` settings."""
    import dataclasses

    from mixmim_serve.settings import override

    changes = {name: value for name, value in options.items() if value is not None}
    if epochs is not None:
        config = config.with_epochs(epochs)
    return override(dataclasses.replace(config, **changes), settings or ())


def follow_data(config: Any, source: Any, options: dict[str, Any], settings: list[str] | None, run: Path | None) -> Any:
    """The configuration for the number of images, printing each change; that of `run` when it is resumed."""
    import os

    from training.fit_to_data import fit, given_fields, resumed

    say_passed_over(source.passed_over)
    given = given_fields(options, settings or ())
    if run is not None and (run / "config.json").is_file():
        return resumed(config, run, given)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config, changes = fit(config, source.name, len(source.keys), given, processes)
    for line in changes if first_process() else ():
        typer.echo(line, err=True)
    return config


def print_config(config: Any, recipe: Any, verbose: bool) -> None:
    """Print the settings that matter as a table; with `verbose` all of them as JSON."""
    import dataclasses
    import json

    from training.summary import summary

    console = progress_console()
    if verbose:
        console.print_json(json.dumps(dataclasses.asdict(config)), indent=None)
        return
    rows = [*summary(config, recipe), ("all settings", "--verbose prints them; RUN/config.json keeps them")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
