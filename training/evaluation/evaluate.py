"""A classifier judged on labelled images: a report and a picture of what it confuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import Source
from training.distributed import World
from training.evaluation.confusion import confusions, draw_confusion, per_class
from training.evaluation.embed import Progress
from training.evaluation.labelled import Judged, Labelled, judge_classifier
from training.start import Start


def evaluate(
    start: Start, source: Source, world: World, workers: int = 0, progress: Progress = lambda _: None
) -> Judged:
    """Run a checkpoint's classifier.

    Raises:
        CheckpointError: when the checkpoint has no head.
        DataError: when the images have no labels, or some that the classifier does not know.
    """
    if not start.description.labels:
        raise CheckpointError(
            f"{start.path} has no classification head with class names: make one with mixmim finetune."
        )
    model = start.model().to(world.device)
    images = Labelled.of(source, start.description.labels)
    return judge_classifier(model, start.description.preprocessing, images, world, workers, progress)


def write_report(out: Path, start: Start, source: Source, judged: Judged) -> None:
    """OUT/report.json and OUT/confusion.png.

    Raises:
        ConfigError: when OUT is a file.
    """
    if out.is_file():
        raise ConfigError(f"{out} is a file: give a folder for --out.")
    names = start.description.labels
    report = {
        "checkpoint": start.identity,
        "images": source.name,
        "accuracy": dataclasses.asdict(judged.accuracy),
        "classes": [dataclasses.asdict(each) for each in per_class(judged.matrix, names)],
        "confused": [dataclasses.asdict(each) for each in confusions(judged.matrix, names)],
        "confusion_matrix": judged.matrix.tolist(),
        "unreadable": list(judged.unreadable),
    }
    with atomic_path(out / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    title = f"{judged.accuracy.top1:.1f} % of {judged.accuracy.images} images"
    with atomic_path(out / "confusion.png") as path:
        draw_confusion(judged.matrix, names, title).save(path, "PNG")
