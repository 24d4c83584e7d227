"""How a run gets on: images, images a second, how long the engine waited, errors and when they are too many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixmim_serve.errors import DataError

FEW_NOW, FEW_AT_LAST = 1000, 100  # images by which failures are judged at least: a share of fewer says little


@dataclass(frozen=True)
class ExtractProgress:
    """Where a run stands."""

    total: int  # images of the source
    done: int  # of them, in earlier runs too
    errors: int  # of those
    rate: float  # images/s of this run
    waiting: float  # share of this run's time in which the engine had nothing to do
    left: float | None  # seconds; None before the first images

    def __str__(self) -> str:
        left = "" if self.left is None else f"  {_clock(self.left)} left"
        return f"{self.rate:.0f} images/s  {self.waiting:.0%} waiting  {self.errors:,} errors{left}"


class Meter:
    """Counts batches from any thread, tells `progress` of them, and stops the run for `cancelled` or many failures."""

    def __init__(
        self,
        total: int,
        progress: Callable[[ExtractProgress], None],
        cancelled: Callable[[], bool],
        max_failures: float,
    ) -> None:
        self.total, self.progress, self.cancelled, self.max_failures = total, progress, cancelled, max_failures
        self.done = self.errors = self.now = 0
        self.last = "errors.parquet has the reasons"
        self.busy: Callable[[], float] = lambda: 0.0  # seconds that engines ran, divided by their number
        self.began = time.perf_counter()
        self._lock = threading.Lock()

    def resume(self, done: int, errors: int) -> None:
        """Images of earlier runs."""
        self.done, self.errors = done, errors

    def count(self, images: int, errors: Sequence[tuple[str, str]]) -> None:
        """Images that were tried now, and key and reason of those that could not be read.

        Raises:
            DataError: more failures than allowed.
        """
        with self._lock:
            self.done, self.errors, self.now = self.done + images, self.errors + len(errors), self.now + images
            if errors:
                self.last = f"the last is {errors[-1][0]}: {errors[-1][1].rstrip('.')}"
            self.check(FEW_NOW)
            self.progress(self.state())

    def check(self, least: int) -> None:
        """Refuse to go on with too many failures.

        Raises:
            DataError: more failures than allowed.
        """
        if self.errors > self.max_failures * max(self.done, least):
            raise DataError(
                f"{self.errors:,} of {self.done:,} images could not be read, more than the share of "
                f"{self.max_failures:g} that max_failures allows; {self.last}."
            )

    def state(self) -> ExtractProgress:
        """Now."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        rate = self.now / elapsed
        waiting = min(max(1 - self.busy() / elapsed, 0.0), 1.0)
        left = (self.total - self.done) / rate if rate else None
        return ExtractProgress(self.total, self.done, self.errors, rate, waiting, left)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
