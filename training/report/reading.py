"""How to read a run: the charts of the page with what each means, and sentences that judge the curves so far.

docs/judging.md shows the same curves of runs that went well and of runs that failed; the thresholds are from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.evaluation.labelled import LOGGED_K
from training.evaluation.monitor import FOLDERS_KNN
from training.report.chart import Reference
from training.report.curves import Curve, curves, last_epoch

KNN = f"knn{LOGGED_K}_top1"
FLAT = 0.95  # of the loss of a prediction that knows nothing but each patch's mean colour, which is 1
RISEN = 1.05  # of the lowest loss: above it, it rises
COLLAPSED = 0.5  # of its best value after the early epochs: an effective rank below it is a collapse
ONE_LINE = 2.0  # an effective rank below it is a collapse at any time
DEAD = 0.1  # share of the dimensions
FALLEN = 3.0  # points of accuracy below the best
GAINED = 2.0  # points of accuracy over the start that a run is to win
EARLY = 0.2  # share of the epochs before which nothing is judged that takes its time
LATE = 0.6  # share of the epochs from which on a run should beat its start


@dataclass(frozen=True)
class Chart:
    """One picture of the page: its metrics with their labels, and how to read them."""

    title: str
    metrics: Mapping[str, str]
    reading: str
    log: bool = False
    reference: Reference | None = None
    unit: str = ""
    tasks: tuple[str, ...] = field(default=())  # that it is for; () for all

    def is_for(self, task: str) -> bool:
        """Whether it belongs on the page of a run of this task."""
        return not self.tasks or task in self.tasks


CHARTS = (
    Chart(
        "Loss",
        {"loss": "loss"},
        "Falls at once below 1, which is what painting each patch in its mean colour costs, then ever more slowly "
        "until the end. Stays at 1: the network learns nothing. It says that the network learns to reconstruct, "
        "not how good its features are.",
        reference=(1.0, "each patch in its mean colour"),
        tasks=("pretrain",),
    ),
    Chart(
        "Loss",
        {"loss": "loss"},
        "Falls fast, then slowly, with some noise. Flat from the start: the learning rate is too high or too low.",
        tasks=("finetune", "distill"),
    ),
    Chart(
        "Accuracy",
        {
            KNN: f"k-NN on the labelled photos, k = {LOGGED_K}",
            FOLDERS_KNN: "k-NN, folders taken as classes",
            "val_top1": "top-1 on the validation photos",
            "val_top5": "top-5 on the validation photos",
        },
        "The judge, where labels exist. In pretraining from random weights it falls below the untrained network's at "
        "first, then rises past it and flattens. At its end still as low as at its start: nothing useful was learnt. "
        "Falls later on: the best checkpoint lies behind.",
        unit=" %",
    ),
    Chart(
        "Effective rank",
        {"effective_rank": "effective rank"},
        "How many dimensions the embeddings use (RankMe). Higher is better among runs of one recipe. From random "
        "weights it falls in the first epochs, then rises for the rest of the run. A fall to 1 is a collapse; a curve "
        "that stays low has learnt little.",
    ),
    Chart(
        "Decay of the spectrum",
        {"spectrum_decay": "exponent"},
        "How fast the directions lose weight (alpha-ReQ). A slow rise means that fewer of them "
        "carry information. Once the effective rank is near 1 it only measures noise.",
    ),
    Chart(
        "Uniformity",
        {"uniformity": "uniformity"},
        "How evenly the embeddings cover the sphere: 0 if all photos have the same one, -4 if they are spread evenly. "
        "Falls as photos become distinct; a rise towards 0 is a collapse.",
    ),
    Chart(
        "Dead dimensions",
        {"dead_dimensions": "share"},
        "Share of the dimensions that hardly differ between photos. Stays at 0 or near it.",
    ),
    Chart("Learning rate", {"lr": "learning rate"}, "Warm-up, then half a cosine down to the lowest rate."),
    Chart(
        "Gradient norm",
        {"grad_norm": "gradient norm"},
        "Settles within a few epochs. Spikes that return, or growth without end: the learning rate is too high.",
        log=True,
    ),
    Chart(
        "Images per second",
        {"rate": "images/s"},
        "Falls while other work uses the machine, or where decoding cannot keep up with the network.",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One sentence about a run."""

    text: str
    is_warning: bool = False


