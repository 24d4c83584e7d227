"""k-nearest-neighbour accuracy of embeddings, the protocol of DINO (arXiv 2104.14294; official eval_knn.py).

Embeddings are scaled to unit length. Each of the k most similar training images (cosine) votes for its class with
weight exp(similarity / temperature); a class's score is the sum of its votes.

The official code fills up the five predictions with classes that got no vote, in whatever order its sort leaves them.
Here a class without a vote is no prediction, so with small k our top-5 is lower. Top-1 is the same.

Shape suffixes:
    N training images   M query images   D channels of an embedding   K neighbours   C classes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_serve.errors import ConfigError, DataError
from training.evaluation.confusion import Accuracy, accuracy_of_ranks, check_labels, rank_of_truth

NEIGHBOURS = (10, 20, 100, 200)  # DINO's; it reports 20 as the best in most cases
FEW_NEIGHBOURS = (1, 5)  # added below FEW training images
FEW = 100
TEMPERATURE = 0.07
TRAIN_ROWS, QUERY_ROWS = 32_768, 1024  # one block of similarities: 128 MiB in float32


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    query_MD: Tensor,
    query_labels_M: Tensor,
    classes: int,
    ks: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Accuracy]:
    """Accuracy on the query images for each k; labels are int64 and count from 0.

    Where k exceeds the number of training images all of them vote, and the result keeps the requested k as its key.
    Memory beyond the inputs: a copy of the queries, M x max(ks) neighbours, and some blocks of similarities.

    Raises:
        ConfigError: for a k below 1 or a temperature that is not positive.
        DataError: when there are no images, labels do not fit, or an embedding is not finite.
    """
    if not ks or min(ks) < 1 or not temperature > 0:
        raise ConfigError(f"k must be at least 1 and the temperature positive, got {tuple(ks)} and {temperature}.")
    check_labels(train_labels_N, len(train_ND), classes)
    check_labels(query_labels_M, len(query_MD), classes)
    similarity_MK, index_MK = nearest(train_ND, query_MD, max(ks))
    labels_MK = train_labels_N[index_MK]
    blocks = [torch.split(part, QUERY_ROWS) for part in (similarity_MK, labels_MK, query_labels_M)]
    results = {}
    for k in ks:
        ranks = [
            rank_of_truth(vote(similarity_MK[:, :k], labels_MK[:, :k], classes, temperature), truth_M)
            for similarity_MK, labels_MK, truth_M in zip(*blocks, strict=True)
        ]
        results[k] = accuracy_of_ranks(torch.cat(ranks))
    return results


def neighbour_counts(images: int) -> tuple[int, ...]:
    """The k to report for so many training images: none beyond them."""
    few = FEW_NEIGHBOURS if images < FEW else ()
    return tuple(k for k in (*few, *NEIGHBOURS) if k <= images)


def nearest(
    train_ND: Tensor, query_MD: Tensor, k: int, train_rows: int = TRAIN_ROWS, query_rows: int = QUERY_ROWS
) -> tuple[Tensor, Tensor]:
    """Cosine similarity and training row of each query's min(k, N) nearest, both (M, K), nearest first.

    The order of equally similar images is undefined.

    Raises:
        DataError: for an embedding that is not finite.
    """
    k = min(k, len(train_ND))
    query_MD = unit_length(query_MD)
    similarity_MK = query_MD.new_full((len(query_MD), k), -torch.inf)
    index_MK = torch.zeros_like(similarity_MK, dtype=torch.int64)
    for start in range(0, len(train_ND), train_rows):
        train_DN = unit_length(train_ND[start : start + train_rows]).T
        for top in range(0, len(query_MD), query_rows):
            rows = slice(top, top + query_rows)
            block = (query_MD[rows] @ train_DN).topk(min(k, train_DN.shape[1]))
            best = torch.cat([similarity_MK[rows], block.values], dim=1).topk(k)
            index_MK[rows] = torch.cat([index_MK[rows], block.indices + start], dim=1).gather(1, best.indices)
            similarity_MK[rows] = best.values
    return similarity_MK, index_MK


def unit_length(features_ND: Tensor) -> Tensor:
    """Float32 embeddings scaled to unit length; zeros stay zeros.

    Raises:
        DataError: for an embedding that is not finite.
    """
    unit_ND = F.normalize(features_ND.float(), dim=1)
    if not unit_ND.sum(dim=1).isfinite().all():
        raise DataError("some embeddings are not finite: compute them in float32.")
    return unit_ND


def vote(similarity_MK: Tensor, labels_MK: Tensor, classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """Scores (M, classes), -inf for a class without a vote.

    Each row is divided by its largest weight, which keeps the ranking: exp(1 / 0.01) does not fit into float32.
    """
    weights_MK = ((similarity_MK - similarity_MK.amax(dim=1, keepdim=True)) / temperature).exp()
    scores_MC = weights_MK.new_zeros(len(weights_MK), classes).scatter_add_(1, labels_MK, weights_MK)
    return scores_MC.masked_fill_(scores_MC == 0, -torch.inf)
