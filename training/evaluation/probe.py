"""`mixmim probe`: k-NN and linear-probe accuracy of frozen features; the probe can become a checkpoint's head.

Without validation images every image is judged by the others: stratified cross-validation, repeated, with the mean and
the standard deviation over its parts.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmim_serve.config import Preprocessing, architecture
from mixmim_serve.description import Description
from mixmim_serve.errors import DataError
from mixmim_serve.model import Encoder
from mixmim_serve.model.checkpoint import save_checkpoint
from mixmim_serve.sources import fingerprint
from mixmim_serve.version import __version__
from training.distributed import World
from training.evaluation.confusion import Accuracy, accuracy
from training.evaluation.embed import OnImages, Outputs, run_network
from training.evaluation.knn import knn_accuracy, neighbour_counts
from training.evaluation.labelled import Labelled
from training.evaluation.linear import FOLDS, LinearProbe, ProbeConfig, linear_probe, smallest_class, stratified_parts
from training.evaluation.overlap import Pairs, first_of_each, hash_array, shared
from training.start import Start

REPEATED = 2  # times that a cross-validation of up to `MANY` images is run, each with other parts
MANY = 1000


@dataclass(frozen=True)
class Score(Accuracy):
    """An accuracy; of a cross-validation the mean over its parts, and the standard deviation."""

    top1_std: float | None = None
    top5_std: float | None = None


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies of frozen features on one labelled set."""

    judged_on: str  # in words
    neighbours: dict[int, Score]  # by k
    linear: Score
    head: LinearProbe  # trained on all training images
    unreadable: tuple[str, ...]  # one sentence per image
    in_both: Pairs = ()  # keys (val, train) of images with equal content
    copies: int = 0  # images with the content of another, left out of a cross-validation

    def to_dict(self) -> dict[str, Any]:
        """JSON values, accuracies in percent."""
        rate = {"lr": self.head.lr, "sweep": _sweep(self.head), "lr_chosen_by": self.head.chosen_by}
        return {
            "judged_on": self.judged_on,
            "knn": {f"k={k}": _rounded(result) for k, result in self.neighbours.items()},
            "linear": _rounded(self.linear) | rate,
            "unreadable": list(self.unreadable),
            "in_both": list(self.in_both),
            "copies": self.copies,
        }


@dataclass(frozen=True)
class Embedded:
    """Embeddings with their labels."""

    features_ND: Tensor
    labels_N: Tensor

    def __getitem__(self, rows: Tensor) -> Embedded:
        return Embedded(self.features_ND[rows], self.labels_N[rows])


def probe(
    model: Encoder,
    description: Description,
    train: Labelled,
    val: Labelled | None,
    world: World,
    *,
    seed: int = 0,
    workers: int = 0,
    progress: OnImages = lambda _: None,
) -> ProbeResult:
    """Embed each image once, then score them on `val`, or without it by cross-validation.

    `val` never takes part in choosing the probe's learning rate.

    Raises:
        DataError: when a class of a cross-validation has a single image.
    """
    model = model.to(world.device).eval()

    def embed(part: Labelled) -> Outputs:
        return run_network(model, part.source, description.preprocessing, world, workers=workers, progress=progress)

    config, classes = ProbeConfig(seed=seed), len(train.classes)
    reference = embed(train)
    known = Embedded(reference.values_NX, train.labels_of(reference))
    if val is None:
        return _by_cross_validation(train, reference, known, config)
    queries = embed(val)
    neighbours, head, linear = judge(known, Embedded(queries.values_NX, val.labels_of(queries)), classes, config)
    train_keys, val_keys = train.keys_of(reference), val.keys_of(queries)
    in_both = shared(val_keys, hash_array(queries.hashes), train_keys, hash_array(reference.hashes))
    scores = {k: Score(**dataclasses.asdict(each)) for k, each in neighbours.items()}
    unreadable = reference.unreadable + queries.unreadable
    judged_on = f"{len(val_keys):,} validation images"
    return ProbeResult(judged_on, scores, Score(**dataclasses.asdict(linear)), head, unreadable, in_both)


def judge(
    known: Embedded, queries: Embedded, classes: int, config: ProbeConfig, ks: Sequence[int] = ()
) -> tuple[dict[int, Accuracy], LinearProbe, Accuracy]:
    """k-NN accuracies, a linear probe trained on `known`, and its accuracy on `queries`."""
    ks = ks or neighbour_counts(len(known.labels_N))
    neighbours = knn_accuracy(known.features_ND, known.labels_N, queries.features_ND, queries.labels_N, classes, ks=ks)
    head = linear_probe(known.features_ND, known.labels_N, classes, config)
    return neighbours, head, accuracy(head.scores(queries.features_ND), queries.labels_N)


