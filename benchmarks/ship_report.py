"""The report of `benchmarks/ship.py`: what the shipped bundle can do, holds and takes to start, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shown_photos import Answer
from mixmim_serve.bundle import Bundle
from mixmim_serve.heads import Head

NEIGHBOURS = (10, 20)


@dataclass(frozen=True)
class Task:
    """A head: its name, and the data set that it is fitted to and judged by."""

    head: str
    folder: str
    judged_by: str  # folder beside `train`


@dataclass(frozen=True)
class Measured:
    """A task's results, in percent."""

    task: Task
    head: Head
    train: int  # photos
    judged: int
    neighbours: dict[int, float]  # top-1 by k
    linear: float


def results(measured: Sequence[Measured]) -> Iterator[str]:
    """A row for each task."""
    yield "Top-1 in percent on photos whose labels no fit saw; the heads' expected calibration error (ECE) in points."
    yield ""
    yield "| head | classes | train | judged by | k-NN, k = 10 | k = 20 | linear probe | head | top-5 | ECE |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for each in measured:
        figures, known = each.head.about["accuracy"], each.neighbours
        cells = [
            each.task.head, len(each.head.classes), f"{each.train:,}",
            f"{each.judged:,} ({each.task.folder} {each.task.judged_by})",
            *(f"{known[k]:.1f}" for k in NEIGHBOURS), f"{each.linear:.1f}", f"{figures['top1']:.1f}",
            f"{figures['top5']:.1f}" if "top5" in figures else "", f"{figures['ece']:.1f}",
        ]  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def shown(answers: Sequence[Answer], nearest: float) -> Iterator[str]:
    """The answers to the photos of README and docs; `nearest` is how different the most similar training photo is."""
    right = sum(each.label == each.truth for each in answers)
    yield f"{right} of {len(answers)} photos of README and docs are answered rightly. None was trained on: thumbnails"
    yield f"of any of them and of any training photo differ by {nearest:.1f} grey levels or more."
    yield ""
    yield "| photo | answer | |"
    yield "|---|---|---|"
    for each in answers:
        verdict = "right" if each.label == each.truth else f"wrong: {each.truth}"
        yield f"| {each.photo} | {each.label}, {100 * each.probability:.0f} % | {verdict} |"


def sizes(bundle: Bundle, starts: Mapping[str, float]) -> Iterator[str]:
    """Megabytes of each file, and seconds until a server is ready."""
    yield "| file | MB |"
    yield "|---|---|"
    for path in files_of(bundle):
        yield f"| {path.name} | {path.stat().st_size / 1e6:.2f} |"
    yield f"| all | {size_of(bundle) / 1e6:.2f} |"
    yield ""
    words = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in starts.items())
    yield f"`mixmim serve` until it is ready, median: {words}."


def files_of(bundle: Bundle) -> list[Path]:
    """The files of a bundle, as its package contains them."""
    return sorted(path for path in bundle.path.iterdir() if path.is_file())


def size_of(bundle: Bundle) -> int:
    """Bytes of all of them."""
    return sum(path.stat().st_size for path in files_of(bundle))
