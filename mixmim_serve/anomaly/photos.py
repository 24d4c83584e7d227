"""The images of a source through the engine, in order, decoded ahead in threads."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixmim_serve.config import Preprocessing
from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays, largest_batch
from mixmim_serve.errors import ImageError, NotFiniteError
from mixmim_serve.extract.pipeline import BATCH, Loaded, run_ahead
from mixmim_serve.preprocess import Pixels, preprocess
from mixmim_serve.sources import Source, open_source
from mixmim_serve.sources.files import open_folder
from mixmim_serve.sources.names import is_image_name


@dataclass(frozen=True)
class Group:
    """Images of one call of the engine."""

    indices: Sequence[int]  # in the source
    pixels: Sequence[Pixels]
    outputs: Arrays  # one row per image
    failed: Sequence[tuple[int, ImageError]]  # what could not be read


def open_photos(data: str) -> Source:
    """A source of images, or a single image file.

    Raises:
        DataError: see `open_source`.
    """
    path = Path(data)
    if is_image_name(path.name) and path.is_file():
        return open_folder(data, str(path.parent), [path.name])
    return open_source(data)


def whole(preprocessing: Preprocessing) -> Preprocessing:
    """Preprocessing that shows the network all of a square photo; a bundle's own cuts off its borders."""
    return dataclasses.replace(preprocessing, resize_size=preprocessing.image_size)


def run_photos(
    engine: Engine, source: Source, outputs: Sequence[str], indices: Sequence[int] | None = None
) -> Iterator[Group]:
    """The chosen encoder outputs of a source's whole images, in groups, in the order of `indices`.

    Images that cannot be read, and those whose outputs have inf or NaN, are in `failed`.
    """
    preprocessing, batch = whole(engine.bundle.description.preprocessing), largest_batch(engine, BATCH)

    def load(index: int) -> Loaded[int]:
        try:
            return Loaded(index, preprocess(source.read(index), preprocessing))
        except ImageError as error:
            return Loaded(index, None, error)

    chosen = range(len(source.keys)) if indices is None else indices
    with contextlib.closing(run_ahead(engine, load, chosen, outputs, batch)) as groups:
        for entries, arrays in groups:
            yield _group(entries, arrays)


def _group(entries: Sequence[Loaded[int]], arrays: Arrays) -> Group:
    good = [entry for entry in entries if entry.error is None]
    failed = [(entry.item, entry.error) for entry in entries if entry.error is not None]
    finite = np.ones(len(good), bool)
    for array in arrays.values():
        finite &= np.isfinite(array.reshape(len(good), -1)).all(axis=1)
    for entry, is_finite in zip(good, finite, strict=True):
        if not is_finite:
            failed.append((entry.item, NotFiniteError("the model's result for this image has inf or NaN.")))
    kept = [entry for entry, is_finite in zip(good, finite, strict=True) if is_finite]
    pixels = [entry.pixels for entry in kept if entry.pixels is not None]
    return Group([entry.item for entry in kept], pixels, {name: a[finite] for name, a in arrays.items()}, failed)
