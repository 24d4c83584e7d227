"""Planted copies found by `mixmim duplicates`: precision, and recall by kind of copy, beside a fixed threshold.

    python -m benchmarks.duplicates elpv.tar flowers5.tar clothing10.tar --copies 25 --output duplicates.md

Of each data set `--copies` images are copied in each of six ways and embedded with the rest. A link (an image and the
first of its group) is right if both come from one image, or are the same bytes; real duplicates that the data set holds
otherwise count as wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.provenance import about, heading
from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.explore.duplicates import THRESHOLD, duplicates
from mixmim_serve.explore.threshold import choose
from mixmim_serve.extract.features import VectorBlock
from mixmim_serve.preprocess import decode, preprocess
from mixmim_serve.sources import open_source

BATCH = 32


def saved(image: Image.Image, quality: int = 90) -> bytes:
    """A JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def scaled(image: Image.Image, share: float) -> Image.Image:
    """The image at a share of its size."""
    return image.resize((round(share * image.width), round(share * image.height)), Image.Resampling.LANCZOS)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without a share of the image at each side."""
    dx, dy = round(share * image.width), round(share * image.height)
    return image.crop((dx, dy, image.width - dx, image.height - dy))


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG 60": lambda image: saved(image, 60),
    "JPEG 30": lambda image: saved(image, 30),
    "scaled to 60 %": lambda image: saved(scaled(image, 0.6)),
    "2 % cut at each side": lambda image: saved(cropped(image, 0.02)),
    "5 % cut at each side": lambda image: saved(cropped(image, 0.05)),
    "mirrored": lambda image: saved(ImageOps.mirror(image)),
}


@dataclass
class InMemory:
    """Vectors as a folder of features; see `FeatureFolder`."""

    all_vectors: np.ndarray
    shards: Sequence[int] = field(default=(0,))

    def __len__(self) -> int:
        return len(self.all_vectors)

    def blocks(self) -> Iterator[VectorBlock]:
        """All in one."""
        yield self.block(0)

    def block(self, number: int) -> VectorBlock:
        """All."""
        return VectorBlock(0, self.all_vectors)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Row numbers."""
        return [str(row) for row in rows]

    def vectors(self, rows: Sequence[int]) -> np.ndarray:
        """Of these rows."""
        return self.all_vectors[list(rows)]


def main() -> None:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders or .tar files of images")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--copies", type=int, default=25, help="images copied in each way")
    parser.add_argument("--output", type=Path, help="also write the table here, as Markdown")
    arguments = parser.parse_args()
    engine = open_engine(arguments.bundle)
    lines = [
        *heading(f"Planted copies, {arguments.bundle.name} on {engine.name} {engine.precision}", facts()),
        "",
        f"| data | images | copies | threshold | links | precision | {' | '.join(KINDS)} |",
        "|---|---|---|---|---|---|" + "---|" * len(KINDS),
    ]
    print("\n".join(lines))
    for name in arguments.data:
        for copies in (0, arguments.copies):
            vectors, origins, kinds = plant(engine, name, copies)
            for threshold in (None, THRESHOLD):
                lines.append(row(Path(name).stem, vectors, origins, kinds, threshold))
                print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def facts() -> dict[str, Any]:
    """Where the table comes from."""
    return about("duplicates", None, ("openvino", "numpy", "pillow"))


def plant(engine: Engine, data: str, copies: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Vectors (rows, D) of all images and their copies; what each comes from (a hash of bytes), and how."""
    source = open_source(data)
    rng = np.random.default_rng(0)
    files = [source.read(index) for index in range(len(source.keys))]
    origins = [hashlib.sha256(data).hexdigest() for data in files]
    kinds = [""] * len(files)
    for kind, copy in KINDS.items():
        for index in rng.choice(len(source.keys), copies, replace=False).tolist():
            files.append(copy(decode(files[index])))
            origins.append(origins[index])
            kinds.append(kind)
    return embed(engine, files), origins, kinds


def embed(engine: Engine, files: Sequence[bytes]) -> np.ndarray:
    """Embeddings of unit length, (rows, D)."""
    preprocessing = engine.bundle.description.preprocessing
    with ThreadPoolExecutor(2) as pool:
        pixels = np.stack(list(pool.map(lambda data: preprocess(data, preprocessing), files)))
    batches = [
        engine.run("encoder", {"pixels": pixels[start : start + BATCH]}, ["embedding"])["embedding"]
        for start in range(0, len(pixels), BATCH)
    ]
    vectors = np.concatenate(batches).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def row(name: str, vectors: np.ndarray, origins: Sequence[str], kinds: Sequence[str], threshold: float | None) -> str:
    """A line of the table; without a threshold it is chosen from the data."""
    features: Any = InMemory(vectors)
    used = threshold or choose(features).threshold
    links, right, found = 0, 0, set()
    for group in duplicates(features, used):
        first, *others = map(int, group.keys)
        for other in others:
            links += 1
            right += origins[first] == origins[other]
            found |= {other} if origins[first] == origins[other] else set()
    cells = []
    for kind in KINDS:
        rows = [place for place, each in enumerate(kinds) if each == kind]
        cells.append(f"{sum(place in found for place in rows)}/{len(rows)}" if rows else "")
    chosen = f"{used:.5f}{'' if threshold else ' chosen'}"
    precision = f"{right / links:.2f}" if links else "-"
    return f"| {name} | {len(vectors)} | {len(vectors) - kinds.count('')} | {chosen} | {links} | {precision} | " + (
        " | ".join(cells) + " |"
    )


if __name__ == "__main__":
    main()
