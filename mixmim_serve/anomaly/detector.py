"""Engine outputs -> score, percentile, alarm.

The score is the mean of two distances, of the photo's patches and of its embedding, each on a scale where the median
normal photo is at 0 and five in six normal photos are below 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.anomaly.calibration import Calibration, open_calibration
from mixmim_serve.anomaly.patches import Floats, patch_features
from mixmim_serve.anomaly.rates import Share, check_rate, percentiles, threshold
from mixmim_serve.engines import Engine
from mixmim_serve.errors import BundleError

SPREAD = 0.8413  # quantile one standard deviation above the median of a normal distribution


@dataclass(frozen=True)
class Verdict:
    """What the detector says of one photo."""

    score: np.float32
    percentile: np.float32  # share of normal photos with a lower score, in percent
    normal: bool
    threshold: float
    places: Floats  # (H, W), distance of each place from normal ones

    def to_json(self, *, with_map: bool = False) -> dict[str, Any]:
        """As JSON values, floats in their shortest exact form."""
        numbers = {"score": _short(self.score), "percentile": _short(self.percentile), "normal": self.normal}
        shown = {"map": [[_short(value) for value in row] for row in self.places]} if with_map else {}
        return numbers | {"threshold": self.threshold} | shown


class Detector:
    """Scores photos by a calibration; an alarm is a score above the threshold for `rate`, 0 for the calibration's.

    Raises:
        ConfigError: for a rate that cannot be one.
    """

    def __init__(self, calibration: Calibration, rate: float = 0.0) -> None:
        self.calibration = calibration
        self.rate = check_rate(rate or calibration.about.rate)
        self.outputs = ("embedding", calibration.about.stage)
        self._centre, self._spread = scale(calibration.parts)
        self._unsorted = self._combined(calibration.parts)
        self.normal = np.sort(self._unsorted)  # scores of normal photos
        self.threshold = threshold(self.normal, self.rate)

    def verdicts(self, outputs: Mapping[str, NDArray[Any]]) -> list[Verdict]:
        """One per row of the engine's outputs, which are `self.outputs` of the encoder for whole photos."""
        features = self.calibration.whiten(patch_features(outputs, self.calibration.about.stage))
        distances = self.calibration.memory.distances(features, np.asarray(outputs["embedding"], np.float32))
        scores = self._combined(distances.parts)
        shares = percentiles(self.normal, scores)
        return [
            Verdict(score, percentile, bool(score <= self.threshold), self.threshold, places)
            for score, percentile, places in zip(scores, shares, distances.places, strict=True)
        ]

    def reconstruction_percentile(self, score: float, masks: int) -> dict[str, np.float32]:
        """Where a score of POST /score stands among normal photos, in percent; empty with other masks or no decoder."""
        quantiles = self.calibration.reconstruction
        if masks != self.calibration.about.masks or not len(quantiles):
            return {}
        return {"percentile": np.float32(np.interp(score, quantiles, np.linspace(0, 100, len(quantiles))))}

    def summary(self) -> dict[str, Any]:
        """What GET /model says of it."""
        return self.calibration.summary() | {"false_alarm_rate": self.rate, "threshold": self.threshold}

    def held_out_check(self) -> Share:
        """Normal photos beyond a threshold that was chosen without them: each part of them by the other parts."""
        folds, beyond = self.calibration.folds, 0
        for fold in np.unique(folds):
            inside = folds == fold
            others = np.sort(self._unsorted[~inside])
            beyond += int((self._unsorted[inside] > threshold(others, self.rate)).sum())
        return Share(beyond, len(folds))

    def _combined(self, parts: Floats) -> Floats:
        return np.asarray(((parts - self._centre) / self._spread).mean(axis=1), np.float32)


def _short(value: np.float32) -> float:
    return float(str(value))


def scale(parts: Floats) -> tuple[Floats, Floats]:
    """Median and spread (2,) of the distances (N, 2) of normal photos."""
    centre, above = (np.quantile(parts, share, axis=0).astype(np.float32) for share in (0.5, SPREAD))
    return centre, np.maximum(above - centre, 1e-6)


def detector_if_any(engine: Engine) -> Detector | None:
    """The detector of an engine, or None where its bundle has no calibration for it."""
    try:
        return open_detector(engine)
    except BundleError:
        return None


def open_detector(engine: Engine, rate: float = 0.0) -> Detector:
    """The detector of an engine whose bundle is calibrated.

    Raises:
        BundleError: when it is not, or for another engine, or the calibration is damaged.
        ConfigError: for a rate that cannot be one.
    """
    return Detector(open_calibration(engine), rate)
