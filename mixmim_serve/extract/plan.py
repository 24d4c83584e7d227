"""A source cut into shards: by its images alone, so that a resumed run and every worker cut it alike."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmim_serve.sources import Source

IMAGES = 4096  # a shard at least: what a crash loses; 4 MB of `tiny` embeddings, 17 MB of `base`
SHARDS = 65_536  # about, at most: above 268 million images shards grow instead, to 15,259 for a billion


@dataclass(frozen=True)
class Shard:
    """Neighbouring images of a source, and one file of features."""

    number: int
    indices: range

    @property
    def name(self) -> str:
        """As in file names; sorts like the number up to a million shards."""
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Outcome:
    """A shard that is whole."""

    shard: str
    images: int
    rows: int
    errors: tuple[tuple[str, str], ...]  # key and reason
    files: Mapping[str, Any]  # name: bytes and sha256
    busy: float = 0.0  # seconds that the engine ran; not recorded


def images_a_shard(images: int) -> int:
    """How many images a shard has when nobody says: `IMAGES`, or more so that there are about `SHARDS`."""
    return max(IMAGES, -(-images // SHARDS))


def plan(source: Source, images: int) -> tuple[Shard, ...]:
    """Cut a source into shards of at most `images`.

    Where the source itself is cut (a tar shard, a Parquet row group), so is the plan where it can: small runs are
    joined whole, larger ones cut evenly, so that no two workers read one row group if it fits a shard.
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
