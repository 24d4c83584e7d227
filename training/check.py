"""`mixmim check`: what a data set contains and what is wrong with it. Every image is read and decoded once.

Memory per image: its key and 36 bytes, a hash of the content and the shorter side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixmim_serve.containers import ACCEPTED_FORMATS
from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import decode
from mixmim_serve.sources import Source, fingerprint

AHEAD = 4  # images queued per thread; bounds memory
SHOWN = 10  # entries of a list in the text; JSON has all
GREY_SPREAD = 8  # of 255, largest difference between channels of a grey pixel after JPEG compression


@dataclass(frozen=True)
class ShorterSide:
    """The shorter side of the readable images, in pixels."""

    smallest: int
    median: int
    largest: int
    below_image_size: int  # images whose shorter side is below the training size, so they are upscaled


@dataclass(frozen=True)
class SourceReport:
    """One source: the training or the validation images."""

    name: str
    fingerprint: str
    images: int
    bytes: int  # of the readable images, as are the next three
    formats: dict[str, int]
    shorter_side: ShorterSide | None  # None when no image is readable
    greyscale: float  # share of images without colour, 0 to 1, estimated from 4,096 pixels of each
    classes: dict[str, int] | None  # images per class; None without labels
    unreadable: dict[str, str]  # reason by key
    duplicates: tuple[tuple[str, ...], ...]  # groups of keys with equal bytes
    conflicts: tuple[tuple[str, ...], ...]  # the duplicates with more than one label


@dataclass(frozen=True)
class Report:
    """The result of `check`."""

    image_size: int  # pixels on one side in training
    train: SourceReport
    val: SourceReport | None
    in_both: tuple[tuple[str, str], ...]  # keys (val, train) with equal bytes: leaks into the validation images

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence per problem to look at before training."""
        sentences = [text for role, part in self._parts() for text in _part_warnings(role, part)]
        if self.in_both:
            val, train = self.in_both[0]
            sentences.append(f"{_images(len(self.in_both))} of val also in train, such as {val} (in train: {train}).")
        if self.val is not None:
            sentences.extend(_class_warnings(self.train.classes, self.val.classes))
        return tuple(sentences)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, lists in full."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}

    def lines(self) -> Iterator[str]:
        """Lines of text: the facts of each source, then the warnings."""
        for role, part in self._parts():
            yield from _facts(role, part, self.image_size)
        yield from (f"warning: {text}" for text in self.warnings)
        if not self.warnings:
            yield "no problems found"

    def _parts(self) -> list[tuple[str, SourceReport]]:
        return [("train", self.train), *([("val", self.val)] if self.val is not None else [])]


def check(
    source: Source,
    val: Source | None = None,
    *,
    image_size: int = 224,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read and decode every image once; `progress` receives (done, total) after each.

    Raises:
        DataError: when a package that a URL needs is not installed.
    """
    sources = [source] if val is None else [source, val]
    total, done = sum(len(part.keys) for part in sources), itertools.count(1)
    threads = threads or usable_cores()
    scans = []
    with ThreadPoolExecutor(threads) as pool:
        for part in sources:
            scan = _Scan(len(part.keys))
            for index, facts in enumerate(_inspect_all(pool, part, AHEAD * threads)):
                scan.add(index, part.keys[index], facts)
                progress(next(done), total)
            scans.append(scan)
    reports = [_summarise(part, scan, image_size) for part, scan in zip(sources, scans, strict=True)]
    if val is None:
        return Report(image_size, reports[0], None, ())
    return Report(image_size, reports[0], reports[1], _in_both(source, val, [scan.hashes for scan in scans]))


@dataclass(frozen=True)
class _Facts:
    """What one image shows."""

    hash: bytes  # SHA-256 of the file
    bytes: int
    format: str
    side: int  # the shorter, in pixels
    grey: bool


class _Scan:
    """The facts of one source's images, added up."""

    def __init__(self, images: int) -> None:
        self.hashes = np.zeros(images, "S32")  # empty for an unreadable image, and 0 in `sides`
        self.sides = np.zeros(images, np.int32)
        self.formats: Counter[str] = Counter()
        self.unreadable: dict[str, str] = {}
        self.bytes = self.grey = 0

    def add(self, index: int, key: str, facts: _Facts | str) -> None:
        """Add one image, or the reason why it is unreadable."""
        if isinstance(facts, str):
            self.unreadable[key] = facts
            return
        self.hashes[index], self.sides[index] = facts.hash, facts.side
        self.formats[facts.format] += 1
        self.bytes += facts.bytes
        self.grey += facts.grey


def _inspect_all(pool: ThreadPoolExecutor, source: Source, ahead: int) -> Iterator[_Facts | str]:
    """The facts of every image, in order; at most `ahead` images are pending."""
    pending: deque[Future[_Facts | str]] = deque()
    for index in range(len(source.keys)):
        pending.append(pool.submit(_inspect, source, index))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _inspect(source: Source, index: int) -> _Facts | str:
    """The facts of one image, or the reason why it is unreadable."""
    try:
        data = source.read(index)
        image = decode(data)
    except ImageError as error:
        return str(error)
    with Image.open(BytesIO(data), formats=ACCEPTED_FORMATS) as header:
        image_format = str(header.format)
    sample = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST))
    grey = bool(np.ptp(sample, axis=2).max() <= GREY_SPREAD)
    return _Facts(hashlib.sha256(data).digest(), len(data), image_format, min(image.size), grey)


