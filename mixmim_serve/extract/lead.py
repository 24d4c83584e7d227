"""Lead one run of extraction: begin or resume it, run its missing shards, and write the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

from mixmim_serve.bundle import open_bundle
from mixmim_serve.errors import MixMIMError
from mixmim_serve.extract.folder import MANIFEST, Folder
from mixmim_serve.extract.job import Executor, ExtractJob, Summary
from mixmim_serve.extract.local import LocalExecutor
from mixmim_serve.extract.lock import locked
from mixmim_serve.extract.manifest import Ledger, Origin, read_manifest
from mixmim_serve.extract.options import ExtractOptions, has_head
from mixmim_serve.extract.plan import images_per_shard, plan
from mixmim_serve.extract.progress import FEW_AT_END, ExtractProgress, Meter
from mixmim_serve.extract.shard import CancelledError
from mixmim_serve.sources import Source, open_source, storage

EXAMPLES = 5  # unreadable images in a summary


def run(
    job: ExtractJob,
    *,
    executor: Callable[[ExtractJob, Source], Executor] | None = None,
    progress: Callable[[ExtractProgress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Summary:
    """Run a job, or resume it. After every batch, `progress` is called, from any thread, and `cancelled` checked.

    Raises:
        MixMIMError: one sentence. Shards written so far stay complete, and the same job resumes after them.
    """
    source = open_source(job.source)
    folder = Folder(job.out)
    with locked(folder):
        folder.clean()
        job = dataclasses.replace(job, options=_decided(job, source, folder))
        instance = (executor or LocalExecutor)(job, source)
        meter = Meter(len(source.keys), progress, cancelled, job.effort.max_failures)
        try:
            return _lead(job, source, folder, instance, meter)
        finally:
            instance.close()
            folder.clean()


def _lead(job: ExtractJob, source: Source, folder: Folder, executor: Executor, meter: Meter) -> Summary:
    ledger = Ledger(folder, _origin(job, source, executor))
    shards = plan(source, job.options.images)
    done = dict(ledger.complete)
    retried = {name: result for name, result in done.items() if result.errors} if job.retry_failed else {}
    missing = [shard for shard in shards if shard.name in retried or (shard.name not in done and not job.retry_failed)]
    retries = sum(len(result.errors) for result in retried.values())
    meter.resume(sum(result.images for result in done.values()) - retries, ledger.errors - retries)
    succeeded = False
    try:
        with contextlib.suppress(CancelledError):
            for result in executor.run(missing, retried, folder, meter):
                ledger.add(result)
            meter.check(FEW_AT_END)
        succeeded = True
    finally:
        _end(ledger, len(shards), succeeded)
    complete = len(ledger.complete) == len(shards)
    errors = (error for _, result in sorted(ledger.complete.items()) for error in result.errors)
    examples = tuple(itertools.islice(errors, EXAMPLES))
    return Summary(ledger.rows, ledger.errors, len(source.keys), complete, meter.state(), examples, source.passed_over)


def _decided(job: ExtractJob, source: Source, folder: Folder) -> ExtractOptions:
    """The job's options with what they leave open: the images per shard, and whether to write classes."""
    content = folder.read_bytes(MANIFEST)
    begun = None if content is None else read_manifest(folder, content).get("options")
    options = dataclasses.replace(job.options, images=job.options.images or images_per_shard(len(source.keys)))
    return options.decided(open_bundle(job.bundle), begun)


def _origin(job: ExtractJob, source: Source, executor: Executor) -> Origin:
    names = _absolute(str(job.bundle)), _absolute(job.source)
    options, head = job.options.to_dict(), has_head(open_bundle(job.bundle))
    return Origin(*names, executor.engine_metadata(), options, len(source.keys), source.digest(), head)


def _end(ledger: Ledger, shards: int, succeeded: bool) -> None:
    """Write the manifest; if that fails after an error, the first error is the one to report."""
    try:
        ledger.scan()  # a shard may have been written, or half replaced, while the run ended
        if ledger.origin.options["format"] == "lance":
            from mixmim_serve.extract.lance import commit

            commit(ledger.folder, ledger.complete)
        ledger.save_errors()
        ledger.save(complete=len(ledger.complete) == shards)
    except MixMIMError:
        if succeeded:
            raise


def _absolute(source: str) -> str:
    """A source as an absolute path or a URL."""
    place = storage.from_spec(source)
    return place if storage.is_url(place) else str(Path(place).absolute())
