"""Lead one run of extraction: begin or resume it, have its missing shards done, and write down how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

from mixmim_serve.errors import MixMIMError
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.job import Executor, Job, Summary
from mixmim_serve.extract.local import LocalExecutor
from mixmim_serve.extract.lock import locked
from mixmim_serve.extract.manifest import Ledger, Origin
from mixmim_serve.extract.plan import images_a_shard, plan
from mixmim_serve.extract.progress import FEW_AT_LAST, Meter, Progress
from mixmim_serve.extract.shard import CancelledError
from mixmim_serve.sources import Source, open_source, storage

EXAMPLES = 5  # of images that could not be read, for a person to see at once


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
        leader = (executor or LocalExecutor)(job, source)
        meter = Meter(len(source.keys), progress, cancelled, job.effort.max_failures)
        try:
            return _lead(job, source, folder, leader, meter)
        finally:
            leader.close()
            folder.clean()


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
    place = storage.from_spec(source)
    return place if storage.is_url(place) else str(Path(place).absolute())
