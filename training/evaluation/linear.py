"""A linear probe: one linear layer on frozen embeddings; training images choose its learning rate.

A tenth of them, held out, chooses it where that is `ProbeConfig.split_from` images or more. Of fewer, one split would
choose by luck, so every image is held out once (cross-validation). With less than `FOLDS` images of a class nothing is
chosen: the rate is `DEFAULT_LR`.

From MAE (arXiv 2111.06377, appendix A.1): channels standardised as by a BatchNorm without scale and shift, no weight
decay. From DINOv2 (official eval/linear.py): SGD with momentum 0.9, a cosine schedule, and a head for each of many
learning rates, all trained at the same time. Ours: statistics of the whole training set instead of a batch's, heads
that start at zero (the problem is convex), no augmentation, no warm-up, and a learning rate chosen without the reported
images, where DINOv2 by default chooses on them.

Shape suffixes:
    N training images   M images   D channels of an embedding   C classes   H heads, one per learning rate   B batch
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_serve.errors import ConfigError, DataError
from training.evaluation.confusion import accuracy_of_ranks, check_labels, rank_of_truth

MOMENTUM = 0.9
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
DEFAULT_LR = 0.1
FOLDS = 5  # of a cross-validation
ROWS = 1024  # images scored at a time

HELD_OUT = "held-out training images"  # what chose a learning rate
FOLDED = f"cross-validation in {FOLDS} parts"
DEFAULT = "default, too few images to choose"


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is trained; the number of epochs is MAE's."""

    epochs: int = 90
    batch_size: int = 256
    lrs: tuple[float, ...] = LEARNING_RATES  # ascending; for a batch of 256, scaled linearly with the batch
    heldout: float = 0.1  # share of each class's training images that chooses among the learning rates
    split_from: int = 100  # held-out images that may choose in one split
    seed: int = 0  # draws the held-out images and the order of the others

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}.")
        if not self.lrs or self.lrs[0] <= 0 or list(self.lrs) != sorted(set(self.lrs)):
            raise ConfigError(f"lrs must be positive and ascending, got {self.lrs}.")
        if not 0 < self.heldout < 1:
            raise ConfigError(f"heldout must be a share between 0 and 1, got {self.heldout}.")


@dataclass(frozen=True)
class LinearProbe:
    """An ordinary linear layer on raw embeddings, and how its learning rate was chosen."""

    weight_CD: Tensor
    bias_C: Tensor
    lr: float
    sweep: tuple[tuple[float, float], ...]  # (learning rate, top-1 in percent on the held-out images); may be empty
    chosen_by: str = HELD_OUT  # or FOLDED, or DEFAULT

    def scores(self, features_MD: Tensor) -> Tensor:
        """Raw embeddings (M, D) to logits (M, C)."""
        return F.linear(features_MD.float(), self.weight_CD, self.bias_C)

    @property
    def warning(self) -> str | None:
        """Advice when the best learning rate is at an end of the sweep, so that a better one may lie outside it."""
        if len(self.sweep) < 2 or self.lr not in (self.sweep[0][0], self.sweep[-1][0]):
            return None
        end, side = ("lowest", "lower") if self.lr == self.sweep[0][0] else ("highest", "higher")
        return f"the best learning rate, {self.lr:g}, is the {end} one tried: add {side} ones."


@dataclass(frozen=True)
class Heads:
    """A bank of linear layers on raw embeddings."""

    weight_HCD: Tensor
    bias_HC: Tensor

    def scores(self, features_MD: Tensor) -> Tensor:
        """Raw embeddings (M, D) to logits (M, H, C)."""
        logits = F.linear(features_MD.float(), self.weight_HCD.flatten(0, 1), self.bias_HC.flatten())
        return logits.view(-1, *self.bias_HC.shape)


def linear_probe(
    train_ND: Tensor, train_labels_N: Tensor, classes: int, config: ProbeConfig | None = None
) -> LinearProbe:
    """Train a probe on raw embeddings and int64 labels that count from 0.

    One head per learning rate is trained on some of the images; the rate whose head is best on the held-out others
    (`top1_of_rates`) then trains the probe on all. The reported images are not an input, so they cannot influence the
    choice. On a CPU equal inputs give equal bits.

    Raises:
        DataError: when there are no images, labels do not fit, embeddings are not finite, or of more images than
            `split_from` no class has two.
    """
    config = config or ProbeConfig()
    check_labels(train_labels_N, len(train_ND), classes)
    top1, chosen_by = top1_of_rates(train_ND, train_labels_N, classes, config)
    lr = config.lrs[choose(top1)] if top1 else DEFAULT_LR
    final = train_heads(train_ND, train_labels_N, classes, (lr,), config)
    sweep = tuple(zip(config.lrs, top1, strict=True)) if top1 else ()
    return LinearProbe(final.weight_HCD[0], final.bias_HC[0], lr, sweep, chosen_by)


def top1_of_rates(
    train_ND: Tensor, labels_N: Tensor, classes: int, config: ProbeConfig
) -> tuple[tuple[float, ...], str]:
    """Top-1 in percent of each learning rate on held-out images, and what held them out; none at the default."""
    if len(labels_N) > config.split_from:
        kept, heldout = split_by_class(labels_N, config)
        if len(heldout) >= config.split_from:
            heads = train_heads(train_ND[kept], labels_N[kept], classes, config.lrs, config)
            return top1_of_heads(heads, train_ND[heldout], labels_N[heldout]), HELD_OUT
    if smallest_class(labels_N) < FOLDS:
        return (), DEFAULT
    parts_N = stratified_parts(labels_N, FOLDS, config.seed)
    right = [0.0] * len(config.lrs)
    for part in range(FOLDS):
        kept, heldout = (parts_N != part).nonzero().flatten(), (parts_N == part).nonzero().flatten()
        heads = train_heads(train_ND[kept], labels_N[kept], classes, config.lrs, config)
        top1 = top1_of_heads(heads, train_ND[heldout], labels_N[heldout])
        right = [total + value * len(heldout) for total, value in zip(right, top1, strict=True)]
    return tuple(total / len(labels_N) for total in right), FOLDED


