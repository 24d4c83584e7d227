"""Images that two sources share, by content: results on them say nothing about new images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ImageError, MixMIMError
from mixmim_serve.sources import Source, fingerprint, open_source

Hashes = NDArray[np.bytes_]
Pairs = tuple[tuple[str, str], ...]  # keys (val, train) of images with equal content

MAX_READ = 20_000  # images of a training set that are read again to compare them


def hash_array(hashes: Sequence[bytes]) -> Hashes:
    """SHA-256 digests, empty for unreadable images, in 32 bytes each."""
    return np.array(hashes, "S32")


def first_of_each(hashes: Sequence[bytes]) -> NDArray[np.int64]:
    """Indices of the first image of each content, in source order."""
    _, first = np.unique(hash_array(hashes), return_index=True)
    return np.sort(first)


def equal_contents(hashes: Hashes) -> list[list[int]]:
    """Indices of images with equal content, one list per content that occurs more than once, in source order."""
    order = np.argsort(hashes, kind="stable")
    edges = np.flatnonzero(hashes[order[1:]] != hashes[order[:-1]]) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(hashes))
    repeated = (ends - starts > 1) & (hashes[order[starts]] != b"")
    spans = zip(starts[repeated].tolist(), ends[repeated].tolist(), strict=True)
    return sorted(order[start:end].tolist() for start, end in spans)


def shared(val_keys: Sequence[str], val_hashes: Hashes, train_keys: Sequence[str], train_hashes: Hashes) -> Pairs:
    """The images of val whose content is also in train, in val's order, each with the first such image of train."""
    count = len(train_keys)
    groups = [group for group in equal_contents(np.concatenate([train_hashes, val_hashes])) if group[0] < count]
    pairs = sorted((index - count, group[0]) for group in groups for index in group if index >= count)
    return tuple((val_keys[index], train_keys[first]) for index, first in pairs)


def read_hashes(source: Source) -> Hashes:
    """SHA-256 of every image's file, without decoding it; empty for one that cannot be read."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        return hash_array(list(pool.map(lambda index: _hash(source, index), range(len(source.keys)))))


def training_images(provenance: Mapping[str, Any]) -> Source | None:
    """The images that a checkpoint was trained on, if they still lie where they did then, and are not too many to read.

    A linear probe's head has images of its own: those it was trained on.
    """
    recorded = provenance.get("head", provenance)
    images = recorded.get("images") if isinstance(recorded, Mapping) else None
    if not isinstance(images, Mapping) or not 0 < int(images.get("count", 0)) <= MAX_READ:
        return None
    place = str(images.get("source", ""))
    if "://" in place or not Path(place).exists():
        return None
    try:
        source = open_source(place)
    except MixMIMError:
        return None
    return source if fingerprint(source) == images.get("fingerprint") else None


def leak(pairs: Pairs, val: str = "val", train: str = "train") -> str:
    """One sentence about shared images; `pairs` is not empty."""
    count = f"{len(pairs):,} image" if len(pairs) == 1 else f"{len(pairs):,} images"
    return f"{count} of {val} also in {train}, such as {pairs[0][0]} (in train: {pairs[0][1]})."


def _hash(source: Source, index: int) -> bytes:
    try:
        return hashlib.sha256(source.read(index)).digest()
    except ImageError:
        return b""
