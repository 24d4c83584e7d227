"""How good embeddings are, without labels: how many dimensions they use, and how evenly.

Shape suffixes:
    N images   D dimensions of an embedding   K = min(N, D)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_serve.errors import DataError

DEAD = 0.01  # of the embeddings' root mean square; a dimension whose standard deviation is not above it is dead
PAIRED = 2048  # images whose pairs give the uniformity
FITTED = (0.02, 0.5)  # part of the spectrum that the power law is fitted to: it holds neither at its head nor its tail


@dataclass(frozen=True)
class Spectrum:
    """Measures of a set of embeddings; each is named as in its paper."""

    images: int
    effective_rank: float  # RankMe: from 1 (all embeddings on one line) to min(N, D)
    decay: float  # alpha-ReQ: exponent of the eigenvalues' power law; infinite if one direction holds everything
    dead_dimensions: float  # share of the dimensions that hardly vary
    uniformity: float  # 0 if all are equal; -4 for unit vectors of many random dimensions

    def metrics(self) -> dict[str, float]:
        """By the names in metrics.jsonl, rounded to what a reader compares; JSON has no infinite decay."""
        decay = {"spectrum_decay": round(self.decay, 3)} if math.isfinite(self.decay) else {}
        return {
            "effective_rank": round(self.effective_rank, 2),
            **decay,
            "dead_dimensions": round(self.dead_dimensions, 4),
            "uniformity": round(self.uniformity, 3),
        }


def spectrum(embeddings_ND: Tensor) -> Spectrum:
    """The measures of at least two embeddings.

    Raises:
        DataError: when there are fewer than two embeddings, or one is not finite.
    """
    count = len(embeddings_ND)
    if count < 2:
        raise DataError(f"the spectrum of embeddings needs at least two images, got {count}.")
    if not embeddings_ND.isfinite().all():
        raise DataError("some embeddings are not finite: compute them in float32.")
    values_ND = embeddings_ND.double()
    return Spectrum(
        count,
        effective_rank(values_ND),
        decay(values_ND),
        dead_dimensions(values_ND),
        uniformity(values_ND),
    )


def effective_rank(embeddings_ND: Tensor) -> float:
    """RankMe (arXiv 2210.02885, equation 1): the exponential of the entropy of the normalised singular values."""
    values_K = torch.linalg.svdvals(embeddings_ND.double())
    total = values_K.sum()
    if not total:
        return 1.0
    shares_K = values_K / total
    return math.exp(float(-torch.xlogy(shares_K, shares_K).sum()))


def decay(embeddings_ND: Tensor) -> float:
    """alpha-ReQ (arXiv 2202.05808): -slope of log(eigenvalue of the covariance) over log(its rank)."""
    values_K = torch.linalg.svdvals(embeddings_ND - embeddings_ND.mean(dim=0)).square()
    values_K = values_K[values_K > values_K[0] * 1e-12]
    first, last = (round(part * len(values_K)) for part in FITTED)
    chosen_K = values_K[first : max(last, first + 2)]
    if len(chosen_K) < 2:
        return math.inf
    ranks_K = torch.arange(first + 1, first + 1 + len(chosen_K), dtype=chosen_K.dtype).log()
    logs_K = chosen_K.log()
    ranks_K, logs_K = ranks_K - ranks_K.mean(), logs_K - logs_K.mean()
    return -float((ranks_K * logs_K).sum() / ranks_K.square().sum())


def dead_dimensions(embeddings_ND: Tensor) -> float:
    """Share of the dimensions whose standard deviation is at most `DEAD` of the embeddings' root mean square.

    Of the whole matrix and not of the other dimensions: when all of them stop to vary at once, all of them are dead.
    """
    scale = embeddings_ND.square().mean().sqrt()
    return float((embeddings_ND.std(dim=0) <= DEAD * scale).double().mean())


def uniformity(embeddings_ND: Tensor) -> float:
    """Log E exp(-2 |x - y|^2) over pairs of unit vectors (arXiv 2005.10242, section 4.1.2), of `PAIRED` images."""
    step = -(-len(embeddings_ND) // PAIRED)
    unit_ND = F.normalize(embeddings_ND[::step], dim=1)
    return float(torch.pdist(unit_ND).square().mul(-2).exp().mean().log())
