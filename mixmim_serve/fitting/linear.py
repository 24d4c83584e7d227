"""Multinomial logistic regression on frozen features, by scikit-learn.

Held-out images choose the penalty, by log loss, and then a temperature: a factor on the logits that leaves the order of
classes alone and makes probabilities mean what they say (arXiv 1706.04599). The head is then fitted to all images with
both. A fifth of the images is held out where there are `SPLIT_FROM` or more; of fewer, each fifth in turn.

Features are standardised for the fit, so that one penalty suits all of them; the returned weights take raw features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import DataError
from mixmim_serve.fitting.quality import log_loss

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)  # half the squared weights, per image
FOLDS = 5
SPLIT_FROM = 1000  # images
PATIENCE = 2  # weaker penalties that are worse before the sweep ends
ITERATIONS = 1000  # of L-BFGS, at most


@dataclass(frozen=True)
class LinearFit:
    """A linear layer on raw features, and how it was chosen."""

    weight: Floats  # (classes, F), temperature included
    bias: Floats  # (classes,)
    penalty: float
    temperature: float
    sweep: tuple[tuple[float, float], ...]  # (penalty, log loss on the held-out images)
    held_out: Labels  # rows that were held out, each once
    held_out_logits: NDArray[np.float64]  # theirs, by fits without them, temperature included


def fit_linear(
    features: Floats, labels: Labels, classes: int, progress: Callable[[str], None] = lambda text: None
) -> LinearFit:
    """Fit to features (images, views, F) of images with labels 0 to `classes` - 1; views of an image share its label.

    Every class has two images at least. Held-out images are judged by their first view.

    Raises:
        DataError: when features are not finite.
    """
    if not np.isfinite(features).all():
        raise DataError("some features are inf or NaN: use another engine or precision.")
    parts = folds(labels)
    held_out = np.concatenate([held for _, held in parts])
    starts: list[Any] = [None] * len(parts)
    sweep: list[tuple[float, float]] = []
    best: tuple[float, NDArray[np.float64]] = math.inf, np.zeros((0, classes))
    for penalty in PENALTIES:
        progress(f"penalty {penalty:g}")
        logits = []
        for part, (kept, held) in enumerate(parts):
            weight, bias, starts[part] = _fit(features[kept], labels[kept], classes, penalty, starts[part])
            logits.append(features[held, 0] @ weight.T + bias)
        joined = np.concatenate(logits)
        sweep.append((penalty, log_loss(joined, labels[held_out])))
        if sweep[-1][1] < best[0]:
            best = sweep[-1][1], joined
        elif len(sweep) - [loss for _, loss in sweep].index(best[0]) > PATIENCE:
            break
    penalty = min(sweep, key=lambda tried: tried[1])[0]
    temperature = best_temperature(best[1], labels[held_out])
    progress("all images")
    weight, bias, _ = _fit(features, labels, classes, penalty)
    scaled = (weight / temperature).astype(np.float32), (bias / temperature).astype(np.float32)
    return LinearFit(*scaled, penalty, temperature, tuple(sweep), held_out, best[1] / temperature)


def folds(labels: Labels) -> list[tuple[Labels, Labels]]:
    """Rows to fit to and rows to hold out, once or several times; every class is in both."""
    from sklearn.model_selection import StratifiedKFold

    count = min(FOLDS, int(np.bincount(labels).min()))
    parts = StratifiedKFold(count, shuffle=True, random_state=0).split(np.zeros(len(labels)), labels)
    return [next(parts)] if len(labels) >= SPLIT_FROM else list(parts)


def best_temperature(logits: NDArray[np.floating[Any]], labels: Labels) -> float:
    """The divisor of logits with the lowest log loss, between 1/20 and 20."""
    from scipy.optimize import minimize_scalar

    limit = math.log(20)
    found = minimize_scalar(lambda power: log_loss(logits / math.exp(power), labels), bounds=(-limit, limit))
    return math.exp(found.x)


def _fit(
    features: Floats, labels: Labels, classes: int, penalty: float, start: Any = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], Any]:
    """Weights (classes, F) and bias on raw features; `start` is what an earlier fit to them returned last."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows = features.reshape(-1, features.shape[-1])
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale[scale < 1e-8 * max(float(scale.max()), 1e-30)] = 1.0  # a constant says nothing
    model = start or LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    model.C = 1 / (penalty * len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what 1,000 iterations leave changes no decision
        model.fit((rows - mean) / scale, np.repeat(labels, features.shape[1]))
    weight, bias = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
    if classes == 2:  # scikit-learn then gives the difference of the two
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    return weight, bias - weight @ mean, model
