"""The Source protocol, and what all sources share."""

from __future__ import annotations

import bisect
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

LABEL_NAMES = ("label", "labels", "class", "cls", "class_name", "category")  # columns or JSON keys, best first


class Source(Protocol):
    """Encoded images by index; safe to pickle, fork and read from threads, as files are open only during a call."""

    @property
    def name(self) -> str:
        """The source as the user named it, for messages."""

    @property
    def keys(self) -> Sequence[str]:
        """One unique key per image, in a reproducible order: `cat/1.jpg`, `train-0.tar/1.jpg`."""

    @property
    def labels(self) -> Sequence[str] | None:
        """The class name of each image; None unless every image has one."""

    @property
    def runs(self) -> Sequence[range]:
        """All indices in order, in ranges that are cheap to read consecutively: a tar shard, a Parquet row group."""

    @property
    def places(self) -> Iterable[str]:
        """The files and URLs that images are read from, without duplicates."""

    @property
    def passed_over(self) -> Mapping[str, int]:
        """Files among the images that are none, or cannot be read here, by suffix; see `passed_over.sentence`."""

    def read(self, index: int) -> bytes:
        """Read an encoded image.

        Raises:
            ImageError: the image is missing, too large or damaged, or the network failed.
            DataError: no such image can be read: the package for its URL is not installed.
        """

    def check(self, index: int) -> None:
        """Check the folder or shard of an image that could not be read.

        Raises:
            DataError: it is gone or was altered since the source was opened, so the image is not at fault.
        """

    def digest(self) -> str:
        """SHA-256 of the keys and, if known without reading the images, of their sizes and positions."""


def run_of(runs: Sequence[range], index: int) -> int:
    """The position in `Source.runs` of the run that contains an image."""
    return bisect.bisect(runs, index, key=lambda run: run.start) - 1


def fingerprint(source: Source) -> str:
    """SHA-256 of the keys: changes when images are added, removed or renamed (Parquet: when the row count changes)."""
    return digest_of(source.keys, ())


def digest_of(keys: Iterable[str], more: Iterable[bytes]) -> str:
    """SHA-256 of keys, followed by whatever else identifies the content."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode(errors="surrogateescape") + b"\0")
    for part in more:
        digest.update(part)
    return digest.hexdigest()


def all_or_none(labels: Iterable[str | None]) -> tuple[str, ...] | None:
    """The labels if every image has one, else None; equal labels share one string."""
    complete: list[str] = []
    for label in labels:
        if not label:
            return None
        complete.append(sys.intern(label))
    return tuple(complete)
