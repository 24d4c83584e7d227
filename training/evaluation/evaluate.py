"""`mixmim evaluate`: a classifier's report on labelled images, and a picture of its confusion matrix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import Source
from training.distributed import World
from training.evaluation.confusion import confusions, draw_confusion, per_class
from training.evaluation.embed import OnImages
from training.evaluation.labelled import ClassifierResult, Labelled, evaluate_classifier
from training.evaluation.overlap import hash_array, read_hashes, shared, training_images
from training.start import Start


def evaluate(
    start: Start,
    source: Source,
    world: World,
    workers: int = 0,
    progress: OnImages = lambda _: None,
    train: Source | None = None,
) -> ClassifierResult:
    """Run a checkpoint's classifier on labelled images; compare them with its training images.

    `train` are the training images, by default those that the checkpoint names, where they still exist.

    Raises:
        CheckpointError: when the checkpoint has no head.
        DataError: when the images have no labels, or some that the classifier does not know.
    """
    if not start.description.labels:
        raise CheckpointError(
            f"{start.path} has no classification head with class names: make one with mixmim finetune."
        )
    model = start.model().to(world.device)
    images = Labelled.from_source(source, start.description.labels)
    result = evaluate_classifier(model, start.description.preprocessing, images, world, workers, progress)
    train = train or training_images(start.description.provenance)
    if train is None or not world.main:
        return result
    hashes = hash_array(list(result.hashes.values()))
    in_training = shared(list(result.hashes), hashes, train.keys, read_hashes(train))
    return dataclasses.replace(result, in_training=in_training)


def report_of(start: Start, source: Source, result: ClassifierResult) -> dict[str, Any]:
    """The report as JSON values."""
    names = start.description.labels
    return {
        "checkpoint": start.identity,
        "images": source.name,
        "accuracy": dataclasses.asdict(result.accuracy),
        "classes": [dataclasses.asdict(row) for row in per_class(result.matrix, names)],
        "confused": [dataclasses.asdict(pair) for pair in confusions(result.matrix, names)],
        "confusion_matrix": result.matrix.tolist(),
        "unreadable": list(result.unreadable),
        "in_training": list(result.in_training),
    }


def write_report(out: Path, start: Start, source: Source, result: ClassifierResult) -> dict[str, Any]:
    """Write OUT/report.json and OUT/confusion.png; returns the report.

    Raises:
        ConfigError: when OUT is a file.
    """
    if out.is_file():
        raise ConfigError(f"{out} is a file: give a folder for --out.")
    report = report_of(start, source, result)
    with atomic_path(out / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    title = f"{result.accuracy.top1:.1f} % of {result.accuracy.images} images"
    with atomic_path(out / "confusion.png") as path:
        draw_confusion(result.matrix, start.description.labels, title).save(path, "PNG")
    return report
