"""Run shards on a Ray cluster, or on this machine through Ray: a pool of actors, each with an engine of its own.

Ray places actors where their CPUs and share of a GPU are free, asks its autoscaler for nodes if none are, restarts
actors that die and retries their shards; a half-finished shard is done again. Actors join as they start. Bundle, source
and OUT must mean the same on every node.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixmim_serve.engines import open_engine
from mixmim_serve.errors import EngineError, MixMIMError
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.extract.manifest import record
from mixmim_serve.extract.plan import Shard, ShardResult
from mixmim_serve.extract.progress import Meter
from mixmim_serve.extract.shard import CancelledError, Worker, extract_shard
from mixmim_serve.sources import Source

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # report nothing
try:
    import ray
except ImportError as error:
    raise EngineError("Ray is not installed: run pip install 'mixmim-serve[ray]'.") from error

AT_ONCE = 2  # shards per actor, as in `local.py`
RETRIES = 3  # of a shard whose actor dies
POLL = 1.0  # seconds between two checks for cancellation


class Actor:
    """One engine in a process of its own, opened by the first call so that Ray passes on its errors unchanged."""

    def __init__(self, job: ExtractJob, source: Sequence[Any]) -> None:
        self.job, self.source, self.folder = job, source, Folder(job.out)
        self._worker: Worker | None = None
        self._opening = threading.Lock()

    def engine_metadata(self) -> dict[str, Any]:
        """See `Executor.engine_metadata`."""
        return self._open().table.engine

    def do(self, shard: Shard, previous: ShardResult | None) -> ShardResult:
        """Do a shard and record it."""
        result = extract_shard(self._open(), shard, previous)
        record(self.folder, result)
        return result

    def _open(self) -> Worker:
        job = self.job
        with self._opening:
            if self._worker is None:
                threads = max(1, round(job.effort.cpus))
                engine = open_engine(job.bundle, job.engine, job.precision, threads)
                source = ray.get(self.source[0])
                self._worker = Worker(engine, source, self.folder, job.options, job.effort.threads or threads)
            return self._worker


class RayExecutor:
    """One actor per engine; see `mixmim_serve.extract.job.Executor`."""

    def __init__(self, job: ExtractJob, source: Source) -> None:
        resources = job.effort
        self.owns_ray = not ray.is_initialized()
        if self.owns_ray:
            ray.init(
                address=resources.address or None,
                log_to_driver=False,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        remote = ray.remote(Actor).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
            max_concurrency=AT_ONCE,
        )
        self.shared = ray.put(source)  # once per node, not per actor; kept for restarted actors
        self.actors: list[Any] = [remote.remote(job, [self.shared]) for _ in range(resources.actors)]
        self.engine: Mapping[str, object] = self._get(self.actors[0].engine_metadata.remote())

    def engine_metadata(self) -> Mapping[str, object]:
        """See `Executor.engine_metadata`."""
        return self.engine

    def run(
        self, shards: Sequence[Shard], retried: Mapping[str, ShardResult], folder: Folder, meter: Meter
    ) -> Iterator[ShardResult]:
        """See `Executor.run`."""
        waiting = deque(shards)
        running: dict[Any, Any] = {actor.engine_metadata.remote(): actor for actor in self.actors}
        busy, joined = 0.0, 0
        left = len(shards)
        while left:
            done, _ = ray.wait(list(running), timeout=POLL)
            if meter.cancelled():
                raise CancelledError
            for reference in done:
                actor, value = running.pop(reference), self._get(reference)
                if isinstance(value, ShardResult):
                    left, busy = left - 1, busy + value.busy
                    previous = retried.get(value.shard)
                    meter.busy = lambda busy=busy, joined=joined: busy / joined  # type: ignore[misc]
                    meter.count(len(previous.errors) if previous else value.images, value.errors)
                    yield value
                else:  # an actor has joined
                    joined += 1
                    self._check_same(value)
                for _ in range(1 if isinstance(value, ShardResult) else AT_ONCE):
                    if waiting:
                        shard = waiting.popleft()
                        running[actor.do.remote(shard, retried.get(shard.name))] = actor

    def close(self) -> None:
        """See `Executor.close`."""
        for actor in self.actors:
            ray.kill(actor)
        if self.owns_ray:
            ray.shutdown()

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, MixMIMError) else error) from None
        except ray.exceptions.RayActorError as error:
            raise EngineError(
                f"a Ray worker died repeatedly ({str(error).splitlines()[0]}): check whether its node runs out of "
                "memory."
            ) from error

    def _check_same(self, other: Mapping[str, object]) -> None:
        """All actors must produce the same numbers."""
        if other["fingerprint"] != self.engine["fingerprint"]:
            raise EngineError(
                f"the nodes have different engines ({self.engine['engine']} {self.engine['precision']} and "
                f"{other['engine']} {other['precision']}): choose one with --engine, or use equal nodes."
            )
