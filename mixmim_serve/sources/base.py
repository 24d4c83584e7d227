"""What a source of images is, and what all kinds share."""

from __future__ import annotations

import bisect
import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

LABEL_NAMES = ("label", "labels", "class", "cls", "class_name", "category")  # of a column or a JSON key, best first


class Source(Protocol):
    """Encoded images by index. It can be pickled, forked and read from threads: files are open only during a call."""

    @property
    def name(self) -> str:
        """As the user gave it, for messages."""

    @property
    def keys(self) -> Sequence[str]:
        """One an image, unique, in an order that opening again repeats: `cat/1.jpg`, `train-0.tar/1.jpg`."""

    @property
    def labels(self) -> Sequence[str] | None:
        """The class name of each image; None unless every image has one."""

    @property
    def runs(self) -> Sequence[range]:
        """All indices in order, cut where reading stops being cheap: at the end of a shard or a Parquet row group."""

    @property
    def places(self) -> Iterable[str]:
        """The files and URLs that images are read from, each once."""

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            ImageError: this image cannot be had: missing, too large, damaged, or the network failed.
            DataError: no image of its kind can be had here: a package for its URL is not installed.
        """

    def check(self, index: int) -> None:
        """Look at what holds an image (a folder, a shard); for an image that could not be read.

        Raises:
            DataError: it is gone or was altered since the source was opened, so the fault is not the image's.
        """

    def digest(self) -> str:
        """SHA-256 of the keys and, where it is known without reading them, of the images' sizes and places."""


def run_of(runs: Sequence[range], index: int) -> int:
    """Which of `Source.runs` holds an image."""
    return bisect.bisect(runs, index, key=lambda run: run.start) - 1


def fingerprint(source: Source) -> str:
    """SHA-256 of the keys: changes when an image is added, removed or renamed (of Parquet: the number of rows)."""
    return digest_of(source.keys, ())


def digest_of(keys: Iterable[str], more: Iterable[bytes]) -> str:
    """SHA-256 of keys, then of whatever else tells one content from another."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode(errors="surrogateescape") + b"\0")
    for part in more:
        digest.update(part)
    return digest.hexdigest()


def complete(labels: Iterable[str | None]) -> tuple[str, ...] | None:
    """Labels when every image has one, else None; equal ones share one string."""
    found: list[str] = []
    for label in labels:
        if not label:
            return None
        found.append(sys.intern(label))
    return tuple(found)
