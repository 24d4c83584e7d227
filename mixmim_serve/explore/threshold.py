"""The threshold for near-duplicates, chosen from the data.

How alike different images are depends on the data: the nearest photo of another flower has a cosine of 0.94, the
nearest other solar cell one of 0.993, and in one folder some kinds of images lie denser than others. So the threshold
is where a neighbour is no longer expected by chance. Around each image the number of others within a distance grows
with a power of that distance. The 4th to 20th nearest tell the power (the dimension of the data: Levina and Bickel,
"Maximum likelihood estimation of intrinsic dimension", 2004) and how dense it is there; the three nearest, among which
copies are, are left out. From that follows for any distance how many images have a neighbour within it by chance. At
the threshold it is `BY_CHANCE`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.explore.duplicates import THRESHOLD, TILE, Group
from mixmim_serve.extract.features import FeatureFolder, Vectors

SAMPLE = 4096  # images whose nearest is looked up, evenly spaced: memory stays constant, time linear
FEWEST = 50  # images that a distribution is fitted to; fewer take THRESHOLD
FIRST, LAST = 4, 20  # neighbours that tell density and dimension; up to 3 copies of an image do not matter
BY_CHANCE = 0.5  # images expected to have a neighbour above the threshold without any copy
RANGE = 0.97, 0.99999  # of the threshold: below are crops at best, above is rounding
IDENTICAL = 1 - 1e-5  # cosine of copies whatever the data; they are no neighbours
LARGE_SHARE, LARGE_SHARE_LOOSE = 0.3, 0.15  # of the images in groups; with a looser threshold than from the data
LARGE_GROUP = 10  # images in one group; fewer in all groups are not suspicious either


@dataclass(frozen=True)
class Choice:
    """A threshold, why it is this one, and the distribution it was chosen from."""

    threshold: float
    reason: str
    nearest: NDArray[np.float32]  # cosine of each sampled image with its nearest other image
    images: int  # in the folder
    automatic: float  # the threshold from the data

    def replaced(self, threshold: float | None) -> Choice:
        """The same distribution with the threshold of the user, if there is one."""
        if threshold is None:
            return self
        reason = f"as asked for; from the data it would be {self.automatic:.6g}"
        return dataclasses.replace(self, threshold=threshold, reason=reason)

    @property
    def loose(self) -> bool:
        """Whether the threshold is below that from the data."""
        return self.threshold < self.automatic

    @property
    def stricter(self) -> float:
        """A threshold to try if groups are too large: that from the data, or half the distance between vectors."""
        return self.automatic if self.loose else min(1 - (1 - self.threshold) / 4, RANGE[1])


def choose(features: FeatureFolder, progress: Callable[[int], None] = lambda rows: None) -> Choice:
    """Choose a threshold from the nearest cosines of at most SAMPLE images; see the module."""
    rows = np.unique(np.linspace(0, len(features) - 1, min(SAMPLE, len(features))).round().astype(np.int64))
    nearest, neighbours = _nearest(features, rows, progress)
    threshold, reason = from_neighbours(1 - neighbours.astype(np.float64), len(features))
    return Choice(threshold, reason, nearest, len(features), threshold)


def from_neighbours(distances: NDArray[np.float64], images: int) -> tuple[float, str]:
    """Threshold and reason, from distances (1 - cosine) of some of `images` images to their LAST nearest, ascending."""
    distances = np.maximum(distances[distances[:, -1] < 2], 1e-7)  # without those that are all but alone
    if len(distances) < FEWEST:
        return THRESHOLD, f"the default, since {images:,} images are too few to choose from"
    first = np.log(distances[:, FIRST - 1])
    dimension = 1 / max(float(np.log(distances[:, -1:] / distances[:, FIRST - 1 : -1]).mean()), 1e-3)

    def by_chance(log_distance: float) -> float:
        """The number of all images that have a neighbour within it."""
        expected = (FIRST - 0.5) * np.exp(np.minimum(dimension * (log_distance - first), 50))  # neighbours of each
        return float(-np.expm1(-expected).mean() * images)

    chosen = 1 - math.exp(_root(by_chance, BY_CHANCE, math.log(1e-9), 0))
    body = f"the nearest different image has a cosine of {1 - np.median(distances[:, 0]):.4f} in the median"
    if chosen < RANGE[0]:
        return RANGE[0], f"the least that is used for copies; {body}"
    if chosen > RANGE[1]:
        return RANGE[1], f"the highest that rounding allows; {body}"
    return chosen, f"chosen from the data: fewer than one image is expected to reach it by chance; {body}"


def _root(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a rising function has this value, by bisection."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > value else (middle, high)
    return low


def suspicion(groups: Sequence[Group], choice: Choice) -> str:
    """A warning that groups are suspiciously large, with a threshold to try instead; empty if they are not."""
    grouped, largest = sum(len(group.keys) for group in groups), max((len(group.keys) for group in groups), default=0)
    share = LARGE_SHARE_LOOSE if choice.loose else LARGE_SHARE
    if grouped > max(share * choice.images, LARGE_GROUP):
        found = f"{grouped:,} of {choice.images:,} images are in groups"
    elif largest > LARGE_GROUP:
        found = f"one group has {largest:,} images"
    else:
        return ""
    return f"{found}: they may be alike rather than copies; try --threshold {choice.stricter:.5g}"


def _nearest(
    features: FeatureFolder, rows: NDArray[np.int64], progress: Callable[[int], None]
) -> tuple[Vectors, Vectors]:
    """Cosines of these rows with the nearest other row (rows,) and the nearest below IDENTICAL (rows, LAST), or -1."""
    vectors = features.vectors(rows.tolist())
    nearest, neighbours = np.full(len(rows), -1, np.float32), np.full((len(rows), LAST), -1, np.float32)
    for block in features.blocks():
        for start in range(0, len(block.vectors), TILE):
            cosines = vectors @ block.vectors[start : start + TILE].T
            own = rows - block.start - start
            inside = np.flatnonzero((own >= 0) & (own < cosines.shape[1]))
            cosines[inside, own[inside]] = -1
            nearest = np.maximum(nearest, cosines.max(1))
            cosines[cosines > IDENTICAL] = -1
            both = np.concatenate([neighbours, cosines], 1)
            neighbours = np.partition(both, both.shape[1] - LAST)[:, -LAST:]
        progress(block.start + len(block.vectors))
    return nearest, -np.sort(-neighbours)