def findings(task: str, epochs: int, lines: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the curves so far say, warnings first."""
    share = last_epoch(lines) / epochs
    if not share:
        return [Finding("No epoch has ended yet: what is below is where the run starts from.")]
    found = [
        *_of_loss(task, share, lines),
        *_of_rank(epochs, lines),
        *_of_dead(lines),
        *(_of_knn(epochs, lines) if task != "finetune" else _of_classifier(lines)),
    ]
    return sorted(found, key=lambda each: not each.is_warning)


def _one(lines: Sequence[Mapping[str, Any]], name: str) -> Curve | None:
    found = curves(lines, {name: name})
    return found[0] if found else None


def _of_loss(task: str, share: float, lines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    curve = _one(lines, "loss")
    if curve is None or len(curve.values) < 3:
        return
    tenths = curve.tenths()
    first, last, lowest = tenths[0], tenths[-1], min(tenths)
    if task == "pretrain" and last > FLAT and share >= EARLY:
        yield Finding(
            f"The loss is {last:.3f}, hardly better than painting each patch in its mean colour (1): lower base_lr if "
            "it is flat, or train longer if it has just begun to fall.",
            True,
        )
    elif last > RISEN * lowest:
        yield Finding(f"The loss has risen from {lowest:.3f} to {last:.3f}: base_lr is too high.", True)
    else:
        yield Finding(f"The loss went from {first:.3f} to {last:.3f}.")


def _best(curve: Curve, epochs: int) -> tuple[float, float]:
    """The highest value and its epoch, without the early epochs, in which a network unlearns its random features."""
    later = [pair for pair in zip(curve.values, curve.epochs, strict=True) if pair[1] >= EARLY * epochs]
    return max(later, default=(curve.last, curve.epochs[-1]), key=lambda pair: pair[0])


def _of_rank(epochs: int, lines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    curve = _one(lines, "effective_rank")
    if curve is None:
        return
    best, at = _best(curve, epochs)
    if curve.last < ONE_LINE:
        yield Finding(
            f"The effective rank is {curve.last:.1f}: the embeddings of all photos are the same. Lower base_lr.", True
        )
    elif curve.last < COLLAPSED * best:
        yield Finding(
            f"The effective rank fell from {best:.0f} after epoch {at:g} to {curve.last:.0f}: the embeddings collapse. "
            "Lower base_lr, or use a checkpoint from before the fall.",
            True,
        )
    else:
        yield Finding(f"The embeddings use about {curve.last:.0f} dimensions; at the start {curve.values[0]:.0f}.")


def _of_dead(lines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    curve = _one(lines, "dead_dimensions")
    if curve is not None and curve.last > DEAD:
        yield Finding(f"{curve.last:.0%} of the dimensions hardly differ between photos.", True)


def _of_knn(epochs: int, lines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Of the labelled photos; without these of the folders."""
    curve = _one(lines, KNN) or _one(lines, FOLDERS_KNN)
    if curve is None or len(curve.values) < 2:
        return
    start, (best, at) = curve.values[0], _best(curve, epochs)
    said = f"{curve.last:.1f} %, at the start {start:.1f} %"
    if curve.last < best - FALLEN:
        yield Finding(f"k-NN accuracy is {said}, and was {best:.1f} % after epoch {at:g}: that one is better.", True)
    elif curve.last < start + GAINED and curve.epochs[-1] >= LATE * epochs:
        yield Finding(f"k-NN accuracy is {said}: the run has not made the features better.", True)
    else:
        yield Finding(f"k-NN accuracy is {said}.")


def _of_classifier(lines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    curve = _one(lines, "val_top1")
    if curve is None:
        yield Finding("Without validation photos nothing says how good the classifier is: give some with --val.", True)
        return
    best = max(curve.values)
    at = curve.epochs[curve.values.index(best)]
    if curve.last < best - FALLEN:
        yield Finding(f"Top-1 fell from {best:.1f} % after epoch {at:g} to {curve.last:.1f} %: it overfits.", True)
    else:
        yield Finding(f"Top-1 on the validation photos is {curve.last:.1f} %, at best {best:.1f} % after epoch {at:g}.")
