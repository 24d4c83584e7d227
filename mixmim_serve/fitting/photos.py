"""Labelled images, and their features: what an engine makes of each image and of its mirror image."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.config import Preprocessing
from mixmim_serve.cores import usable_cores
from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import largest_batch
from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.extract.pipeline import AHEAD, BATCH, Loaded, Runner, map_ahead
from mixmim_serve.heads import Floats, pooled
from mixmim_serve.preprocess import Pixels, preprocess
from mixmim_serve.sources import Source, open_source
from mixmim_serve.sources.parts import train_and_val

Labels = NDArray[np.int64]
Views = tuple[int, list[Pixels], bytes, str]  # an image's index, its views, SHA-256 of its file, why there are none


@dataclass(frozen=True)
class Photos:
    """Images whose classes are numbered in the order of `classes`."""

    source: Source
    classes: tuple[str, ...]
    labels: Labels  # of every image of the source


@dataclass(frozen=True)
class Features:
    """The readable images of `Photos`, in the source's order."""

    values: Floats  # (images, views, F); the first view is the image itself
    labels: Labels
    hashes: tuple[bytes, ...]  # SHA-256 of each file
    unreadable: tuple[str, ...]  # one sentence per image


def open_photos(data: str, val: str = "") -> tuple[Photos, Photos | None]:
    """Images to fit to, and images to judge by: DATA/train and DATA/val where those exist; the latter may be missing.

    Raises:
        DataError: without labels, with a single class, or when val has a class that is not in train.
    """
    data, val = train_and_val(data, val)
    train = numbered(open_source(data))
    if len(train.classes) < 2:
        raise DataError(f"{data} has only one class ({train.classes[0]}): at least two are needed.")
    return train, numbered(open_source(val), train.classes) if val else None


def numbered(source: Source, classes: Sequence[str] = ()) -> Photos:
    """A source with its classes numbered: in alphabetical order, or as in `classes`.

    Raises:
        DataError: when it has no labels, or one that is not in `classes`.
    """
    if source.labels is None:
        raise DataError(f"{source.name} has no labels: put the images of each class into a folder named after it.")
    names = tuple(classes) or tuple(sorted(set(source.labels)))
    number = {name: position for position, name in enumerate(names)}
    if unknown := sorted(set(source.labels) - number.keys()):
        shown = ", ".join(unknown[:5])
        raise DataError(f"{source.name} has images of {shown}, not among the {len(names)} classes to learn.")
    return Photos(source, names, np.array([number[label] for label in source.labels], np.int64))


def features_of(
    engine: Engine,
    photos: Photos,
    inputs: Sequence[str] = ("embedding",),
    *,
    mirrored: bool = False,
    progress: Callable[[int], None] = lambda images: None,
) -> Features:
    """Run an engine over all images, with `mirrored` also over their mirror images.

    Raises:
        DataError: when no image is readable.
    """
    batch, each = largest_batch(engine, BATCH), 2 if mirrored else 1
    indices: list[int] = []
    hashes: list[bytes] = []
    unreadable: list[str] = []
    vectors: list[Floats] = []

    def views(loaded: Iterator[Views]) -> Iterator[Loaded[int]]:
        for index, pixels, digest, reason in loaded:
            progress(1)
            if reason:
                unreadable.append(reason)
                continue
            indices.append(index)
            hashes.append(digest)
            yield from (Loaded(index, view) for view in pixels)

    preprocessing = engine.bundle.description.preprocessing
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(contextlib.closing(Runner(engine)))
        pool = stack.enter_context(ThreadPoolExecutor(usable_cores()))
        read = map_ahead(
            pool,
            lambda index: _load(photos.source, index, preprocessing, each),
            range(len(photos.labels)),
            AHEAD * batch,
        )
        loaded = views(stack.enter_context(contextlib.closing(read)))
        for group, arrays in runner.batches(loaded, list(inputs), batch, full=True):
            vectors += [pooled({name: arrays[name][row] for name in inputs}, inputs) for row in range(len(group))]
    if not vectors:
        raise DataError(f"none of the {len(photos.labels)} images in {photos.source.name} can be read: {unreadable[0]}")
    values = np.stack(vectors).reshape(len(indices), each, -1)
    return Features(values, photos.labels[indices], tuple(hashes), tuple(unreadable))


def _load(source: Source, index: int, preprocessing: Preprocessing, views: int) -> Views:
    """Read an image and make its views; runs in a thread."""
    try:
        data = source.read(index)
        pixels = preprocess(data, preprocessing)
    except ImageError as error:
        source.check(index)
        return index, [], b"", f"{source.keys[index]}: {error}"
    return index, [pixels, np.ascontiguousarray(pixels[:, ::-1])][:views], hashlib.sha256(data).digest(), ""
