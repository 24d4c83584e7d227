"""`mixmim check`: what a data set contains and what is wrong with it. Every image is read and decoded once.

Memory per image: its key and 36 bytes, a hash of the content and the shorter side.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixmim_serve.containers import identify
from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import decode
from mixmim_serve.sources import Source, fingerprint
from training.check_report import Report, ShorterSide, SourceReport
from training.evaluation.overlap import equal_contents, shared
from training.recipes import tiny_cpu

AHEAD = 4  # images queued per thread; bounds memory
GREY_SPREAD = 8  # of 255, largest difference between channels of a grey pixel after JPEG compression
IMAGE_SIZE = tiny_cpu().arch.image_size  # pixels: the size that the default recipe trains at


def check(
    source: Source,
    val: Source | None = None,
    *,
    image_size: int = IMAGE_SIZE,
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
    in_both = shared(val.keys, scans[1].hashes, source.keys, scans[0].hashes)
    return Report(image_size, reports[0], reports[1], in_both)


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
    sample = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST))
    grey = bool(np.ptp(sample, axis=2).max() <= GREY_SPREAD)
    return _Facts(hashlib.sha256(data).digest(), len(data), identify(data), min(image.size), grey)


def _summarise(source: Source, scan: _Scan, image_size: int) -> SourceReport:
    labels = source.labels
    duplicates = equal_contents(scan.hashes)
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
        passed_over=dict(source.passed_over),
        duplicates=_keys(source, duplicates),
        conflicts=_keys(source, conflicts),
    )


def _keys(source: Source, groups: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(source.keys[index] for index in group) for group in groups)


def _side(sides: NDArray[np.int32], image_size: int) -> ShorterSide | None:
    if not len(sides):
        return None
    return ShorterSide(int(sides.min()), int(np.median(sides)), int(sides.max()), int((sides < image_size).sum()))
