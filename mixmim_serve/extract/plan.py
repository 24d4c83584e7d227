"""Cut a source into shards. The cuts depend only on its images, so that resumed runs and all workers agree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmim_serve.sources import Source

IMAGES = 4096  # per shard at least, which a crash loses: 4 MB of `tiny` embeddings, 17 MB of `base`
SHARDS = 65_536  # about, at most: above 268 million images shards grow, to 15,259 images for a billion


@dataclass(frozen=True)
class Shard:
    """Consecutive images of a source, whose features are written together."""

    number: int
    indices: range

    @property
    def name(self) -> str:
        """The name used in file names; sorts like the number up to a million shards."""
        return f"{self.number:06d}"


@dataclass(frozen=True)
class ShardResult:
    """A complete shard."""

    shard: str
    images: int
    rows: int
    errors: tuple[tuple[str, str], ...]  # key and reason
    files: Mapping[str, Any]  # name: size in bytes, sha256
    busy: float = 0.0  # seconds that the engine computed; not recorded


def images_per_shard(images: int) -> int:
    """The default number of images per shard: `IMAGES`, or more to stay at about `SHARDS` shards."""
    return max(IMAGES, -(-images // SHARDS))


def plan(source: Source, images: int) -> tuple[Shard, ...]:
    """Cut a source into shards of at most `images`.

    Shards follow the source's own cuts (tar shards, Parquet row groups): small runs are joined as a whole, larger ones
    cut evenly, so that no two workers read one row group if it fits a shard.
    """
    pieces: list[range] = []
    for run in source.runs:
        parts = -(-len(run) // images)
        cuts = [run.start + len(run) * part // max(parts, 1) for part in range(parts + 1)]
        for start, stop in itertools.pairwise(cuts):
            if pieces and stop - pieces[-1].start <= images:
                pieces[-1] = range(pieces[-1].start, stop)
            else:
                pieces.append(range(start, stop))
    return tuple(Shard(number, indices) for number, indices in enumerate(pieces))
