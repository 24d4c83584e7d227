"""Embed a folder of photos and search it: the photos most like one of them, and the most similar pairs.

    python examples/embed_and_search.py                                     # the twelve photos beside this script
    python examples/embed_and_search.py --photos ~/Pictures --query beach.jpg

Needs `pip install '.[cpu]'` and no torch. From some thousands of photos on, `mixmim extract` does the same work in
shards that survive a kill, and `mixmim neighbours` and `mixmim duplicates` search them (docs/extract.md).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.preprocess import preprocess
from mixmim_serve.sources import Source, open_source

BATCH = 32  # images per call of the engine

Vectors = NDArray[np.float32]


def main() -> None:
    """Embed, then search twice."""
    options = parse()
    engine = open_engine(options.bundle)
    print(f"engine: {engine.name} {engine.precision}, {engine.bundle.arch.embedding_size} numbers per photo")
    source = open_source(options.photos)
    start = time.perf_counter()
    keys, vectors = embed(engine, source)
    seconds = time.perf_counter() - start
    print(f"embedded {len(keys)} photos in {seconds:.1f} s")
    if options.query not in keys:
        raise SystemExit(f"{options.query} is not among the photos: choose one such as {keys[0]}")
    similarity = vectors @ vectors.T  # cosines, since every vector has length 1
    print(f"\nnearest to {options.query}")
    for number in nearest(similarity, keys.index(options.query), options.top):
        print(f"  {similarity[keys.index(options.query), number]:.3f}  {keys[number]}")
    print("\nmost similar pairs (from 0.995 on, look for duplicates)")
    for first, second in similar_pairs(similarity, options.top):
        print(f"  {similarity[first, second]:.3f}  {keys[first]}  {keys[second]}")


def embed(engine: Engine, source: Source) -> tuple[list[str], Vectors]:
    """Names and vectors, (photos, D) and each of length 1, of all photos that can be read."""
    keys, vectors = [], []
    for names, pixels in batches(engine, source):
        output = engine.run("encoder", {"pixels": pixels}, ["embedding"])["embedding"]
        keys += names
        vectors.append(output / np.linalg.norm(output, axis=1, keepdims=True))
    if not keys:
        raise DataError(f"none of the {len(source.keys)} photos can be read.")
    return keys, np.concatenate(vectors)


def batches(engine: Engine, source: Source) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """Decoded photos with their names; a photo that cannot be read is reported and left out."""
    names: list[str] = []
    images: list[NDArray[np.uint8]] = []
    for index, key in enumerate(source.keys):
        try:
            images.append(preprocess(source.read(index), engine.bundle.description.preprocessing))
            names.append(key)
        except ImageError as error:
            print(f"skipped {key}: {error}")
        if len(images) == BATCH:
            yield names, np.stack(images)
            names, images = [], []
    if images:
        yield names, np.stack(images)


def nearest(similarity: Vectors, row: int, count: int) -> list[int]:
    """The rows most similar to one, without itself, best first."""
    order = np.argsort(-similarity[row], kind="stable")
    return [int(number) for number in order if number != row][:count]


def similar_pairs(similarity: Vectors, count: int) -> list[tuple[int, int]]:
    """The pairs of rows with the largest cosines, best first."""
    first, second = np.triu_indices(len(similarity), k=1)
    order = np.argsort(-similarity[first, second], kind="stable")[:count]
    return list(zip(first[order].tolist(), second[order].tolist(), strict=True))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path(__file__).parent, help="a folder, tar or Parquet files")
    parser.add_argument("--query", default="hat.jpg", help="a photo of the folder, by its name there")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="a bundle folder; the shipped model")
    parser.add_argument("--top", type=int, default=3, help="how many to show")
    return parser.parse_args()


if __name__ == "__main__":
    main()
