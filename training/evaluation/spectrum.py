"""How good embeddings are, without labels: how many dimensions they use, and how evenly.

Shape suffixes:
    N images   D channels of an embedding   K = min(N, D)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_serve.errors import DataError

DEAD = 0.01  # of the median standard deviation, below which a channel counts as dead
PAIRS = 2048  # images whose pairs give the uniformity
FITTED = (0.02, 0.5)  # part of the spectrum that the power law is fitted to: the head and the noise are none


@dataclass(frozen=True)
class Spectrum:
    """Measures of a set of embeddings; each is named as in its paper."""

    images: int
    effective_rank: float  # RankMe: from 1 (all embeddings on one line) to min(N, D)
    decay: float  # alpha-ReQ: exponent of the eigenvalues' power law; near 1 is good, large is a collapse
    dead_channels: float  # share of the channels that hardly vary
    uniformity: float  # from 0 (all equal) down; a unit vector of D >> 1 random channels gives -4

    def metrics(self) -> dict[str, float]:
        """By the names in metrics.jsonl, rounded to what a reader compares."""
        return {
            "effective_rank": round(self.effective_rank, 2),
            "spectrum_decay": round(self.decay, 3),
            "dead_channels": round(self.dead_channels, 4),
            "uniformity": round(self.uniformity, 3),
        }


def spectrum(embeddings_ND: Tensor) -> Spectrum:
    """The measures of at least two embeddings.

    Raises:
        DataError: when there are fewer than two embeddings.
    """
    count = len(embeddings_ND)
    if count < 2:
        raise DataError(f"the spectrum of embeddings needs at least two images, got {count}.")
    values_ND = embeddings_ND.double()
    return Spectrum(
        count,
        effective_rank(values_ND),
        decay(values_ND),
        dead_channels(values_ND),
        uniformity(values_ND),
    )


def effective_rank(embeddings_ND: Tensor) -> float:
    """RankMe (arXiv 2210.02885, equation 1): the exponential of the entropy of the normalised singular values."""
    values_K = torch.linalg.svdvals(embeddings_ND)
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
        return math.inf  # one direction holds everything
    ranks_K = torch.arange(first + 1, first + 1 + len(chosen_K), dtype=chosen_K.dtype).log()
    logs_K = chosen_K.log()
    ranks_K, logs_K = ranks_K - ranks_K.mean(), logs_K - logs_K.mean()
    return -float((ranks_K * logs_K).sum() / ranks_K.square().sum())


def dead_channels(embeddings_ND: Tensor) -> float:
    """Share of the channels whose standard deviation is below `DEAD` of the median one."""
    deviations_D = embeddings_ND.std(dim=0)
    return float((deviations_D <= DEAD * deviations_D.median()).double().mean())


def uniformity(embeddings_ND: Tensor) -> float:
    """Log E exp(-2 |x - y|^2) over pairs of unit vectors (arXiv 2005.10242, section 4.1.2), `PAIRS` images."""
    step = max(1, len(embeddings_ND) // PAIRS)
    unit_ND = F.normalize(embeddings_ND[::step][:PAIRS], dim=1)
    return float(torch.pdist(unit_ND).square().mul(-2).exp().mean().log())
