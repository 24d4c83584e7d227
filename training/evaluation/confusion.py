"""Top-1 and top-5 accuracy, the confusion matrix, and its picture.

Shape suffixes:
    M images   C classes; a matrix has one row per true class, one column per predicted class
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mixmim_serve.errors import DataError, MixMIMError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Counts = NDArray[np.int64]

WRITTEN = 25  # classes up to which every cell shows its count; above, the most frequent confusions are listed instead
NAMED = 120  # classes up to which every row and column is named
DPI = 130


@dataclass(frozen=True)
class Accuracy:
    """Percent of the images whose true class is the first prediction, or among the first five."""

    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class ClassResult:
    """One class: its images, and recall and precision in percent."""

    name: str
    images: int
    recall: float | None  # None without images of the class
    precision: float | None  # None when it was never predicted


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were predicted as another."""

    true: str
    predicted: str
    images: int
    of: int  # images of the true class


def accuracy(scores_MC: Tensor, labels_M: Tensor) -> Accuracy:
    """Top-1 and top-5 of scores; with at most five classes top-5 is 100. See `rank_of_truth` for equal scores.

    Raises:
        DataError: when there are no images, or labels do not fit.
    """
    check_labels(labels_M, *scores_MC.shape)
    return accuracy_of_ranks(rank_of_truth(scores_MC, labels_M))


def accuracy_of_ranks(ranks_M: Tensor) -> Accuracy:
    """Top-1 and top-5 of ranks from `rank_of_truth`."""
    top1, top5 = (100 * float((ranks_M < count).double().mean()) for count in (1, 5))
    return Accuracy(top1, top5, len(ranks_M))


def rank_of_truth(scores_MC: Tensor, labels_M: Tensor) -> Tensor:
    """How many classes rank before the true one, (M,); more dimensions before C are allowed.

    Of equal scores the lower class ranks first, as in argmax. A score of -inf or NaN is no prediction and ranks last.
    """
    classes = scores_MC.shape[-1]
    labels_M1 = labels_M.expand(scores_MC.shape[:-1]).unsqueeze(-1)
    own_M1 = scores_MC.gather(-1, labels_M1)
    lower_MC = torch.arange(classes, device=labels_M.device) < labels_M1
    ranks_M = ((scores_MC > own_M1) | ((scores_MC == own_M1) & lower_MC)).sum(dim=-1)
    return ranks_M.where(own_M1.squeeze(-1) > -torch.inf, classes - 1)


def check_labels(labels_M: Tensor, images: int, classes: int) -> None:
    """Check that there is one label per image, counting from 0.

    Raises:
        DataError: when there is not, or there are no images.
    """
    if not images:
        raise DataError("there are no images to evaluate.")
    if labels_M.shape != (images,):
        raise DataError(f"expected {images} labels, one per image, got shape {tuple(labels_M.shape)}.")
    low, high = int(labels_M.min()), int(labels_M.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels of {classes} classes must be 0 to {classes - 1}, got {low} to {high}.")


def confusion_matrix(labels_M: Tensor, predicted_M: Tensor, classes: int) -> Counts:
    """Images of each true class (row) by predicted class (column), (C, C).

    Raises:
        DataError: when there are no images, or labels or predictions do not fit.
    """
    check_labels(labels_M, len(labels_M), classes)
    check_labels(predicted_M, len(labels_M), classes)
    cells = (labels_M * classes + predicted_M).bincount(minlength=classes * classes)
    counts: Counts = cells.view(classes, classes).cpu().numpy()
    return counts


def per_class(matrix: Counts, names: Sequence[str]) -> list[ClassResult]:
    """Images, recall and precision of every class."""
    counts = zip(names, matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0), strict=True)
    return [
        ClassResult(name, int(images), _percent(hits, images), _percent(hits, predicted))
        for name, hits, images, predicted in counts
    ]


def confusions(matrix: Counts, names: Sequence[str], limit: int = 16) -> list[Confusion]:
    """The most frequent confusions by images, then by share of the true class."""
    images = matrix.sum(axis=1)
    rows, columns = np.nonzero(matrix * (1 - np.eye(len(matrix), dtype=np.int64)))
    counts = matrix[rows, columns]
    order = np.lexsort((images[rows], -counts))[:limit]
    return [Confusion(names[rows[i]], names[columns[i]], int(counts[i]), int(images[rows[i]])) for i in order]


