"""How good logits are: accuracy, log loss, and whether probabilities mean what they say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.tasks import probabilities

Floats = NDArray[np.float32] | NDArray[np.float64]
Labels = NDArray[np.int64]

BINS = 15  # of equal width, as in "On Calibration of Modern Neural Networks" (arXiv 1706.04599)
TOP5_FROM = 6  # classes; of five, top-5 is always 100 %


def quality(logits: Floats, labels: Labels) -> dict[str, float]:
    """`top1`, `top5` (of six classes or more) and `ece` in percent, `log_loss` in nats, of logits (images, classes)."""
    truth = logits[np.arange(len(labels)), labels][:, None]
    ranks = (logits > truth).sum(axis=1)
    figures = {"top1": 100 * float((ranks < 1).mean())}
    if logits.shape[1] >= TOP5_FROM:
        figures["top5"] = 100 * float((ranks < 5).mean())
    return figures | {"ece": calibration_error(logits, labels), "log_loss": log_loss(logits, labels)}


def log_loss(logits: Floats, labels: Labels) -> float:
    """Mean negative logarithm of the true class's probability, in nats."""
    likely = probabilities(np.asarray(logits, np.float32))[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(likely, np.finfo(np.float64).tiny)).mean())


def calibration_error(logits: Floats, labels: Labels) -> float:
    """Expected calibration error of the most probable class, in percent.

    The mean difference between confidence and accuracy, over bins of confidence, weighted by their images.
    """
    likely = probabilities(np.asarray(logits, np.float32))
    confidence, right = likely.max(axis=1), likely.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return 100 * float(np.abs(gaps).sum() / len(labels))
