"""The photos that README and docs show answers for: that nothing was trained on them, and what a head answers."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixmim_serve.engines import Engine
from mixmim_serve.errors import ImageError
from mixmim_serve.heads import Head
from mixmim_serve.preprocess import preprocess
from mixmim_serve.sources import open_source
from mixmim_serve.tasks import top_classes

REPOSITORY = Path(__file__).parent.parent
FOLDERS = (REPOSITORY / "examples", REPOSITORY / "export" / "photos")  # of CLASS.jpg and CLASS-2.jpg
SIDE = 16  # pixels of a thumbnail
ALIKE = 3.0  # grey levels of 255 by which thumbnails of one photo may differ on average after another resizing


@dataclass(frozen=True)
class Answer:
    """What a shown photo is, and what the head for it says."""

    photo: Path
    truth: str
    label: str
    probability: float


def shown_photos() -> list[Path]:
    """The photos that README and docs show answers for."""
    return [path for folder in FOLDERS for path in sorted(folder.glob("*.jpg"))]


def thumbnail(data: bytes) -> NDArray[np.float32]:
    """A photo as 16 x 16 grey levels, which survive resizing and compression."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()


def check_never_seen(shown: Sequence[Path], seen: Sequence[Path]) -> float:
    """The smallest mean difference, in grey levels, between thumbnails of a shown photo and of one that was trained on.

    Raises:
        AssertionError: when one was trained on, byte by byte or nearly so.
    """
    contents = [path.read_bytes() for path in shown]
    digests = {hashlib.sha256(data).digest(): path for data, path in zip(contents, shown, strict=True)}
    small = np.stack([thumbnail(data) for data in contents])
    nearest = np.inf
    for folder in seen:
        source = open_source(str(folder))
        for index, key in enumerate(source.keys):
            try:
                data = source.read(index)
                difference = np.abs(small - thumbnail(data)).mean(axis=1)
            except (ImageError, OSError):
                continue
            same = digests.get(hashlib.sha256(data).digest())
            assert same is None, f"{same} was trained on: {folder}/{key}"
            like = shown[int(difference.argmin())]
            assert difference.min() > ALIKE, f"{like} was trained on: it looks like {folder}/{key}"
            nearest = min(nearest, float(difference.min()))
    return nearest


def answers(engine: Engine, head: Head) -> Iterator[Answer]:
    """What a head answers for each shown photo, whose class its name says."""
    for path in shown_photos():
        pixels = preprocess(path.read_bytes(), engine.bundle.description.preprocessing)
        arrays = engine.run("encoder", {"pixels": pixels[None]}, head.inputs)
        best = top_classes(head, head.logits({name: array[0] for name, array in arrays.items()}), 1)[0]
        truth = path.stem.removesuffix("-2")
        yield Answer(path.relative_to(REPOSITORY), truth, best.label, best.probability)
