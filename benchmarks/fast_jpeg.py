"""How much `--fast-jpeg` changes embeddings: the lowest cosine similarity for each scale and margin.

    python -m benchmarks.fast_jpeg photos/train other-photos --images 48

The margin is the shorter side of the reduced image over the side that preprocessing resizes it to. The photos are
small, so larger ones are tiled from them until the shorter side is what scale and margin need. Their detail is as fine
as in the small photos, finer than a camera's at that size, and so the harder case.
"""

from __future__ import annotations

import argparse
import io
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.preprocess import Pixels, decode, resize_and_crop
from mixmim_serve.sources.names import list_images

FACTORS, MARGINS = (2, 4, 8), (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
TILE, LARGEST = 112, 2400  # pixels: one tile, and the largest tiled image


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, help="folders of photos")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--images", type=int, default=48, help="images per row")
    arguments = parser.parse_args()
    engine, rng = open_engine(arguments.bundle, "onnx"), random.Random(0)  # noqa: S311
    photos = [path for folder in arguments.photos for path in list_images(folder)]
    preprocessing = engine.bundle.description.preprocessing
    print("| scale | margin | side | least cosine | median | mean difference, of 255 |\n|---|---|---|---|---|---|")
    for factor in FACTORS:
        for margin in MARGINS:
            side = math.ceil(factor * margin * preprocessing.resize_size)
            if side > LARGEST:
                continue
            files = [lay_out(photos, side, rng) for _ in range(arguments.images)]
            full = [resize_and_crop(decode(data), preprocessing) for data in files]
            fast = [
                resize_and_crop(decode(data, reduction=lambda w, h, by=factor: by), preprocessing) for data in files
            ]
            cosines = (embed(engine, full) * embed(engine, fast)).sum(1)
            pixels = np.abs(np.stack(full).astype(int) - np.stack(fast)).mean()
            row = f"{cosines.min():.6f} | {np.median(cosines):.6f} | {pixels:.2f}"
            print(f"| 1/{factor} | {margin} | {side} | {row} |", flush=True)


def lay_out(photos: Sequence[Path], side: int, rng: random.Random) -> bytes:
    """A JPEG of (side, side) pixels, tiled from photos at their own scale."""
    across = -(-side // TILE)
    sheet = Image.new("RGB", (across * TILE, across * TILE))
    for place in range(across * across):
        photo = decode(rng.choice(photos).read_bytes())
        tile = photo.crop((0, 0, TILE, TILE)) if min(photo.size) >= TILE else photo.resize((TILE, TILE))
        sheet.paste(tile, (place % across * TILE, place // across * TILE))
    buffer = io.BytesIO()
    sheet.crop((0, 0, side, side)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def embed(engine: Engine, images: Sequence[Pixels]) -> np.ndarray:
    """Embeddings of unit length, (images, D)."""
    rows = [engine.run("encoder", {"pixels": image[None]}, ["embedding"])["embedding"] for image in images]
    vectors = np.concatenate(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
