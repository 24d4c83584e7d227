"""Shards in this process: while one runs, the next is decoded; while one is written, the next runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.job import Job
from mixmim_serve.extract.manifest import record
from mixmim_serve.extract.pipeline import map_ahead
from mixmim_serve.extract.plan import Outcome, Shard
from mixmim_serve.extract.progress import Meter
from mixmim_serve.extract.shard import CancelledError, Worker, extract_shard
from mixmim_serve.extract.table import about
from mixmim_serve.sources import Source

AT_ONCE = 2  # shards


class LocalExecutor:
    """One engine in this process: `engine`, or the one that the job names; see `mixmim_serve.extract.job.Executor`."""

    def __init__(self, job: Job, source: Source, engine: Engine | None = None) -> None:
        self.engine = engine or open_engine(job.bundle, job.engine, job.precision)
        job.options.check(self.engine.bundle)
        self.job, self.source = job, source

    def about(self) -> Mapping[str, object]:
        """See `Executor.about`."""
        return about(self.engine)

    def run(
        self, shards: Sequence[Shard], known: Mapping[str, Outcome], folder: Folder, meter: Meter
    ) -> Iterator[Outcome]:
        """See `Executor.run`."""

        def watch(images: int, errors: Sequence[tuple[str, str]]) -> None:
            meter.count(images, errors)
            if meter.cancelled():
                raise CancelledError

        worker = Worker(self.engine, self.source, folder, self.job.options, self.job.effort.threads, watch)
        meter.busy = lambda: worker.runner.busy

        def do(shard: Shard) -> Outcome:
            outcome = extract_shard(worker, shard, known.get(shard.name))
            record(folder, outcome)
            return outcome

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shard") as pool, contextlib.closing(worker):
            yield from map_ahead(pool, do, shards, AT_ONCE)

    def close(self) -> None:
        """See `Executor.close`; the engine may be used on."""
