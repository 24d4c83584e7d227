"""The threshold for near-duplicates, chosen from the data.

How alike different images are depends on the data: the nearest photo of another flower has a cosine of 0.94, the
nearest other solar cell one of 0.993, and in one folder some kinds of images lie denser than others. So the threshold
is where a neighbour is no longer expected by chance. Around each image the number of others within a distance grows
with a power of that distance. The 4th to 20th nearest tell the power (the dimension of the data: Levina and Bickel,
"Maximum likelihood estimation of intrinsic dimension", 2004) and how dense it is there; from that follows how many
images have a neighbour by chance within any distance. For each distance that is asked, images within half of it of an
earlier one are left out first: copies, even twenty of one image, would pass for density. The threshold is the largest
distance at which fewer than `BY_CHANCE` images have a neighbour.
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

SAMPLE = 2048  # images that the density is taken from, evenly spaced: memory stays constant
FEWEST = 50  # images that tell a density; fewer take THRESHOLD
FIRST, LAST = 4, 20  # neighbours that tell density and dimension; nearer ones may be crops and mirrored images
BY_CHANCE = 0.5  # images expected to have a neighbour above the threshold without any copy
COPIES_WITHIN = 0.5  # of a distance; leaving out all within it would leave out what is near by chance
MOST_COPIES = 30  # of one image; where more are within a distance, it is a kind of image and no copies
DISTANCES = np.geomspace(1e-5, 0.03, 24)  # 1 - threshold: below is rounding, above are crops at best
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
        return self.automatic if self.loose else min(1 - (1 - self.threshold) / 4, 1 - float(DISTANCES[0]))


def choose(features: FeatureFolder, progress: Callable[[int], None] = lambda rows: None) -> Choice:
    """Choose a threshold from the nearest cosines of at most SAMPLE images; see the module."""
    rows = np.unique(np.linspace(0, len(features) - 1, min(SAMPLE, len(features))).round().astype(np.int64))
    vectors = features.vectors(rows.tolist())
    nearest = _nearest(features, rows, vectors, progress)
    threshold, reason = from_vectors(vectors, len(features))
    reason = f"{reason}; the nearest image has a cosine of {np.median(nearest):.4f} in the median"
    return Choice(threshold, reason, nearest, len(features), threshold)


def from_vectors(vectors: Vectors, images: int) -> tuple[float, str]:
    """Threshold and reason, from some (rows, D) of the unit vectors of `images` images."""
    if len(vectors) < FEWEST:
        return THRESHOLD, f"the default, since {images:,} images are too few to choose from"
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    expected = np.array([_by_chance(cosines, distance, images) for distance in DISTANCES])
    calm = np.flatnonzero(expected <= BY_CHANCE)
    if not len(calm):
        return float(1 - DISTANCES[0]), "the highest that rounding allows"
    last = int(calm[-1])
    if last == len(DISTANCES) - 1:
        return float(1 - DISTANCES[last]), "the least that is used for copies"
    counts = np.log(np.maximum(expected[last : last + 2], 1e-9))
    distance = math.exp(np.interp(math.log(BY_CHANCE), counts, np.log(DISTANCES[last : last + 2])))
    return 1 - distance, "chosen from the data: fewer than one image is expected to reach it by chance"


def _by_chance(cosines: Vectors, distance: float, images: int) -> float:
    """How many of `images` images have a neighbour within a distance by chance; see the module."""
    alone = _without_copies(cosines, 1 - COPIES_WITHIN * distance)
    if len(alone) < FEWEST:
        return math.inf
    near = np.partition(cosines[np.ix_(alone, alone)], len(alone) - LAST, 1)[:, -LAST:]
    distances = np.log(np.maximum(np.sort(1 - near.astype(np.float64), 1), 1e-7))
    dimension = 1 / max(float((distances[:, -1:] - distances[:, FIRST - 1 : -1]).mean()), 1e-3)
    powers = np.minimum(dimension * (math.log(distance) - distances[:, FIRST - 1]), 50)
    share = len(alone) / len(cosines)
    neighbours = (FIRST - 0.5) * np.exp(powers) * images / len(cosines)  # of each, among all images
    return float(-np.expm1(-neighbours).mean() * share * images)


def _without_copies(cosines: Vectors, threshold: float) -> NDArray[np.int64]:
    """Rows without those that are near an earlier one that stays; none if too many are near one."""
    near = cosines >= threshold
    stays = np.ones(len(cosines), bool)
    for row in np.flatnonzero(near.any(1)):
        if stays[row]:
            copies = near[row] & stays
            copies[: row + 1] = False
            if copies.sum() > MOST_COPIES:
                return np.zeros(0, np.int64)
            stays[copies] = False
    return np.flatnonzero(stays)


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
    features: FeatureFolder, rows: NDArray[np.int64], vectors: Vectors, progress: Callable[[int], None]
) -> NDArray[np.float32]:
    """Cosine of each of these rows with the nearest other row of the folder."""
    nearest = np.full(len(rows), -1, np.float32)
    for block in features.blocks():
        for start in range(0, len(block.vectors), TILE):
            cosines = vectors @ block.vectors[start : start + TILE].T
            own = rows - block.start - start
            inside = np.flatnonzero((own >= 0) & (own < cosines.shape[1]))
            cosines[inside, own[inside]] = -1
            nearest = np.maximum(nearest, cosines.max(1))
        progress(block.start + len(block.vectors))
    return nearest
