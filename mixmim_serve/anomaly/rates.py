"""Thresholds and rates from the scores of normal photos."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mixmim_serve.anomaly.patches import Floats
from mixmim_serve.errors import ConfigError

DEFAULT_RATE = 0.01
MAX_RATE = 0.5
Z95 = 1.959964  # of the normal distribution, for an interval of 95 %
EXPECTED = 5  # false alarms among the normal photos from which on a rate is known roughly


@dataclass(frozen=True)
class Share:
    """A count as a share, with an interval that holds the true share in 95 % of cases."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval ("Probable inference", 1927); it is right at 0 too."""
        square = Z95**2
        middle = (self.count + square / 2) / (self.total + square)
        half = Z95 / (self.total + square) * math.sqrt(self.count * (1 - self.value) + square / 4)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.count:,} of {self.total:,}: {percent(self.value)} (95 % interval {percent(low)} to {percent(high)})"
        )


def percent(share: float) -> str:
    """A share in percent, with one decimal below 10 %."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def check_rate(rate: float) -> float:
    """The rate of false alarms, if it can be one.

    Raises:
        ConfigError: when it is not above 0 and at most `MAX_RATE`.
    """
    if not 0 < rate <= MAX_RATE:
        raise ConfigError(f"a false-alarm rate must be above 0 and at most {MAX_RATE}, got {rate}: 0.01 is one in 100.")
    return rate


def threshold(normal: Floats, rate: float) -> float:
    """The score above which the share `rate` of normal photos is expected; `normal` are sorted scores of such photos.

    The k-th smallest of n with k = (n + 1) (1 - rate), rounded up, which a new photo from the same distribution exceeds
    with a probability of at most `rate` (split conformal prediction: Vovk et al., 2005). With fewer than 1 / rate - 1
    photos there is none: then it is the largest, which a new one exceeds with a probability of 1 / (n + 1).
    """
    rank = math.ceil((len(normal) + 1) * (1 - rate) - 1e-9)
    return float(normal[min(rank, len(normal)) - 1])


def percentiles(normal: Floats, scores: Floats) -> Floats:
    """The share of normal photos with a lower score, in percent, for each of `scores`."""
    return (100 * np.searchsorted(normal, scores, side="left") / len(normal)).astype(np.float32)


def needed(rate: float) -> int:
    """Normal photos from which on a rate is known roughly."""
    return math.ceil(EXPECTED / rate - 1e-9)


def caution(photos: int, rate: float) -> str:
    """What so many photos cannot say of a rate; empty if they can."""
    if photos >= needed(rate):
        return ""
    most = Share(0, photos).interval[1]
    return (
        f"{photos:,} photos say little of a rate of {percent(rate)}, at which {photos * rate:.2g} of them are expected "
        f"beyond the threshold: even with none beyond it the true rate may be {percent(most)}; use {needed(rate):,} or "
        "more"
    )