def _by_cross_validation(train: Labelled, outputs: Outputs, known: Embedded, config: ProbeConfig) -> ProbeResult:
    """Judge each image by the others; of images with equal content one takes part, or it would judge itself."""
    distinct = known[torch.from_numpy(first_of_each(outputs.hashes))]
    smallest = smallest_class(distinct.labels_N)
    if smallest < 2:
        alone = train.classes[int((distinct.labels_N.bincount(minlength=len(train.classes)) == 1).nonzero()[0])]
        raise DataError(
            f"{train.source.name} has a single image of class {alone}, which cannot be held out: add others, or give "
            "validation images with --val."
        )
    parts = min(FOLDS, smallest)
    repeats = REPEATED if len(distinct.labels_N) <= MANY else 1
    results = cross_validate(distinct, len(train.classes), parts, repeats, config)
    head = linear_probe(known.features_ND, known.labels_N, len(train.classes), config)
    count = len(distinct.labels_N)
    times = f", {repeats} times" if repeats > 1 else ""
    return ProbeResult(
        f"{count:,} images by cross-validation in {parts} parts{times}; mean and standard deviation",
        {k: _mean([neighbours[k] for neighbours, _ in results], count) for k in results[0][0]},
        _mean([linear for _, linear in results], count),
        head,
        outputs.unreadable,
        copies=len(known.labels_N) - count,
    )


def cross_validate(
    images: Embedded, classes: int, parts: int, repeats: int, config: ProbeConfig
) -> list[tuple[dict[int, Accuracy], Accuracy]]:
    """k-NN and linear accuracies of each part, judged by the others; each repeat draws other parts."""
    ks = neighbour_counts(len(images.labels_N) - -(-len(images.labels_N) // parts))  # by the largest part's others
    results = []
    for repeat in range(repeats):
        parts_N = stratified_parts(images.labels_N, parts, config.seed + repeat)
        for part in range(parts):
            held_N = parts_N == part
            neighbours, _, linear = judge(images[~held_N], images[held_N], classes, config, ks)
            results.append((neighbours, linear))
    return results


def _mean(results: Sequence[Accuracy], images: int) -> Score:
    def of(pick: Callable[[Accuracy], float]) -> tuple[float, float]:
        values = [pick(result) for result in results]
        return statistics.fmean(values), statistics.stdev(values)

    (top1, top1_std), (top5, top5_std) = of(lambda each: each.top1), of(lambda each: each.top5)
    return Score(top1, top5, images, top1_std, top5_std)


def untrained(size: str, seed: int) -> tuple[Encoder, Description]:
    """A named network with random weights, as a baseline."""
    torch.manual_seed(seed)
    arch = architecture(size, with_decoder=False)
    return Encoder(arch), Description(arch, Preprocessing.evaluation(arch.image_size))


def save_with_head(path: Path, start: Start, train: Labelled, result: ProbeResult) -> None:
    """Write the checkpoint with the probe as its head; encoder and decoder are unchanged, so every task still works."""
    arch = dataclasses.replace(start.description.arch, num_classes=len(train.classes))
    weights = {name: weight for name, weight in start.weights.items() if not name.startswith("head.")}
    weights |= {"head.weight": result.head.weight_CD, "head.bias": result.head.bias_C}
    images = {"source": train.source.name, "count": len(train.source.keys), "fingerprint": fingerprint(train.source)}
    head = {
        "made_by": f"mixmim-serve {__version__}, linear probe",
        "lr": result.head.lr,
        "top1": result.linear.top1,
        "judged_on": result.judged_on,
        "images": images,
    }
    provenance = dict(start.description.provenance) | {"head": head}
    save_checkpoint(path, weights, Description(arch, start.description.preprocessing, train.classes, provenance))


def _rounded(result: Score) -> dict[str, float]:
    return {name: round(value, 2) for name, value in dataclasses.asdict(result).items() if value is not None}


def _sweep(head: LinearProbe) -> dict[str, float]:
    """Top-1 on the held-out training images by learning rate."""
    return {f"{lr:g}": round(top1, 2) for lr, top1 in head.sweep}
