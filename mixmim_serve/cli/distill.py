"""The command that trains a small network with a larger one as its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixmim_serve.cli.common import app, bundle_path, first_process, progress_console, shell
from mixmim_serve.cli.environment import prepare_training
from mixmim_serve.cli.training import (
    DATA,
    BatchSize,
    Epochs,
    ImageSize,
    Knn,
    Out,
    Overwrite,
    Resume,
    Set,
    Track,
    Verbose,
    Workers,
    follow_data,
    print_config,
    with_options,
)


@app.command()
def distill(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Photos, without labels: {DATA}.")],
    teacher: Annotated[
        Path, typer.Option(metavar="CHECKPOINT", help="The larger model: a checkpoint, a bundle, a RUN, or a tag.")
    ],
    out: Out,
    size: Annotated[str | None, typer.Option(help="Size of the student, as for pretrain; tiny by default.")] = None,
    recipe: Annotated[str, typer.Option(help="tiny-distill-cpu.")] = "tiny-distill-cpu",
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
    """Train a small backbone to give the features of a larger one, on photos without labels.

    Example: mixmim distill photos --teacher runs/large --size tiny --out runs/small
    """
    prepare_training()
    from mixmim_serve.sources import open_source
    from training.distillation import Distillation, read_teacher
    from training.evaluation.labelled import open_for_knn
    from training.recipes import DISTILL
    from training.recipes import recipe as named_recipe
    from training.trainer import train

    options = {"size": size, "image_size": image_size, "batch_size": batch_size, "workers": workers}
    config = with_options(named_recipe(recipe, DISTILL), options, epochs, settings)
    source, checkpoint = open_source(data), read_teacher(bundle_path(teacher))
    config = follow_data(config, source, options | {"epochs": epochs}, settings, out if resume else None)
    labelled = open_for_knn(knn) if knn else None
    print_config(config, named_recipe(recipe, DISTILL), verbose)
    task = Distillation(config, source, checkpoint, labelled)
    progress_console().print(task.loaded, soft_wrap=True, highlight=False, markup=False)
    final = train(task, source, out, progress_console(), resume=resume, overwrite=overwrite, trackers=track or ())
    if final is not None and first_process():
        typer.echo(f"wrote {final}; next: {shell('mixmim', 'export', final, 'BUNDLE_DIR')}")
