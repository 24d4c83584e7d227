"""Shards on a Ray cluster, or on this machine through Ray: a pool of actors, each with an engine of its own.

Ray places actors where their CPUs and share of a GPU are free, asks its autoscaler for nodes where there are none,
restarts those that die and gives them their shards again; a shard that was half done is simply done anew. Actors join
as they start. Bundle, source and OUT have to mean the same on every node.
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
from mixmim_serve.extract.job import Job
from mixmim_serve.extract.manifest import record
from mixmim_serve.extract.plan import Outcome, Shard
from mixmim_serve.extract.progress import Meter
from mixmim_serve.extract.shard import CancelledError, Worker, extract_shard
from mixmim_serve.extract.table import about
from mixmim_serve.sources import Source

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
try:
    import ray
except ImportError as error:
    raise EngineError("Ray is not installed: run pip install 'mixmim-serve[ray]'.") from error

AT_ONCE = 2  # shards an actor, as in `local.py`
RETRIES = 3  # of a shard whose actor died
LISTEN = 1.0  # seconds between two looks at whether to stop


class Actor:
    """One engine, in a process of its own; opened by the first call, whose errors Ray hands on as they are."""

    def __init__(self, job: Job, source: Sequence[Any]) -> None:
        self.job, self.source, self.folder = job, source, Folder(job.out)
        self._worker: Worker | None = None
        self._opening = threading.Lock()

    def about(self) -> dict[str, Any]:
        """See `Executor.about`."""
        return about(self._open().runner.engine)

    def do(self, shard: Shard, known: Outcome | None) -> Outcome:
        """A shard, recorded."""
        outcome = extract_shard(self._open(), shard, known)
        record(self.folder, outcome)
        return outcome

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

    def __init__(self, job: Job, source: Source) -> None:
        effort = job.effort
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(
                address=effort.address or None,
                log_to_driver=False,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        kind = ray.remote(Actor).options(
            num_cpus=effort.cpus,
            num_gpus=effort.gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
            max_concurrency=AT_ONCE,
        )
        self.shared = ray.put(source)  # once a node, not once an actor; kept for actors that are restarted
        self.actors: list[Any] = [kind.remote(job, [self.shared]) for _ in range(effort.actors)]
        self.first = self._ask(self.actors[0].about.remote())

    def about(self) -> Mapping[str, object]:
        """See `Executor.about`."""
        found: Mapping[str, object] = self.first
        return found

    def run(
        self, shards: Sequence[Shard], known: Mapping[str, Outcome], folder: Folder, meter: Meter
    ) -> Iterator[Outcome]:
        """See `Executor.run`."""
        waiting = deque(shards)
        running: dict[Any, Any] = {actor.about.remote(): actor for actor in self.actors}
        busy, joined = 0.0, 0
        left = len(shards)
        while left:
            done, _ = ray.wait(list(running), timeout=LISTEN)
            if meter.cancelled():
                raise CancelledError
            for reference in done:
                actor, answer = running.pop(reference), self._ask(reference)
                if isinstance(answer, Outcome):
                    left, busy = left - 1, busy + answer.busy
                    before = known.get(answer.shard)
                    meter.busy = lambda busy=busy, joined=joined: busy / joined  # type: ignore[misc]
                    meter.count(len(before.errors) if before else answer.images, answer.errors)
                    yield answer
                else:
                    joined += 1
                    self._refuse_other(answer)
                for _ in range(1 if isinstance(answer, Outcome) else AT_ONCE):
                    if waiting:
                        shard = waiting.popleft()
                        running[actor.do.remote(shard, known.get(shard.name))] = actor

    def close(self) -> None:
        """See `Executor.close`."""
        for actor in self.actors:
            ray.kill(actor)
        if self.started:
            ray.shutdown()

    def _ask(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, MixMIMError) else error) from None
        except ray.exceptions.RayActorError as error:
            raise EngineError(
                f"a Ray worker died again and again ({str(error).splitlines()[0]}): look for a lack of memory on its "
                "node."
            ) from error

    def _refuse_other(self, answer: Mapping[str, object]) -> None:
        """All actors must compute alike."""
        if answer["fingerprint"] != self.first["fingerprint"]:
            raise EngineError(
                f"the nodes compute with different engines ({self.first['engine']} {self.first['precision']} and "
                f"{answer['engine']} {answer['precision']}): choose one with --engine, or give actors equal nodes."
            )
