"""Normal photos -> calibration.

The photos are split into parts. Those of each part are scored against the others, so that no photo is scored against
itself; their distances say what is normal. What is kept of all photos together then serves. New normal photos are a
little nearer to it than those of a part were to the others, so that there are rather fewer false alarms than asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mixmim_serve.anomaly.calibration import About, Calibration
from mixmim_serve.anomaly.heatmap import PLACE_QUANTILES
from mixmim_serve.anomaly.memory import Memory
from mixmim_serve.anomaly.patches import STAGE, Floats, Whitening, patch_features, whitening
from mixmim_serve.anomaly.photos import Group, run_photos
from mixmim_serve.anomaly.rates import DEFAULT_RATE, check_rate
from mixmim_serve.bundle import GOLDEN
from mixmim_serve.engines import Engine, identity
from mixmim_serve.errors import ConfigError, DataError, ImageError
from mixmim_serve.preprocess import Pixels, preprocess
from mixmim_serve.sources import Source
from mixmim_serve.tasks import partner_of, score_image

FEWEST = 50  # normal photos
MOST = 5000  # normal photos that are used, drawn evenly; bounds time and memory
FIRST = 256  # photos whose patches are whitened by their own covariance, kept in full until then
FOLDS = 5
MORE_FOLDS, FEW = 20, 500  # parts for fewer photos: each is then scored against nearly as many as a new photo will be
PATCHES = 10_000  # in the coreset
DIMENSIONS = 64  # of a whitened patch
MASKS = 2  # pairs, as POST /score takes without an option
RECONSTRUCTED = 500  # photos, at most: each takes four passes of the decoder


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    Raises:
        ConfigError: for a number that cannot be used.
    """

    patches: int = PATCHES
    rate: float = DEFAULT_RATE
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if self.patches < 1:
            raise ConfigError(f"a coreset needs 1 patch or more, got {self.patches}.")


Failed = list[tuple[str, ImageError]]


def calibrate(
    engine: Engine, source: Source, options: Options, report: Callable[[int], None] = lambda done: None
) -> tuple[Calibration, Failed]:
    """Calibrate an engine on a source of normal photos; returns the photos that could not be read, too.

    Raises:
        DataError: for fewer than `FEWEST` readable photos.
    """
    _check_count(source, len(source.keys))
    reader = _Reader(engine, source)
    whiten = reader.read(report)
    embeddings, patches = np.concatenate(reader.embeddings), np.concatenate(reader.patches)
    folds = np.random.default_rng(options.seed).permutation(len(embeddings)) % (
        FOLDS if len(embeddings) >= FEW else MORE_FOLDS
    )
    parts, places = _held_out(patches, embeddings, folds, options)
    known = identity(engine)
    about = About(
        model=known["model"],
        model_fingerprint=known["model_fingerprint"],
        fingerprint=known["fingerprint"],
        engine=f"{engine.name} {engine.precision}",
        photos=len(embeddings),
        stage=STAGE,
        rate=options.rate,
        masks=MASKS if reader.reconstruction else 0,
    )
    scores = np.asarray(reader.reconstruction, np.float32)
    calibration = Calibration(
        about,
        Memory.of(patches, embeddings, options.patches, options.seed),
        whiten,
        parts,
        folds.astype(np.float32),
        np.quantile(places, PLACE_QUANTILES).astype(np.float32),
        np.quantile(scores, np.linspace(0, 1, 101)).astype(np.float32) if len(scores) else scores,
    )
    return calibration, reader.failed


def _held_out(
    patches_NHWK: Floats, embeddings_ND: Floats, folds: NDArray[np.int64], options: Options
) -> tuple[Floats, Floats]:
    """Distances (N, 2) of each photo, and (N, H, W) of its places, from the photos of the other folds."""
    parts = np.empty((len(folds), 2), np.float32)
    places = np.empty(patches_NHWK.shape[:3], np.float32)
    for fold in np.unique(folds):
        inside = folds == fold
        memory = Memory.of(patches_NHWK[~inside], embeddings_ND[~inside], options.patches, options.seed)
        distances = memory.distances(patches_NHWK[inside], embeddings_ND[inside])
        parts[inside], places[inside] = distances.parts, distances.places
    return parts, places


def _check_count(source: Source, count: int) -> None:
    if count < FEWEST:
        raise DataError(
            f"{source.name} has {count:,} readable photos, a calibration needs at least {FEWEST}: add normal photos."
        )


class _Reader:
    """Reads the photos and keeps what is remembered of each, in bounded memory."""

    def __init__(self, engine: Engine, source: Source) -> None:
        self.engine, self.source = engine, source
        self.photos = 0
        self.failed: Failed = []
        self.embeddings: list[Floats] = []
        self.patches: list[Floats] = []  # in full until there are enough to whiten them, then whitened
        self.reconstruction: list[float] = []
        self._indices = evenly(len(source.keys), MOST)
        self._whiten: Whitening | None = None
        self._partner: Pixels | None = None
        self._scored: set[int] = set()
        if "reconstruct" in engine.bundle.graphs:
            self._partner = partner_of(load_file(engine.bundle.path / GOLDEN))
            self._scored = {self._indices[number] for number in evenly(len(self._indices), RECONSTRUCTED)}

    def read(self, report: Callable[[int], None]) -> Whitening:
        """Read all photos; returns the whitening of their patches, chosen from the first of them.

        Raises:
            DataError: for fewer than `FEWEST` readable photos.
        """
        for group in run_photos(self.engine, self.source, ("embedding", STAGE), self._indices):
            self.failed += [(self.source.keys[index], error) for index, error in group.failed]
            if group.indices:
                self._keep(group)
            report(self.photos + len(self.failed))
        _check_count(self.source, self.photos)
        return self._whiten or self._choose_whitening()

    def _keep(self, group: Group) -> None:
        for index in self._scored.intersection(group.indices):
            own = preprocess(self.source.read(index), self.engine.bundle.description.preprocessing)
            if self._partner is not None:
                self.reconstruction.append(float(score_image(self.engine, own, self._partner, MASKS).mean()))
        self.photos += len(group.indices)
        self.embeddings.append(group.outputs["embedding"])
        features = patch_features(group.outputs)
        self.patches.append(self._whiten(features) if self._whiten else features)
        if self._whiten is None and self.photos >= FIRST:
            self._choose_whitening()

    def _choose_whitening(self) -> Whitening:
        """Whiten the patches that were read by now by their own covariance."""
        vectors = np.concatenate([array.reshape(-1, array.shape[-1]) for array in self.patches])
        self._whiten = whitening(vectors, min(DIMENSIONS, vectors.shape[-1]))
        self.patches = [self._whiten(array) for array in self.patches]
        return self._whiten


def evenly(total: int, most: int) -> list[int]:
    """At most `most` of the first `total` numbers, evenly spaced."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int)).tolist() if total else []
