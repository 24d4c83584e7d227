"""A folder compared with the normal photos of a calibration: alarms, and whether the distribution moved.

With labels also how well the score tells normal photos from others.

Two questions, each with a test of SciPy at a level of `LEVEL`:

alarms    are there more photos beyond the threshold than the false-alarm rate explains? Fisher's exact test of their
          share against that of the held-out normal photos, which know the rate only as well as their number allows.
moved     do the scores come from another distribution? A two-sample Kolmogorov-Smirnov test of the folder's scores
          against the held-out scores of the normal photos. With thousands of photos it sees differences that matter to
          nobody, so its distance, the effect size, must be at least `MOVED` too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from mixmim_serve.anomaly.detector import Detector, Verdict
from mixmim_serve.anomaly.patches import Floats
from mixmim_serve.anomaly.photos import run_photos
from mixmim_serve.anomaly.rates import Share, caution, percent
from mixmim_serve.engines import Engine
from mixmim_serve.errors import ConfigError, DataError, ImageError, quoted
from mixmim_serve.preprocess import Pixels
from mixmim_serve.sources import Source

LEVEL = 0.01
MOVED = 0.1  # largest difference of two cumulative distributions; 0 for equal ones, 1 for separate ones


class Exit(IntEnum):
    """Exit codes of `mixmim drift`."""

    NOTHING = 0
    UNREADABLE = 1  # nothing found, but images could not be read; also any error
    ALARMS = 3  # 2 is a wrong option
    MOVED = 4


@dataclass(frozen=True)
class Worst:
    """One of the photos with the highest scores."""

    key: str
    verdict: Verdict
    pixels: Pixels


@dataclass(frozen=True)
class Scored:
    """The scores of a folder."""

    keys: Sequence[str]
    scores: Floats
    normal: Sequence[bool]
    worst: Sequence[Worst]  # highest score first
    labels: Sequence[str] | None
    failed: Sequence[tuple[str, ImageError]]


@dataclass(frozen=True)
class Ranking:
    """How well the score tells photos of the normal class from all others."""

    normal_class: str
    auroc: float
    photos: tuple[int, int]  # of the normal class, of others
    false_alarms: Floats  # the curve: share of normal photos above each threshold,
    found: Floats  # and share of the others


@dataclass(frozen=True)
class Drift:
    """The comparison."""

    scored: Scored
    rate: float
    threshold: float
    beyond: Share  # photos beyond the threshold
    check: Share  # held-out normal photos beyond it
    alarm_p: float  # that so many or more are beyond it, if the folder is like the normal photos
    distance: float  # of Kolmogorov and Smirnov
    moved_p: float  # that the distance is so large or larger, if the distributions are equal
    superiority: float  # probability that a photo of the folder scores above a normal one; 0.5 for equal distributions
    ranking: Ranking | None

    @property
    def has_alarms(self) -> bool:
        """Whether more photos are beyond the threshold than the false-alarm rate explains."""
        return self.alarm_p < LEVEL

    @property
    def has_moved(self) -> bool:
        """Whether the scores come from another distribution, by a difference that matters."""
        return self.moved_p < LEVEL and self.distance >= MOVED

    @property
    def code(self) -> Exit:
        """The exit code for schedulers."""
        if self.has_alarms:
            return Exit.ALARMS
        if self.has_moved:
            return Exit.MOVED
        return Exit.UNREADABLE if self.scored.failed else Exit.NOTHING

    def sentences(self) -> list[str]:
        """The result in words."""
        alarms = "more than" if self.has_alarms else "no more than"
        moved = "moved" if self.has_moved else "did not move"
        lines = [
            f"beyond the threshold of {self.threshold:.3g}: {self.beyond}; {alarms} a false-alarm rate of "
            f"{percent(self.rate)} explains (p = {self.alarm_p:.2g})",
            f"the distribution of scores {moved}: Kolmogorov-Smirnov distance {self.distance:.2f}, "
            f"p = {self.moved_p:.2g}; a photo scores above a normal one with a probability of {self.superiority:.2f}",
            f"held-out normal photos beyond the threshold: {self.check}",
        ]
        if text := caution(self.check.total, self.rate):
            lines.append(f"note: {text}")
        if self.ranking:
            normal, others = self.ranking.photos
            lines.append(
                f"AUROC {self.ranking.auroc:.3f}: {normal:,} photos of {self.ranking.normal_class} against {others:,} "
                "others"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        values: dict[str, Any] = {
            "photos": len(self.scored.scores),
            "unreadable": len(self.scored.failed),
            "false_alarm_rate": self.rate,
            "threshold": self.threshold,
            "beyond": self.beyond.count,
            "beyond_interval": self.beyond.interval,
            "alarms": self.has_alarms,
            "alarm_p": self.alarm_p,
            "moved": self.has_moved,
            "moved_p": self.moved_p,
            "ks_distance": self.distance,
            "superiority": self.superiority,
            "held_out": {"beyond": self.check.count, "photos": self.check.total, "interval": self.check.interval},
            "worst": [{"path": each.key, "score": float(each.verdict.score)} for each in self.scored.worst],
            "exit_code": int(self.code),
        }
        if self.ranking:
            curve = {"false_alarms": self.ranking.false_alarms.tolist(), "found": self.ranking.found.tolist()}
            values |= {"normal_class": self.ranking.normal_class, "auroc": self.ranking.auroc, "curve": curve}
        return values


def score_source(
    engine: Engine, detector: Detector, source: Source, worst: int, report: Callable[[int], None] = lambda done: None
) -> Scored:
    """Score all photos of a source, and keep the `worst` with their pixels.

    Raises:
        DataError: when none can be read.
    """
    indices: list[int] = []
    verdicts: list[tuple[np.float32, bool]] = []
    failed: list[tuple[str, ImageError]] = []
    heap: list[tuple[float, int, Worst]] = []
    for group in run_photos(engine, source, detector.outputs):
        failed += [(source.keys[index], error) for index, error in group.failed]
        found = detector.verdicts(group.outputs) if group.indices else []
        for index, pixels, verdict in zip(group.indices, group.pixels, found, strict=True):
            indices.append(index)
            verdicts.append((verdict.score, verdict.normal))
            heapq.heappush(heap, (float(verdict.score), -index, Worst(source.keys[index], verdict, pixels)))
            if len(heap) > worst:
                heapq.heappop(heap)
        report(len(indices) + len(failed))
    if not indices:
        raise DataError(f"{source.name} has no readable photo.")
    labels = None if source.labels is None else [source.labels[index] for index in indices]
    return Scored(
        [source.keys[index] for index in indices],
        np.array([score for score, _ in verdicts], np.float32),
        [normal for _, normal in verdicts],
        [each for *_, each in sorted(heap, key=lambda entry: entry[:2], reverse=True)],
        labels,
        failed,
    )


def compare(detector: Detector, scored: Scored, normal_class: str = "") -> Drift:
    """Compare a folder's scores with those of the normal photos.

    Raises:
        ConfigError: when no photo, or every photo, is of `normal_class`.
    """
    from scipy import stats

    scores, normal = scored.scores, detector.normal
    check, beyond = detector.held_out_check(), Share(int(np.sum(~np.asarray(scored.normal))), len(scores))
    counts = [[each.count, each.total - each.count] for each in (beyond, check)]
    alarm = stats.fisher_exact(counts, alternative="greater")
    moved = stats.ks_2samp(scores, normal)
    wins = stats.mannwhitneyu(scores, normal).statistic / (len(scores) * len(normal))
    return Drift(
        scored,
        detector.rate,
        detector.threshold,
        beyond,
        check,
        float(alarm.pvalue),
        float(moved.statistic),
        float(moved.pvalue),
        float(wins),
        _ranking(scored, normal_class) if normal_class else None,
    )


def _ranking(scored: Scored, normal_class: str) -> Ranking:
    from sklearn.metrics import roc_auc_score, roc_curve

    is_other = np.array([label != normal_class for label in scored.labels or ()])
    if not len(is_other) or is_other.all() or not is_other.any():
        known = ", ".join(sorted(set(scored.labels or ()))) or "no class folders"
        raise ConfigError(
            f"{quoted(normal_class)} cannot be the normal class: the photos need this class and others; found {known}."
        )
    false_alarms, found, _ = roc_curve(is_other, scored.scores)
    return Ranking(
        normal_class,
        float(roc_auc_score(is_other, scored.scores)),
        (int((~is_other).sum()), int(is_other.sum())),
        false_alarms.astype(np.float32),
        found.astype(np.float32),
    )
