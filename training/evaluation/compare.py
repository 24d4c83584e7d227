"""`mixmim compare`: several models judged on the same labelled images, with frozen features.

Nothing is augmented; each model has its own preprocessing and input size. k-NN is DINO's (`knn`), the linear probe
chooses its rate on held-out training images (`linear`). A few-shot classifier takes the nearest class mean of unit
embeddings, after the mean of the few images was subtracted (CL2N of SimpleShot, arXiv 1911.04623); every model gets the
same draws. Retrieval ranks all training images by cosine for each evaluation image; mAP is the mean of the average
precisions.

Without evaluation images a fifth of the training images of each class is held out, the same for every model.

Shape suffixes:
    N training images   M evaluation images   D channels of an embedding   C classes   F few images   B block of M
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_serve.description import Description
from mixmim_serve.errors import DataError
from mixmim_serve.model import Encoder
from training.distributed import World
from training.evaluation.confusion import accuracy
from training.evaluation.embed import OnImages, Outputs, run_network
from training.evaluation.knn import TEMPERATURE, knn_accuracy
from training.evaluation.labelled import Labelled
from training.evaluation.linear import LEARNING_RATES, LinearProbe, ProbeConfig, linear_probe, stratified_parts
from training.evaluation.overlap import Pairs, first_of_each, hash_array, shared
from training.evaluation.probe import Embedded
from training.evaluation.spectrum import effective_rank

NEAREST = 10  # the k of k-NN
SHOTS = (1, 5, 10)  # images per class
DRAWS = 10  # of the few images
HELD_OUT = 5  # parts, of which one is held out where there are no evaluation images
RANKED = 4096  # training images, at most, that give the effective rank
RATE_BATCH, RATE_SECONDS = 32, 2.0  # for images/s
ROWS = 512  # evaluation images that are ranked at a time


@dataclass(frozen=True)
class Comparison:
    """What one model scores; accuracies and mAP in percent."""

    name: str
    knn: float
    linear: float
    head: LinearProbe  # the linear probe, with its sweep
    few_shot: dict[int, tuple[float, float]]  # images per class -> mean and standard deviation over the draws
    retrieval: float  # mAP
    effective_rank: float
    images_per_second: float  # of the network alone
    image_size: int  # pixels
    embedding_size: int
    train_images: int  # that were judged: readable and, where some are held out, without copies
    images: int  # that they were judged on
    unreadable: tuple[str, ...] = ()  # one sentence per image
    in_both: Pairs = ()  # keys (val, train) of images with equal content

    def to_dict(self) -> dict[str, Any]:
        """JSON values, rounded."""
        sweep = {f"{lr:g}": round(top1, 2) for lr, top1 in self.head.sweep}
        return {
            "model": self.name,
            "knn": round(self.knn, 2),
            "linear": {"top1": round(self.linear, 2), "lr": self.head.lr, "sweep": sweep,
                       "lr_chosen_by": self.head.chosen_by},
            "few_shot": {str(shots): {"top1": round(mean, 2), "std": round(deviation, 2)}
                         for shots, (mean, deviation) in self.few_shot.items()},
            "retrieval_map": round(self.retrieval, 2),
            "effective_rank": round(self.effective_rank, 1),
            "images_per_second": round(self.images_per_second, 1),
            "image_size": self.image_size,
            "embedding_size": self.embedding_size,
            "train_images": self.train_images,
            "images": self.images,
            "unreadable": list(self.unreadable),
            "in_both": list(self.in_both),
        }  # fmt: skip


def protocol(device: str) -> dict[str, Any]:
    """How the scores come about, as JSON values."""
    return {
        "augmentation": "none",
        "preprocessing": "each model's own",
        "knn": {"k": NEAREST, "temperature": TEMPERATURE, "metric": "cosine", "votes": "exp(cosine / temperature)"},
        "linear": {"sweep": list(LEARNING_RATES), "chosen_on": "a tenth of train", "epochs": ProbeConfig().epochs},
        "few_shot": {"images_per_class": list(SHOTS), "draws": DRAWS, "classifier": "nearest class mean (CL2N)"},
        "retrieval_map": "all of train ranked by cosine for each image of val",
        "effective_rank": f"RankMe of at most {RANKED} images of train",
        "images_per_second": f"the network alone, torch in float32 on {device}, batches of {RATE_BATCH}, the fastest",
    }


def compare(
    name: str,
    model: Encoder,
    description: Description,
    train: Labelled,
    val: Labelled | None,
    world: World,
    *,
    workers: int = 0,
    progress: OnImages = lambda _: None,
) -> Comparison:
    """Embed each image once, then score the embeddings.

    Raises:
        DataError: when no image is readable, or none of a class can be held out.
    """
    model = model.to(world.device).eval()

    def embed(part: Labelled) -> Outputs:
        return run_network(model, part.source, description.preprocessing, world, workers=workers, progress=progress)

    reference = embed(train)
    known, unreadable = Embedded(reference.values_NX, train.labels_of(reference)), reference.unreadable
    in_both: Pairs = ()
    if val is None:
        known, queries = _held_out(train, known, reference)
    else:
        outputs = embed(val)
        queries, in_both = Embedded(outputs.values_NX, val.labels_of(outputs)), _in_both(train, reference, val, outputs)
        unreadable += outputs.unreadable
    classes = len(train.classes)
    head = linear_probe(known.features_ND, known.labels_N, classes, ProbeConfig())
    return Comparison(
        name,
        knn=knn(known, queries, classes),
        linear=accuracy(head.scores(queries.features_ND), queries.labels_N).top1,
        head=head,
        few_shot={shots: few_shot(known, queries, shots) for shots in SHOTS},
        retrieval=100 * retrieval_map(known, queries),
        effective_rank=effective_rank(known.features_ND[:: -(-len(known.labels_N) // RANKED)]),
        images_per_second=rate(model, world),
        image_size=model.arch.image_size,
        embedding_size=model.arch.embedding_size,
        train_images=len(known.labels_N),
        images=len(queries.labels_N),
        unreadable=unreadable,
        in_both=in_both,
    )


def knn(known: Embedded, queries: Embedded, classes: int) -> float:
    """Top-1 in percent of the nearest `NEAREST`."""
    embedded = (known.features_ND, known.labels_N, queries.features_ND, queries.labels_N)
    return knn_accuracy(*embedded, classes, ks=(NEAREST,))[NEAREST].top1


def few_shot(known: Embedded, queries: Embedded, shots: int, draws: int = DRAWS) -> tuple[float, float]:
    """Mean and standard deviation of top-1 in percent; a class with fewer images gives all that it has."""
    scores = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        few = known[draw_few(known.labels_N, shots, generator)]
        centre_D = few.features_ND.mean(dim=0)
        few_FD, queries_MD = (F.normalize(each.features_ND - centre_D, dim=1) for each in (few, queries))
        classes_C, position_F = torch.unique(few.labels_N, return_inverse=True)
        means_CD = torch.zeros(len(classes_C), few_FD.shape[1]).index_add_(0, position_F, few_FD)
        means_CD /= position_F.bincount()[:, None]
        nearest_M = torch.cdist(queries_MD, means_CD).argmin(dim=1)
        scores.append(100 * float((classes_C[nearest_M] == queries.labels_N).double().mean()))
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0


def draw_few(labels_N: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Rows of up to `shots` images of each class."""
    rows_by_class = [(labels_N == label).nonzero()[:, 0] for label in sorted(set(labels_N.tolist()))]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:shots]] for rows in rows_by_class])


