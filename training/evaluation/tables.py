"""Results of `probe` and `evaluate` as tables for a terminal, and what is to know about them as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.table import Table

from training.evaluation.confusion import ClassResult
from training.evaluation.labelled import ClassifierResult
from training.evaluation.linear import DEFAULT
from training.evaluation.overlap import Pairs, leak
from training.evaluation.probe import ProbeResult

TOP5_FROM = 6  # classes; of five, top-5 is always 100 %
CLASSES_SHOWN = 30  # of a classifier: the rest is in report.json


def probe_table(result: ProbeResult, classes: int) -> Table:
    """One row per k and one for the linear probe; top-5 only where it says something."""
    table = Table(box=SIMPLE)
    table.add_column("")
    table.add_column("top-1, %", justify="right")
    if classes >= TOP5_FROM:
        table.add_column("top-5, %", justify="right")
    for name, score in [*((f"k-NN, k={k}", each) for k, each in result.neighbours.items()), ("linear", result.linear)]:
        cells = [_spread(score.top1, score.top1_std)]
        if classes >= TOP5_FROM:
            cells.append(_spread(score.top5, score.top5_std))
        table.add_row(name, *cells)
    return table


def probe_notes(result: ProbeResult) -> Iterator[str]:
    """Warnings and notes, one sentence each."""
    if result.in_both:
        yield f"warning: {leak(result.in_both)}"
    if result.copies:
        yield f"note: {result.copies:,} copies of other images were left out of the cross-validation."
    if result.head.chosen_by == DEFAULT:
        yield f"note: the learning rate of the linear probe is {result.head.lr:g}, the {DEFAULT}."
    if result.head.warning:
        yield f"note: {result.head.warning}"
    if result.unreadable:
        yield f"warning: {len(result.unreadable):,} unreadable, such as {result.unreadable[0]}"


def class_table(classes: Sequence[ClassResult]) -> Table:
    """Recall and precision of each class, the worst recall first; of many classes the worst."""
    table = Table(box=SIMPLE)
    table.add_column("class")
    for title in ("images", "recall, %", "precision, %"):
        table.add_column(title, justify="right")
    worst = sorted(classes, key=lambda each: -1.0 if each.recall is None else each.recall)
    for each in worst[:CLASSES_SHOWN]:
        table.add_row(each.name, f"{each.images:,}", _percent(each.recall), _percent(each.precision))
    if len(classes) > CLASSES_SHOWN:
        table.caption = f"and {len(classes) - CLASSES_SHOWN:,} better ones"
    return table


def headline(result: ClassifierResult) -> str:
    """The accuracies of a classifier in one line."""
    accuracy = result.accuracy
    top5 = f", top-5 {accuracy.top5:.2f} %" if len(result.matrix) >= TOP5_FROM else ""
    return f"top-1 {accuracy.top1:.2f} %{top5} of {accuracy.images} images"


def trained_on(in_training: Pairs) -> str:
    """The warning of a classifier that is judged on its training images."""
    return f"warning: {leak(in_training, 'these', 'its training images')}"


def _spread(value: float, deviation: float | None) -> str:
    return f"{value:.1f}" if deviation is None else f"{value:.1f} ± {deviation:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