def draw_confusion(matrix: Counts, names: Sequence[str], title: str) -> Image.Image:
    """The matrix as an RGB picture: colour is the share of the true class, bars on the right show recall.

    Up to 25 classes the cells show counts; with more, the most frequent confusions are listed below.

    Raises:
        MixMIMError: when matplotlib is not installed.
    """
    figure = confusion_figure(matrix, names, title)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    return Image.open(buffer).convert("RGB")


def confusion_figure(matrix: Counts, names: Sequence[str], title: str) -> Figure:
    """The matplotlib figure of `draw_confusion`, made without pyplot and its global state.

    Raises:
        MixMIMError: when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MixMIMError("drawing needs matplotlib: run pip install matplotlib.") from error
    classes = len(matrix)
    side = max(3.0, 0.45 * classes) if classes <= WRITTEN else 11.25  # inches
    font = 9.0 if classes <= WRITTEN else min(9.0, 72 * side / min(classes, NAMED) * 0.85)  # points
    figure = Figure(figsize=(side + 2, side))
    FigureCanvasAgg(figure)
    cells = figure.add_axes((0, 0, side / (side + 2), 1))
    _draw_cells(cells, matrix, font)
    _name_classes(cells, names, font)
    cells.set_title(title, fontsize=13, pad=10, parse_math=False)
    _draw_recall(figure.add_axes(((side + 0.15) / (side + 2), 0, 1.1 / (side + 2), 1)), matrix, font)
    if classes > WRITTEN:
        _list_confusions(figure, confusions(matrix, names))
    return figure


def _draw_cells(axes: Axes, matrix: Counts, font: float) -> None:
    from matplotlib.colors import PowerNorm

    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    norm = PowerNorm(0.5, 0, 1)  # a linear scale would leave confusions of a few percent white
    axes.imshow(share, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    if len(matrix) <= WRITTEN:
        font = min(font, 48 / len(str(matrix.max())))
        for row, column in np.argwhere(matrix):
            colour = "white" if norm(share[row, column]) > 0.6 else "black"
            text = str(matrix[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=font)
    else:
        lines = np.array(_named(len(matrix))[10::10]) - 0.5  # for the eye
        axes.set_xticks(lines, minor=True)
        axes.set_yticks(lines, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", color="0.8", linewidth=0.5)


def _name_classes(axes: Axes, names: Sequence[str], font: float) -> None:
    places = _named(len(names))
    labels = [_shorten(names[place]) for place in places]
    axes.set_xticks(places, labels, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(places, labels, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted", fontsize=10)
    axes.set_ylabel("true (colour: share of the row)", fontsize=10)
    axes.tick_params(length=2, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")


def _draw_recall(axes: Axes, matrix: Counts, font: float) -> None:
    images = matrix.sum(axis=1)
    share = 100 * matrix.diagonal() / np.maximum(images, 1)
    axes.barh(np.arange(len(matrix)), share, height=0.75, color="tab:blue")
    for row in _named(len(matrix)):
        text = f"{share[row]:.0f} % of {images[row]}" if images[row] else "no image"
        axes.text(104, row, text, va="center", fontsize=font)
    axes.set(xlim=(0, 100), ylim=(len(matrix) - 0.5, -0.5), xticks=(0, 50, 100), yticks=())
    axes.set_xlabel("recall, %", fontsize=10)
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=2, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["right", "bottom"]].set_visible(False)


def _list_confusions(figure: Figure, pairs: Sequence[Confusion]) -> None:
    lines = [f"{p.images} of {p.of} {_shorten(p.true)} predicted as {_shorten(p.predicted)}" for p in pairs]
    lines = lines or ["none"]
    half = -(-len(lines) // 2)
    figure.text(0, -0.02, "Most frequent confusions", fontsize=11, weight="bold", va="top")
    for left, column in ((0, lines[:half]), (0.5, lines[half:])):
        figure.text(left, -0.045, "\n".join(column), fontsize=9, va="top", linespacing=1.5, parse_math=False)


def _named(classes: int) -> range:
    return range(0, classes, -(-classes // NAMED))


def _shorten(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else f"{name[: limit - 8]}…{name[-7:]}"


def _percent(part: np.int64, whole: np.int64) -> float | None:
    return 100 * float(part / whole) if whole else None
