"""Run shards in this process: while one runs, the next is decoded; while one is written, the next runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.extract.manifest import record
from mixmim_serve.extract.pipeline import map_ahead
from mixmim_serve.extract.plan import Shard, ShardResult
from mixmim_serve.extract.progress import Meter
from mixmim_serve.extract.shard import CancelledError, Worker, extract_shard
from mixmim_serve.extract.table import engine_metadata
from mixmim_serve.sources import Source

AT_ONCE = 2  # shards


class LocalExecutor:
    """One engine in this process: `engine`, or the one that the job names; see `mixmim_serve.extract.job.Executor`."""

    def __init__(self, job: ExtractJob, source: Source, engine: Engine | None = None) -> None:
        self.engine = engine or open_engine(job.bundle, job.engine, job.precision)
        job.options.check(self.engine.bundle)
        self.job, self.source = job, source

    def engine_metadata(self) -> Mapping[str, object]:
        """See `Executor.engine_metadata`."""
        return engine_metadata(self.engine, self.job.options)

    def run(
        self, shards: Sequence[Shard], retried: Mapping[str, ShardResult], folder: Folder, meter: Meter
    ) -> Iterator[ShardResult]:
        """See `Executor.run`."""

        def on_batch(images: int, errors: Sequence[tuple[str, str]]) -> None:
            meter.count(images, errors)
            if meter.cancelled():
                raise CancelledError

        worker = Worker(self.engine, self.source, folder, self.job.options, self.job.effort.threads, on_batch)
        meter.busy = lambda: worker.runner.busy

        def do(shard: Shard) -> ShardResult:
            result = extract_shard(worker, shard, retried.get(shard.name))
            record(folder, result)
            return result

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shard") as pool, contextlib.closing(worker):
            yield from map_ahead(pool, do, shards, AT_ONCE)

    def close(self) -> None:
        """See `Executor.close`; the engine itself stays usable."""