def _summarise(source: Source, scan: _Scan, image_size: int) -> SourceReport:
    labels = source.labels
    duplicates = _equal(scan.hashes)
    conflicts = [group for group in duplicates if labels is not None and len({labels[index] for index in group}) > 1]
    return SourceReport(
        name=source.name,
        fingerprint=fingerprint(source),
        images=len(source.keys),
        bytes=scan.bytes,
        formats=dict(scan.formats.most_common()),
        shorter_side=_side(scan.sides[scan.sides > 0], image_size),
        greyscale=scan.grey / max(1, scan.formats.total()),
        classes=None if labels is None else dict(sorted(Counter(labels).items())),
        unreadable=scan.unreadable,
        duplicates=_keys(source, duplicates),
        conflicts=_keys(source, conflicts),
    )


def _keys(source: Source, groups: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(source.keys[index] for index in group) for group in groups)


def _side(sides: NDArray[np.int32], image_size: int) -> ShorterSide | None:
    if not len(sides):
        return None
    return ShorterSide(int(sides.min()), int(np.median(sides)), int(sides.max()), int((sides < image_size).sum()))


def _equal(hashes: NDArray[np.bytes_]) -> list[list[int]]:
    """Indices of images with equal content, one list per content that occurs more than once, in source order."""
    order = np.argsort(hashes, kind="stable")
    edges = np.flatnonzero(hashes[order[1:]] != hashes[order[:-1]]) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(hashes))
    repeated = (ends - starts > 1) & (hashes[order[starts]] != b"")
    spans = zip(starts[repeated].tolist(), ends[repeated].tolist(), strict=True)
    return sorted(order[start:end].tolist() for start, end in spans)


def _in_both(train: Source, val: Source, hashes: Sequence[NDArray[np.bytes_]]) -> tuple[tuple[str, str], ...]:
    """Keys (val, train) of images with equal content in both; `hashes` of train, then of val."""
    count = len(train.keys)
    groups = [group for group in _equal(np.concatenate(hashes)) if group[0] < count]
    pairs = [(index - count, group[0]) for group in groups for index in group if index >= count]
    return tuple((val.keys[index], train.keys[first]) for index, first in sorted(pairs))


def _facts(role: str, part: SourceReport, image_size: int) -> Iterator[str]:
    yield f"{role}: {part.name}"
    yield f"  {_images(part.images)}, {_size(part.bytes)}{_classes(part.classes)}"
    if part.shorter_side is not None:
        side = part.shorter_side
        yield f"  formats: {', '.join(f'{name} {count:,}' for name, count in part.formats.items())}"
        yield f"  shorter side: {side.smallest} to {side.largest} pixels, median {side.median}; " + (
            f"{side.below_image_size:,} below {image_size}"
        )
        yield f"  greyscale: about {part.greyscale:.0%}"
    if part.unreadable:
        yield f"  unreadable: {len(part.unreadable):,}"
        yield from (f"    {key}: {reason}" for key, reason in itertools.islice(part.unreadable.items(), SHOWN))
        if len(part.unreadable) > SHOWN:
            yield f"    and {len(part.unreadable) - SHOWN:,} more"


def _classes(classes: dict[str, int] | None) -> str:
    if classes is None:
        return ", no labels"
    small, large = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    return f", {len(classes):,} classes of {classes[small]:,} ({small}) to {classes[large]:,} ({large}) images"


def _part_warnings(role: str, part: SourceReport) -> Iterator[str]:
    if part.unreadable:
        key, reason = next(iter(part.unreadable.items()))
        yield f"{_images(len(part.unreadable))} of {role} cannot be read, such as {key}: {reason}"
    if part.duplicates:
        copies = sum(len(group) - 1 for group in part.duplicates)
        first, second = part.duplicates[0][:2]
        yield f"{_images(copies)} of {role} duplicate others, such as {second} (same content as {first})."
    if part.conflicts:
        mislabelled = sum(len(group) for group in part.conflicts)
        first, second = part.conflicts[0][:2]
        yield (
            f"{_images(mislabelled)} of {role} with equal content have different labels, such as {first} and {second}: "
            "keep those with the right label."
        )


def _class_warnings(train: dict[str, int] | None, val: dict[str, int] | None) -> Iterator[str]:
    if train is None or val is None:
        if train is not val:
            labelled, bare = ("val", "train") if train is None else ("train", "val")
            yield f"{labelled} has labels and {bare} has none: classes cannot be compared."
        return
    if absent := [name for name in train if name not in val]:
        yield f"val has no image of {_named(absent)}: add some to evaluate those too."
    if unseen := [name for name in val if name not in train]:
        yield f"train has no image of {_named(unseen)}: a class only in val cannot be learned."


def _named(classes: Sequence[str]) -> str:
    if len(classes) == 1:
        return f"class {classes[0]}"
    more = f" and {len(classes) - SHOWN:,} more" if len(classes) > SHOWN else ""
    return f"{len(classes):,} classes ({', '.join(classes[:SHOWN])}{more})"


def _images(count: int) -> str:
    return f"{count:,} image" if count == 1 else f"{count:,} images"


def _size(count: int) -> str:
    unit, factor = next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if count >= unit[1]), ("kB", 1e3))
    return f"{count / factor:,.1f} {unit}"
