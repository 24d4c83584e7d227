"""Labelled images and what a network scores on them: k nearest neighbours, or a classifier's accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import DataError
from mixmim_serve.model import Encoder
from mixmim_serve.sources import Source, open_source
from mixmim_serve.sources.parts import train_and_val
from training.distributed import World
from training.evaluation.confusion import Accuracy, Counts, accuracy, confusion_matrix
from training.evaluation.embed import OnImages, Outputs, run_network
from training.evaluation.knn import knn_accuracy
from training.evaluation.overlap import Pairs

LOGGED_K = 20  # neighbours in the log of a pretraining run


@dataclass(frozen=True)
class Labelled:
    """Images whose classes are numbered in the order of `classes`."""

    source: Source
    classes: tuple[str, ...]
    labels_N: Tensor  # int64

    @classmethod
    def from_source(cls, source: Source, classes: Sequence[str] = ()) -> Labelled:
        """Number the source's classes: in alphabetical order, or as in `classes`.

        Raises:
            DataError: when the source has no labels, or one that is not in `classes`.
        """
        if source.labels is None:
            raise DataError(f"{source.name} has no labels: put the images of each class into a folder named after it.")
        names = tuple(classes) or tuple(sorted(set(source.labels)))
        number = {name: position for position, name in enumerate(names)}
        if unknown := sorted(set(source.labels) - number.keys()):
            raise DataError(
                f"{source.name} has images of {_listed(unknown)}, not among the {len(names)} classes to learn."
            )
        return cls(source, names, torch.tensor([number[label] for label in source.labels]))

    def labels_of(self, outputs: Outputs) -> Tensor:
        """Labels of the readable images, one per row of `outputs`."""
        return self.labels_N[outputs.indices_N]

    def keys_of(self, outputs: Outputs) -> list[str]:
        """Keys of the readable images, one per row of `outputs`."""
        return [self.source.keys[index] for index in outputs.indices_N.tolist()]


@dataclass(frozen=True)
class ClassifierResult:
    """How a classifier did on labelled images."""

    accuracy: Accuracy
    matrix: Counts  # (C, C) images, one row per true class
    unreadable: tuple[str, ...]  # one sentence per image
    in_training: Pairs = ()  # keys (here, in training) of images that the classifier was trained on
    hashes: Mapping[str, bytes] = field(default_factory=dict)  # SHA-256 of the file by key


def open_labelled(data: str, val: str = "") -> tuple[Labelled, Labelled | None]:
    """Training and validation images (`train_and_val`); the latter is None when there are none.

    Raises:
        DataError: without labels, or when a class of one is missing from the other.
    """
    data, val = train_and_val(data, val)
    train = Labelled.from_source(open_source(data))
    if len(train.classes) < 2:
        raise DataError(f"{data} has only one class ({train.classes[0]}): at least two are needed.")
    if not val:
        return train, None
    validation = Labelled.from_source(open_source(val), train.classes)
    if missing := sorted(set(train.classes) - set(validation.source.labels or ())):
        raise DataError(f"{val} has no image of {_listed(missing)} of {data}: add some, or give another --val.")
    return train, validation


def open_for_knn(data: str) -> tuple[Labelled, Labelled]:
    """The reference images and the queries of k-NN, from folders train and val.

    Raises:
        DataError: see `open_labelled`, or when there is no val.
    """
    train, val = open_labelled(data)
    if val is None:
        raise DataError(f"{data} has no folders train and val: k-NN needs reference images and queries.")
    return train, val


def evaluate_knn(
    model: Encoder, preprocessing: Preprocessing, train: Labelled, val: Labelled, world: World, workers: int = 0
) -> dict[str, float]:
    """Top-1 of the 20 nearest neighbours, in percent, for the log of a pretraining run."""
    reference, queries = (
        run_network(model, part.source, preprocessing, world, workers=workers) for part in (train, val)
    )
    accuracies = knn_accuracy(
        reference.values_NX,
        train.labels_of(reference),
        queries.values_NX,
        val.labels_of(queries),
        len(train.classes),
        ks=(LOGGED_K,),
    )
    return {f"knn{LOGGED_K}_top1": accuracies[LOGGED_K].top1}


def evaluate_classifier(
    model: Encoder,
    preprocessing: Preprocessing,
    images: Labelled,
    world: World,
    workers: int = 0,
    progress: OnImages = lambda _: None,
) -> ClassifierResult:
    """Accuracy and confusion matrix of a network with a head."""
    outputs = run_network(model, images.source, preprocessing, world, logits=True, workers=workers, progress=progress)
    labels_M = images.labels_of(outputs)
    matrix = confusion_matrix(labels_M, outputs.values_NX.argmax(dim=1), len(images.classes))
    hashes = dict(zip(images.keys_of(outputs), outputs.hashes, strict=True))
    return ClassifierResult(accuracy(outputs.values_NX, labels_M), matrix, outputs.unreadable, hashes=hashes)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"class {shown}" if len(names) == 1 else f"classes {shown}"
