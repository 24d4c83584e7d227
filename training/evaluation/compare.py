"""`mixmim compare`: several models judged on the same labelled images, with frozen features.

Protocol: no augmentation, the model's own preprocessing. k-NN is DINO's (cosine, k = 10, temperature 0.07); the linear
probe chooses its rate on a held-out tenth of the training images. Few-shot classifiers are nearest class means of
embeddings of unit length, after the mean of the few images was subtracted (SimpleShot's CL2N, arXiv 1911.04623), of
ten draws. Retrieval ranks all training images for each evaluation image by cosine; mAP is the mean of the average
precisions.

Shape suffixes:
    N training images   M evaluation images   D channels of an embedding   C classes
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
from mixmim_serve.model import Encoder
from training.distributed import World
from training.evaluation.confusion import accuracy
from training.evaluation.embed import OnImages, run_network
from training.evaluation.knn import TEMPERATURE, knn_accuracy
from training.evaluation.labelled import Labelled
from training.evaluation.linear import ProbeConfig, linear_probe
from training.evaluation.spectrum import effective_rank

NEAREST = 10  # the k of k-NN
SHOTS = (1, 5, 10)  # images per class
DRAWS = 10  # of the few images
RATE_BATCH, RATE_SECONDS = 32, 2.0  # for images/s
ROWS = 512  # evaluation images that are ranked at a time
PROTOCOL = (
    f"frozen embeddings, no augmentation; k-NN: k = {NEAREST}, cosine, temperature {TEMPERATURE}; linear: rate chosen "
    f"on a tenth of the training images; few-shot: nearest class mean, {DRAWS} draws; mAP: training images by cosine"
)


@dataclass(frozen=True)
class Comparison:
    """What one model scores; accuracies in percent."""

    name: str
    knn: float
    linear: float
    few_shot: dict[int, tuple[float, float]]  # images per class -> mean and standard deviation over the draws
    retrieval: float  # mAP in percent
    effective_rank: float
    images_per_second: float  # of the network alone, in float32
    image_size: int
    unreadable: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        few = {f"{shots}-shot": {"mean": mean, "std": std} for shots, (mean, std) in self.few_shot.items()}
        return {
            "model": self.name,
            "knn": self.knn,
            "linear": self.linear,
            **few,
            "retrieval_map": self.retrieval,
            "effective_rank": self.effective_rank,
            "images_per_second": self.images_per_second,
            "image_size": self.image_size,
            "unreadable": self.unreadable,
        }


def compare(
    name: str,
    model: Encoder,
    description: Description,
    train: Labelled,
    val: Labelled,
    world: World,
    *,
    workers: int = 0,
    progress: OnImages = lambda _: None,
) -> Comparison:
    """Embed both parts once, then score them."""
    model = model.to(world.device).eval()
    reference, queries = (
        run_network(model, part.source, description.preprocessing, world, workers=workers, progress=progress)
        for part in (train, val)
    )
    train_ND, val_MD = reference.values_NX, queries.values_NX
    labels_N, labels_M = train.labels_of(reference), val.labels_of(queries)
    classes = len(train.classes)
    head = linear_probe(train_ND, labels_N, classes, ProbeConfig())
    return Comparison(
        name,
        knn_accuracy(train_ND, labels_N, val_MD, labels_M, classes, ks=(NEAREST,))[NEAREST].top1,
        accuracy(head.scores(val_MD), labels_M).top1,
        {shots: few_shot(train_ND, labels_N, val_MD, labels_M, shots) for shots in SHOTS},
        100 * retrieval_map(train_ND, labels_N, val_MD, labels_M),
        effective_rank(torch.cat([train_ND, val_MD]).double()),
        rate(model, world),
        model.arch.image_size,
        len(reference.unreadable) + len(queries.unreadable),
    )


def few_shot(
    train_ND: Tensor, labels_N: Tensor, val_MD: Tensor, labels_M: Tensor, shots: int, draws: int = DRAWS
) -> tuple[float, float]:
    """Mean and standard deviation of top-1 in percent; a class with fewer images gives all that it has."""
    scores = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        chosen_F = torch.cat(
            [
                members[torch.randperm(len(members), generator=generator)[:shots]]
                for members in ((labels_N == label).nonzero()[:, 0] for label in labels_N.unique())
            ]
        )
        centre_D = train_ND[chosen_F].mean(dim=0)
        few_FD, val_unit_MD = (F.normalize(values - centre_D, dim=1) for values in (train_ND[chosen_F], val_MD))
        classes_C, position_F = labels_N[chosen_F].unique(return_inverse=True)
        means_CD = torch.zeros(len(classes_C), few_FD.shape[1]).index_add_(0, position_F, few_FD)
        means_CD /= position_F.bincount()[:, None]
        nearest_M = torch.cdist(val_unit_MD, means_CD).argmin(dim=1)
        scores.append(100 * float((classes_C[nearest_M] == labels_M).double().mean()))
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0


def retrieval_map(train_ND: Tensor, labels_N: Tensor, val_MD: Tensor, labels_M: Tensor) -> float:
    """Mean average precision of retrieving training images of an evaluation image's class, from 0 to 1.

    Evaluation images whose class has no training image are left out.
    """
    unit_ND, unit_MD = F.normalize(train_ND, dim=1), F.normalize(val_MD, dim=1)
    ranks_N = torch.arange(1, len(unit_ND) + 1, dtype=torch.float64)
    precisions = []
    for begin in range(0, len(unit_MD), ROWS):
        order_BN = (unit_MD[begin : begin + ROWS] @ unit_ND.T).argsort(dim=1, descending=True)
        hits_BN = (labels_N[order_BN] == labels_M[begin : begin + ROWS, None]).double()
        count_B = hits_BN.sum(dim=1)
        average_B = (hits_BN.cumsum(dim=1) / ranks_N * hits_BN).sum(dim=1) / count_B
        precisions.append(average_B[count_B > 0])
    every = torch.cat(precisions)
    return float(every.mean()) if len(every) else 0.0


def rate(model: Encoder, world: World) -> float:
    """Images per second of the network alone, the best of several batches over about `RATE_SECONDS`."""
    size = model.arch.image_size
    pixels_BCHW = torch.zeros(RATE_BATCH, 3, size, size, device=world.device)
    best, deadline = float("inf"), time.perf_counter() + RATE_SECONDS
    while time.perf_counter() < deadline or best == float("inf"):
        began = time.perf_counter()
        with torch.inference_mode():
            float(model(pixels_BCHW).embedding_BD.sum())  # waits for the device
        best = min(best, time.perf_counter() - began)
    return RATE_BATCH / best
