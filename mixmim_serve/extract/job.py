"""One run of extraction, from a bundle and a source to a folder: begin or resume, do what is missing, end."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import MixMIMError
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.lock import locked
from mixmim_serve.extract.manifest import Ledger, Origin
from mixmim_serve.extract.options import Effort, Options
from mixmim_serve.extract.plan import Shard, images_a_shard, plan
from mixmim_serve.extract.progress import FEW_AT_LAST, Meter, Progress
from mixmim_serve.extract.shard import CancelledError, Outcome
from mixmim_serve.sources import Source, open_source

EXAMPLES = 5  # of images that could not be read, for a person to see at once


@dataclass(frozen=True)
class Job:
    """What to do; plain values, so that it can be sent and stored."""

    bundle: Path
    source: str
    out: str
    engine: str = "auto"
    precision: str = ""
    options: Options = field(default_factory=Options)
    effort: Effort = field(default_factory=Effort)
    retry_failed: bool = False  # only the images that could not be read before


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    rows: int
    errors: int
    images: int  # of the source
    complete: bool  # False when it was cancelled
    progress: Progress
    examples: tuple[tuple[str, str], ...]  # key and reason of some that could not be read


class Executor(Protocol):
    """Who calls `extract_shard`, and where."""

    def about(self) -> Mapping[str, object]:
        """What the engine says of itself, as `table.about`; and refuses options that it cannot do."""

    def run(
        self, shards: Sequence[Shard], known: Mapping[str, Outcome], folder: Folder, meter: Meter
    ) -> Iterator[Outcome]:
        """Do the shards, of those in `known` only the errors; each outcome is recorded before it is given."""

    def close(self) -> None:
        """Let go of engines."""


def run(
    job: Job,
    *,
    executor: Callable[[Job, Source], Executor] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Summary:
    """Do a job, or what is left of it. `progress` hears of every batch, from any thread; `cancelled` is asked then.

    Raises:
        MixMIMError: one sentence; what was written before stays whole, and the same job goes on from there.
    """
    source = open_source(job.source)
    options = dataclasses.replace(job.options, images=job.options.images or images_a_shard(len(source.keys)))
    job = dataclasses.replace(job, options=options)
    folder = Folder(job.out)
    with locked(folder):
        folder.clean()
        leader = (executor or local)(job, source)
        meter = Meter(len(source.keys), progress, cancelled, job.effort.max_failures)
        try:
            return _lead(job, source, folder, leader, meter)
        finally:
            leader.close()
            folder.clean()


def local(job: Job, source: Source, engine: Engine | None = None) -> Executor:
    """The executor in this process, with an engine that is open already, or one of its own."""
    from mixmim_serve.extract.local import Local

    return Local(job, source, engine or open_engine(job.bundle, job.engine, job.precision))


def _lead(job: Job, source: Source, folder: Folder, executor: Executor, meter: Meter) -> Summary:
    ledger = Ledger(folder, _origin(job, source, executor))
    shards = plan(source, job.options.images)
    whole = dict(ledger.whole)
    retried = {name: each for name, each in whole.items() if each.errors} if job.retry_failed else {}
    missing = [shard for shard in shards if shard.name in retried or (shard.name not in whole and not job.retry_failed)]
    again = sum(len(each.errors) for each in retried.values())
    meter.resume(sum(each.images for each in whole.values()) - again, ledger.errors - again)
    ended_well = False
    try:
        with contextlib.suppress(CancelledError):
            for outcome in executor.run(missing, retried, folder, meter):
                ledger.note(outcome)
            meter.check(FEW_AT_LAST)
        ended_well = True
    finally:
        _end(ledger, len(shards), ended_well)
    complete = len(ledger.whole) == len(shards)
    errors = (error for _, outcome in sorted(ledger.whole.items()) for error in outcome.errors)
    examples = tuple(itertools.islice(errors, EXAMPLES))
    return Summary(ledger.rows, ledger.errors, len(source.keys), complete, meter.state(), examples)


def _origin(job: Job, source: Source, executor: Executor) -> Origin:
    names = _absolute(str(job.bundle)), _absolute(job.source)
    return Origin(*names, executor.about(), job.options.to_dict(), len(source.keys), source.digest())


def _end(ledger: Ledger, shards: int, ended_well: bool) -> None:
    """Write down how far the run came; where that fails, the error that ended the run is the one to hear of."""
    try:
        ledger.take_stock()  # a shard may have been written, or half replaced, while the run was ended
        if ledger.origin.options["format"] == "lance":
            from mixmim_serve.extract.lance import commit

            commit(ledger.folder, ledger.whole)
        ledger.save_errors()
        ledger.save(complete=len(ledger.whole) == shards)
    except MixMIMError:
        if ended_well:
            raise


def _absolute(source: str) -> str:
    """A local path that means the same from any folder."""
    from mixmim_serve.sources import storage

    place = storage.from_spec(source)
    return place if storage.is_url(place) else str(Path(place).absolute())
