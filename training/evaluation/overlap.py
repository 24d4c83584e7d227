"""Images that two sources share, by content: results on them say nothing about new images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ImageError, MixMIMError
from mixmim_serve.sources import Source, fingerprint, open_source

Pairs = tuple[tuple[str, str], ...]  # keys (val, train) of images with equal content

MAX_READ = 20_000  # images of a training set that are read again to compare them


def shared(val_keys: Sequence[str], val_hashes: Sequence[bytes], train: Mapping[bytes, str]) -> Pairs:
    """The images of val whose hash is also one of train, in val's order; `train` has keys by hash."""
    pairs = zip(val_keys, val_hashes, strict=True)
    return tuple((key, train[digest]) for key, digest in pairs if digest and digest in train)


def keys_by_hash(keys: Sequence[str], hashes: Sequence[bytes]) -> dict[bytes, str]:
    """The first key of each content; unreadable images, whose hash is empty, are left out."""
    found: dict[bytes, str] = {}
    for key, digest in zip(keys, hashes, strict=True):
        if digest:
            found.setdefault(digest, key)
    return found


def read_hashes(source: Source) -> tuple[bytes, ...]:
    """SHA-256 of every image's file, without decoding it; empty for one that cannot be read."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        return tuple(pool.map(lambda index: _hash(source, index), range(len(source.keys))))


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
