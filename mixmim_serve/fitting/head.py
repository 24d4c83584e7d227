"""Photos in, a head of the bundle out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixmim_serve.engines import Engine
from mixmim_serve.errors import DataError
from mixmim_serve.fitting.linear import LinearFit, fit_linear
from mixmim_serve.fitting.photos import Features, Photos, features_of
from mixmim_serve.fitting.quality import quality
from mixmim_serve.heads import Head, check_head_name
from mixmim_serve.sources import fingerprint
from mixmim_serve.version import __version__


@dataclass(frozen=True)
class FittedHead:
    """A head, and what is to know about the photos that it was made from."""

    head: Head
    unreadable: tuple[str, ...]  # one sentence per image
    in_both: int  # images of val that are also in train, by content


def fit_head(
    engine: Engine,
    name: str,
    train: Photos,
    val: Photos | None = None,
    *,
    inputs: Sequence[str] = ("embedding",),
    progress: Callable[[int], None] = lambda images: None,
    step: Callable[[str], None] = lambda text: None,
) -> FittedHead:
    """Fit a head to what an engine makes of labelled photos, and judge it by `val`, or by held-out photos of `train`.

    `val` takes no part in the fit.

    Raises:
        ConfigError: for a name that a head cannot have.
        DataError: when photos cannot be used.
    """
    check_head_name(name)
    known = features_of(engine, train, inputs, mirrored=True, progress=progress)
    queries = features_of(engine, val, inputs, progress=progress) if val else None
    head = fit_to_features(name, train, known, queries, inputs, step=step)
    head.about["provenance"]["engine"] = f"{engine.name} {engine.precision}"
    unreadable = known.unreadable + (queries.unreadable if queries else ())
    return FittedHead(head, unreadable, _in_both(known, queries))


def fit_to_features(
    name: str,
    train: Photos,
    known: Features,
    queries: Features | None = None,
    inputs: Sequence[str] = ("embedding",),
    *,
    step: Callable[[str], None] = lambda text: None,
) -> Head:
    """Fit a head to features of `train`, and judge it by those of other photos, or by held-out ones.

    Raises:
        DataError: when a class has fewer than two readable photos.
    """
    _check_classes(train, known)
    fit = fit_linear(known.values, known.labels, len(train.classes), step)
    about = {"accuracy": _accuracy(fit, known, queries), "provenance": _provenance(train, fit)}
    return Head(name, train.classes, tuple(inputs), about, fit.weight, fit.bias)


def _accuracy(fit: LinearFit, known: Features, queries: Features | None) -> dict[str, Any]:
    """Quality on validation photos, or on the held-out ones of train, and in words which those are."""
    if queries is None:
        labels, logits = known.labels[fit.held_out], np.asarray(fit.held_out_logits)
        judged_on = f"{len(labels):,} photos by fits without them"
    else:
        labels, logits = queries.labels, np.asarray(queries.values[:, 0] @ fit.weight.T + fit.bias)
        judged_on = f"{len(labels):,} validation photos"
    figures = {key: round(value, 4 if key == "log_loss" else 2) for key, value in quality(logits, labels).items()}
    return figures | {"images": len(labels), "judged_on": judged_on}


def _provenance(train: Photos, fit: LinearFit) -> dict[str, Any]:
    return {
        "made_by": f"mixmim-serve {__version__}, logistic regression",
        "penalty": fit.penalty,
        "temperature": round(fit.temperature, 4),
        "images": {
            "source": train.source.name,
            "count": len(train.source.keys),
            "fingerprint": fingerprint(train.source),
        },
    }


def _check_classes(train: Photos, known: Features) -> None:
    """Check that every class has two readable images.

    Raises:
        DataError: naming the class with the fewest.
    """
    counts = np.bincount(known.labels, minlength=len(train.classes))
    if counts.min() < 2:
        number = int(counts.argmin())
        raise DataError(
            f"{train.source.name} has {counts[number]} readable photo(s) of class {train.classes[number]}: a head "
            "needs two of each class at least, and tens to be any good."
        )


def _in_both(known: Features, queries: Features | None) -> int:
    learned = set(known.hashes)
    return sum(digest in learned for digest in queries.hashes) if queries else 0
