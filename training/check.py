"""What a data set holds and what is wrong with it, before hours of training: every image is read and decoded once.

Memory does not grow with the images but for the keys and 36 bytes each: the hash of the content and a side.
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

from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import ACCEPTED_FORMATS, decode
from mixmim_serve.sources import Source, fingerprint

AHEAD = 4  # images that wait for each thread; bounds memory
SHOWN = 10  # of a list, for people; JSON has all
GREY_SPREAD = 8  # of 255 between the channels of a pixel: what JPEG makes of grey


@dataclass(frozen=True)
class Side:
    """Shorter sides of the images that can be read, in pixels."""

    smallest: int
    median: int
    largest: int
    below_image_size: int  # images whose shorter side is below the training size, and so are enlarged


@dataclass(frozen=True)
class Part:
    """One source: the training or the validation images."""

    name: str
    fingerprint: str
    images: int
    bytes: int  # of the images that can be read, as are the next three
    formats: dict[str, int]
    shorter_side: Side | None  # None when no image can be read
    greyscale: float  # share of images without colour, 0 to 1, judged from some 4,000 pixels of each
    classes: dict[str, int] | None  # images of each class, by name; None without labels
    unreadable: dict[str, str]  # key: why
    duplicates: tuple[tuple[str, ...], ...]  # keys of images with equal bytes
    conflicts: tuple[tuple[str, ...], ...]  # the duplicates that have more than one label


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    image_size: int  # pixels on one side in training
    train: Part
    val: Part | None
    in_both: tuple[tuple[str, str], ...]  # keys (val, train) of equal bytes: such an image is no test

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each thing that should be looked at before training."""
        found = [text for role, part in self._parts() for text in _part_warnings(role, part)]
        if self.in_both:
            val, train = self.in_both[0]
            found.append(f"{_images(len(self.in_both))} of val also in train, such as {val} (in train: {train}).")
        if self.val is not None:
            found.extend(_class_warnings(self.train.classes, self.val.classes))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, everything in full."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}

    def lines(self) -> Iterator[str]:
        """For people: the facts of each part, then the warnings."""
        for role, part in self._parts():
            yield from _facts(role, part, self.image_size)
        yield from (f"warning: {text}" for text in self.warnings)
        if not self.warnings:
            yield "nothing wrong found"

    def _parts(self) -> list[tuple[str, Part]]:
        return [("train", self.train), *([("val", self.val)] if self.val is not None else [])]