def retrieval_map(known: Embedded, queries: Embedded) -> float:
    """Mean average precision of retrieving training images of an evaluation image's class, from 0 to 1.

    Evaluation images whose class has no training image are left out.
    """
    unit_DN, unit_MD = F.normalize(known.features_ND, dim=1).T, F.normalize(queries.features_ND, dim=1)
    ranks_N = torch.arange(1, unit_DN.shape[1] + 1, dtype=torch.float64)
    precisions = []
    for unit_BD, labels_B in zip(torch.split(unit_MD, ROWS), torch.split(queries.labels_N, ROWS), strict=True):
        order_BN = (unit_BD @ unit_DN).argsort(dim=1, descending=True, stable=True)
        hits_BN = (known.labels_N[order_BN] == labels_B[:, None]).double()
        count_B = hits_BN.sum(dim=1)
        average_B = (hits_BN.cumsum(dim=1) / ranks_N * hits_BN).sum(dim=1) / count_B
        precisions.append(average_B[count_B > 0])
    every = torch.cat(precisions)
    return float(every.mean()) if len(every) else 0.0


def rate(model: Encoder, world: World) -> float:
    """Images per second of the network alone, the best of several batches within about `RATE_SECONDS`."""
    size = model.arch.image_size
    pixels_BCHW = torch.zeros(RATE_BATCH, 3, size, size, device=world.device)
    seconds: list[float] = []
    deadline = time.perf_counter() + RATE_SECONDS
    while len(seconds) < 2 or time.perf_counter() < deadline:  # the first also allocates memory
        began = time.perf_counter()
        with torch.inference_mode():
            float(model(pixels_BCHW).embedding_BD.sum())  # waits for the device
        seconds.append(time.perf_counter() - began)
    return RATE_BATCH / min(seconds)


def _held_out(train: Labelled, known: Embedded, outputs: Outputs) -> tuple[Embedded, Embedded]:
    """Four fifths to judge with and one to judge; of images with equal content one takes part."""
    distinct = known[torch.from_numpy(first_of_each(outputs.hashes))]
    part_N = stratified_parts(distinct.labels_N, HELD_OUT, seed=0)
    held_N = part_N == 0
    missing = set(distinct.labels_N.tolist()) - set(distinct.labels_N[~held_N].tolist())
    if missing or not held_N.any():
        name = train.classes[min(missing, default=0)]
        raise DataError(
            f"{train.source.name} has too few images of class {name} to hold some out: add others, or give validation "
            "images with --val."
        )
    return distinct[~held_N], distinct[held_N]


def _in_both(train: Labelled, reference: Outputs, val: Labelled, queries: Outputs) -> Pairs:
    """The images of val whose content is also in train."""
    val_keys, train_keys = val.keys_of(queries), train.keys_of(reference)
    return shared(val_keys, hash_array(queries.hashes), train_keys, hash_array(reference.hashes))
