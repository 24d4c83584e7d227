"""Progress of a run: images, images/s, idle time of the engine, and errors, of which too many stop the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixmim_serve.errors import DataError

FEW, FEW_AT_END = 1000, 100  # images below which a share of failures says little, during a run and at its end


@dataclass(frozen=True)
class ExtractProgress:
    """The state of a run."""

    total: int  # images of the source
    done: int  # images, including those of earlier runs
    errors: int  # images that could not be read
    rate: float  # images/s in this run
    waiting: float  # share of this run's time in which the engine was idle
    left: float | None  # seconds to the end; None before the first images

    def __str__(self) -> str:
        left = "" if self.left is None else f"  {_clock(self.left)} left"
        return f"{self.rate:.0f} images/s  {self.waiting:.0%} waiting  {self.errors:,} errors{left}"


class Meter:
    """Counts batches from any thread, reports them to `progress`, and stops a run with too many failures."""

    def __init__(
        self,
        total: int,
        progress: Callable[[ExtractProgress], None],
        cancelled: Callable[[], bool],
        max_failures: float,
    ) -> None:
        self.total, self.progress, self.cancelled, self.max_failures = total, progress, cancelled, max_failures
        self.done = self.errors = self.done_now = 0
        self.last_error = "errors.parquet lists the reasons"
        self.busy: Callable[[], float] = lambda: 0.0  # mean seconds that the engines computed
        self.started = time.perf_counter()
        self._lock = threading.Lock()

    def resume(self, done: int, errors: int) -> None:
        """Start from the images and errors of earlier runs."""
        self.done, self.errors = done, errors

    def count(self, images: int, errors: Sequence[tuple[str, str]]) -> None:
        """Count a batch: its images, and key and reason of those that could not be read.

        Raises:
            DataError: more failures than allowed.
        """
        with self._lock:
            self.done, self.errors = self.done + images, self.errors + len(errors)
            self.done_now += images
            if errors:
                self.last_error = f"the last is {errors[-1][0]}: {errors[-1][1].rstrip('.')}"
            self.check(FEW)
            self.progress(self.state())

    def check(self, least: int) -> None:
        """Stop a run with too many failures, of at least `least` images.

        Raises:
            DataError: more failures than allowed.
        """
        if self.errors > self.max_failures * max(self.done, least):
            raise DataError(
                f"{self.errors:,} of {self.done:,} images could not be read, more than the share of "
                f"{self.max_failures:g} that max_failures allows; {self.last_error}."
            )

    def state(self) -> ExtractProgress:
        """The current progress."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        rate = self.done_now / elapsed
        waiting = min(max(1 - self.busy() / elapsed, 0.0), 1.0)
        left = (self.total - self.done) / rate if rate else None
        return ExtractProgress(self.total, self.done, self.errors, rate, waiting, left)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