def check(
    source: Source,
    val: Source | None = None,
    *,
    image_size: int = 224,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read and decode every image once; `progress` is told how many of all are done.

    Raises:
        DataError: a package that a URL needs is not installed.
    """
    sources = [source] if val is None else [source, val]
    total, done = sum(len(one.keys) for one in sources), itertools.count(1)
    threads = threads or usable_cores()
    surveys = []
    with ThreadPoolExecutor(threads) as pool:
        for one in sources:
            survey = _Survey(len(one.keys))
            for index, look in enumerate(_looks(pool, one, AHEAD * threads)):
                survey.add(index, one.keys[index], look)
                progress(next(done), total)
            surveys.append(survey)
    parts = [_part(one, survey, image_size) for one, survey in zip(sources, surveys, strict=True)]
    if val is None:
        return Report(image_size, parts[0], None, ())
    return Report(image_size, parts[0], parts[1], _in_both(source, val, [survey.hashes for survey in surveys]))


@dataclass(frozen=True)
class _Look:
    """What one image showed."""

    hash: bytes
    bytes: int
    format: str
    side: int  # the shorter, in pixels
    grey: bool


class _Survey:
    """The looks at one source, added up."""

    def __init__(self, images: int) -> None:
        self.hashes = np.zeros(images, "S32")  # empty where an image cannot be read, as 0 in the next
        self.sides = np.zeros(images, np.int32)
        self.formats: Counter[str] = Counter()
        self.unreadable: dict[str, str] = {}
        self.bytes = self.grey = 0

    def add(self, index: int, key: str, look: _Look | str) -> None:
        """One image, or why there is none."""
        if isinstance(look, str):
            self.unreadable[key] = look
            return
        self.hashes[index], self.sides[index] = look.hash, look.side
        self.formats[look.format] += 1
        self.bytes += look.bytes
        self.grey += look.grey


def _looks(pool: ThreadPoolExecutor, source: Source, ahead: int) -> Iterator[_Look | str]:
    """One an image, in order, at most `ahead` of them waiting."""
    waiting: deque[Future[_Look | str]] = deque()
    for index in range(len(source.keys)):
        waiting.append(pool.submit(_look, source, index))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _look(source: Source, index: int) -> _Look | str:
    try:
        data = source.read(index)
        image = decode(data)
    except ImageError as error:
        return str(error)
    with Image.open(BytesIO(data), formats=ACCEPTED_FORMATS) as header:
        kind = str(header.format)
    few = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST))
    grey = bool(np.ptp(few, axis=2).max() <= GREY_SPREAD)
    return _Look(hashlib.sha256(data).digest(), len(data), kind, min(image.size), grey)


def _part(source: Source, survey: _Survey, image_size: int) -> Part:
    labels = source.labels
    equal = _equal(survey.hashes)
    torn = [group for group in equal if labels is not None and len({labels[index] for index in group}) > 1]
    return Part(
        name=source.name,
        fingerprint=fingerprint(source),
        images=len(source.keys),
        bytes=survey.bytes,
        formats=dict(survey.formats.most_common()),
        shorter_side=_side(survey.sides[survey.sides > 0], image_size),
        greyscale=survey.grey / max(1, survey.formats.total()),
        classes=None if labels is None else dict(sorted(Counter(labels).items())),
        unreadable=survey.unreadable,
        duplicates=_keys(source, equal),
        conflicts=_keys(source, torn),
    )


def _keys(source: Source, groups: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(source.keys[index] for index in group) for group in groups)


def _side(sides: NDArray[np.int32], image_size: int) -> Side | None:
    if not len(sides):
        return None
    return Side(int(sides.min()), int(np.median(sides)), int(sides.max()), int((sides < image_size).sum()))


def _equal(hashes: NDArray[np.bytes_]) -> list[list[int]]:
    """Indices of images with equal content: a list for each content that occurs more than once, first come first."""
    order = np.argsort(hashes, kind="stable")
    edges = np.flatnonzero(hashes[order[1:]] != hashes[order[:-1]]) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(hashes))
    several = (ends - starts > 1) & (hashes[order[starts]] != b"")
    spans = zip(starts[several].tolist(), ends[several].tolist(), strict=True)
    return sorted(order[start:end].tolist() for start, end in spans)


def _in_both(train: Source, val: Source, hashes: Sequence[NDArray[np.bytes_]]) -> tuple[tuple[str, str], ...]:
    count = len(train.keys)
    groups = [group for group in _equal(np.concatenate(hashes)) if group[0] < count]
    pairs = [(index - count, group[0]) for group in groups for index in group if index >= count]
    return tuple((val.keys[index], train.keys[first]) for index, first in sorted(pairs))


def _facts(role: str, part: Part, image_size: int) -> Iterator[str]:
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
        yield f"  cannot be read: {len(part.unreadable):,}"
        yield from (f"    {key}: {why}" for key, why in itertools.islice(part.unreadable.items(), SHOWN))
        if len(part.unreadable) > SHOWN:
            yield f"    and {len(part.unreadable) - SHOWN:,} more"


def _classes(classes: dict[str, int] | None) -> str:
    if classes is None:
        return ", no labels"
    small, large = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    return f", {len(classes):,} classes of {classes[small]:,} ({small}) to {classes[large]:,} ({large}) images"


def _part_warnings(role: str, part: Part) -> Iterator[str]:
    if part.unreadable:
        key, why = next(iter(part.unreadable.items()))
        yield f"{_images(len(part.unreadable))} of {role} cannot be read, such as {key}: {why}"
    if part.duplicates:
        again = sum(len(group) - 1 for group in part.duplicates)
        first, second = part.duplicates[0][:2]
        yield f"{_images(again)} too many in {role}: the same content again, such as {second} (as {first})."
    if part.conflicts:
        torn = sum(len(group) for group in part.conflicts)
        first, second = part.conflicts[0][:2]
        yield f"{_images(torn)} of {role} under several labels, such as {first} and {second}: keep the right ones."


def _class_warnings(train: dict[str, int] | None, val: dict[str, int] | None) -> Iterator[str]:
    if train is None or val is None:
        if train is not val:
            labelled, bare = ("val", "train") if train is None else ("train", "val")
            yield f"{labelled} has labels and {bare} has none: classes cannot be compared."
        return
    if absent := [name for name in train if name not in val]:
        yield f"no image in val of {_named(absent)}: nothing will tell how well that is learned."
    if unknown := [name for name in val if name not in train]:
        yield f"no image in train of {_named(unknown)}: what is only in val cannot be learned."


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