def smallest_class(labels_N: Tensor) -> int:
    """Images of the smallest class that has any."""
    counts = labels_N.bincount()
    return int(counts[counts > 0].min())


def stratified_parts(labels_N: Tensor, parts: int, seed: int) -> Tensor:
    """The part of each image, int64 (N,): sizes differ by one at most, in all and within each class."""
    shuffled = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    rows = shuffled[labels_N.cpu()[shuffled].argsort(stable=True)]  # class after class, random within each
    found_N = torch.empty(len(labels_N), dtype=torch.int64)
    found_N[rows] = torch.arange(len(labels_N)) % parts
    return found_N.to(labels_N.device)


def split_by_class(labels_N: Tensor, config: ProbeConfig) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out: the share of each class, rounded, at least one image and never all.

    Raises:
        DataError: when no class has two images.
    """
    shuffled = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(config.seed))
    labels = labels_N.cpu()[shuffled]
    rows_by_class = torch.split(shuffled[labels.argsort(stable=True)], labels.bincount().tolist())
    counts = [min(max(1, round(len(rows) * config.heldout)), max(0, len(rows) - 1)) for rows in rows_by_class]
    if not any(counts):
        raise DataError("no class has two training images, so none can be held out to choose the learning rate.")
    heldout = [rows[:count] for rows, count in zip(rows_by_class, counts, strict=True)]
    kept = [rows[count:] for rows, count in zip(rows_by_class, counts, strict=True)]
    return torch.cat(kept).to(labels_N.device), torch.cat(heldout).to(labels_N.device)


def train_heads(
    features_ND: Tensor, labels_N: Tensor, classes: int, lrs: tuple[float, ...], config: ProbeConfig
) -> Heads:
    """One head per learning rate, all on the same batches: a step is two matrix products for any number of heads."""
    mean_D, scale_D = standardisation(features_ND)
    scale = min(config.batch_size, len(features_ND)) / 256
    rate_H11 = torch.tensor(lrs, device=features_ND.device).view(-1, 1, 1) * scale
    weight_HCD = features_ND.new_zeros(len(lrs), classes, len(mean_D) + 1, dtype=torch.float32)  # last: the bias
    velocity_HCD = torch.zeros_like(weight_HCD)
    batches = math.ceil(len(features_ND) / config.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    for epoch in range(config.epochs):
        order = torch.randperm(len(features_ND), generator=generator).to(features_ND.device)
        for index, rows in enumerate(order.tensor_split(batches)):  # of nearly equal size: no small, noisy last batch
            x_BD = F.pad((features_ND[rows].float() - mean_D) * scale_D, (0, 1), value=1.0)
            velocity_HCD.mul_(MOMENTUM).add_(gradient(weight_HCD, x_BD, labels_N[rows]))
            cosine = 0.5 * (1 + math.cos(math.pi * (epoch + index / batches) / config.epochs))
            weight_HCD.sub_(velocity_HCD * (rate_H11 * cosine))
    return fold(weight_HCD, mean_D, scale_D)


def gradient(weight_HCD: Tensor, x_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Each head's gradient of its mean cross-entropy in closed form: softmax minus one-hot label, times the input."""
    error_BHC = (x_BD @ weight_HCD.flatten(0, 1).T).view(len(x_BD), *weight_HCD.shape[:2]).softmax(dim=-1)
    error_BHC[torch.arange(len(x_BD), device=x_BD.device), :, labels_B] -= 1
    return (error_BHC.flatten(1).T @ x_BD).view_as(weight_HCD) / len(x_BD)


def standardisation(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each channel and 1 / its standard deviation, or 0 for a constant channel, which then gets no weight.

    Raises:
        DataError: for embeddings that are not finite.
    """
    std_D, mean_D = torch.std_mean(features_ND.float(), dim=0, correction=0)
    if not std_D.isfinite().all():
        raise DataError("some embeddings are not finite: compute them in float32.")
    varies_D = std_D > 1e-6 * mean_D.abs()  # below, the deviation is float32 rounding
    return mean_D, torch.where(varies_D, 1 / std_D, 0.0)


def fold(weight_HCD: Tensor, mean_D: Tensor, scale_D: Tensor) -> Heads:
    """Heads on standardised embeddings (last column: bias) as heads on raw ones; float64, as large terms cancel."""
    raw_HCD = weight_HCD[..., :-1].double() * scale_D.double()
    bias_HC = weight_HCD[..., -1].double() - raw_HCD @ mean_D.double()
    return Heads(raw_HCD.float(), bias_HC.float())


def top1_of_heads(heads: Heads, features_MD: Tensor, labels_M: Tensor) -> tuple[float, ...]:
    """Top-1 of each head, in percent."""
    blocks = zip(torch.split(features_MD, ROWS), torch.split(labels_M, ROWS), strict=True)
    ranks_MH = torch.cat([rank_of_truth(heads.scores(features), labels[:, None]) for features, labels in blocks])
    return tuple(accuracy_of_ranks(ranks_M).top1 for ranks_M in ranks_MH.unbind(1))


def choose(top1: tuple[float, ...]) -> int:
    """Position of the best; of equal ones the nearest to the middle, with worse ones on both sides."""
    best = [index for index, value in enumerate(top1) if value == max(top1)]
    return min(best, key=lambda index: abs(2 * index - (len(top1) - 1)))
