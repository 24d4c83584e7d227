"""Commands that judge what was trained: compare."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from mixmim_serve.cli.common import app, bundle_path, first_process, progress_console, say_passed_over
from mixmim_serve.cli.environment import prepare_training


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Checkpoints, bundles, folders of runs, tags, or tiny.")
    ],
    data: Annotated[
        str, typer.Option(metavar="DATA", help="Photos in one folder per class, or train and val with such folders.")
    ],
    val: Annotated[
        str, typer.Option(help="Validation images; default: DATA/val if DATA/train exists, else a fifth of DATA.")
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the full results as JSON.")] = False,
) -> None:
    """Compare models on the same labelled photos, with frozen features: which one is the best for them?

    One table: k-NN, linear probe, 1, 5 and 10 images a class, retrieval, effective rank, images/s. Of a run that has
    not finished it judges the newest checkpoint.

    Example: mixmim compare tiny runs/mine --data clothing10
    """
    prepare_training()
    import json

    from rich.console import Console
    from rich.progress import Progress

    from training.distributed import join_world
    from training.evaluation.compare import compare as judge
    from training.evaluation.compare import protocol
    from training.evaluation.compare_table import comparison_notes, comparison_table, protocol_lines
    from training.evaluation.labelled import open_labelled

    starts = [_start(model) for model in models]
    train, judged = open_labelled(data, val)
    parts = (train, judged) if judged else (train,)
    for part in parts:
        say_passed_over(part.source.passed_over)
    total = len(models) * sum(len(part.source.keys) for part in parts)
    results = []
    with join_world() as world, Progress(console=progress_console()) as bar:
        task = bar.add_task("", total=total)
        for name, start in zip(models, starts, strict=True):
            bar.update(task, description=name)
            results.append(
                judge(
                    name, start.model(), start.description, train, judged, world,
                    workers=workers, progress=functools.partial(bar.advance, task),
                )
            )  # fmt: skip
        device = world.device.type
    if not first_process():
        return
    if as_json:
        sources = {"train": train.source.name, "val": judged and judged.source.name, "classes": list(train.classes)}
        report = {"protocol": protocol(device), "data": sources, "models": [each.to_dict() for each in results]}
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo("\n".join(protocol_lines(train, judged, results, device)))
        Console().print(comparison_table(results))
    for note in comparison_notes(results):
        typer.echo(note, err=True)


def _start(model: str) -> Any:
    """A `training.start.Start`; of a run that has not finished that of its newest checkpoint, which is said."""
    from mixmim_serve.runs import checkpoint_of, is_run
    from training.start import read_start

    path = bundle_path(Path(model))
    if is_run(path):
        path, is_final = checkpoint_of(path)
        if not is_final and first_process():
            typer.echo(f"{model} is not finished: judging its newest checkpoint, {path.name}", err=True)
    return read_start(path)
