"""One function does one shard: read, decode, run, write. Whoever calls it only decides which, where and how often."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from mixmim_serve.cores import usable_cores
from mixmim_serve.engines import Engine
from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.extract.pipeline import AHEAD, Ready, Runner, decode_small, map_ahead
from mixmim_serve.extract.plan import Shard, ShardResult
from mixmim_serve.extract.sinks import open_sink
from mixmim_serve.extract.table import Row, Table
from mixmim_serve.sources import Source
from mixmim_serve.sources.names import as_text

UNREACHABLE = 100  # images in a row that cannot even be read: then it is the source, not the images


class CancelledError(Exception):
    """Somebody asked to stop; what is whole stays."""


class Worker:
    """All that doing shards takes: a source, an engine, threads that decode, a folder to write to.

    Two shards may be under way at once: while one runs, the first images of the next are decoded, and while one is
    written, the next runs. `watch` hears of each batch (images, and key and reason of its errors) and may
    raise to stop.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        folder: Folder,
        options: ExtractOptions,
        threads: int = 0,
        watch: Callable[[int, Sequence[tuple[str, str]]], None] = lambda images, errors: None,
    ) -> None:
        self.source, self.folder, self.options, self.watch = source, folder, options, watch
        self.preprocessing = engine.bundle.description.preprocessing
        self.table = Table(engine, options)
        self.sink = open_sink(folder, self.table)
        self.runner = Runner(engine)
        self.decoders = ThreadPoolExecutor(threads or usable_cores(), thread_name_prefix="decode")
        self.turn = threading.Lock()  # the shard that runs; the other one waits with its first images decoded
        self.stopped = threading.Event()
        self.unreachable = 0

    def load(self, index: int) -> Ready[Row]:
        """Read and decode one image.

        Raises:
            DataError: what holds the image is gone or was altered.
        """
        key, row = self.source.keys[index], Row(self.source.keys[index], 0, 0, "")
        try:
            data = self.source.read(index)
        except ImageError as error:
            self.source.check(index)
            return Ready(row, None, error)
        try:
            image = decode_small(data, self.preprocessing, self.options.fast_jpeg)
        except ImageError as error:
            return Ready(Row(key, 0, 0, hashlib.sha256(data).hexdigest()), None, error)
        return Ready(Row(key, image.width, image.height, hashlib.sha256(data).hexdigest()), image.pixels)

    def stop(self) -> None:
        """Let shards that are under way end with `CancelledError` after their batch."""
        self.stopped.set()

    def close(self) -> None:
        """End the threads."""
        self.stop()
        self.decoders.shutdown(cancel_futures=True)
        self.runner.close()


def extract_shard(worker: Worker, shard: Shard, known: ShardResult | None = None) -> ShardResult:
    """Make a shard whole: read, decode, run, write.

    `known`: the shard as it is; then only its errors are tried again, and what they give joins its rows in order.

    Raises:
        DataError: the source is gone, or what `worker.watch` raises.
        OutputError: the files cannot be written.
        CancelledError: `worker.stop` was called.
    """
    failed = {key for key, _ in known.errors} if known else None
    indices = [index for index in shard.indices if failed is None or worker.source.keys[index] in failed]
    errors: list[tuple[str, str]] = []
    spent: list[float] = []
    ready = map_ahead(worker.decoders, worker.load, indices, AHEAD * worker.options.batch)
    with contextlib.closing(ready), contextlib.closing(_rows(worker, ready, errors, spent)) as rows:
        if known and known.rows:
            files = worker.sink.write(shard.name, iter([_merged(worker, shard, known, list(rows))]))
        else:
            files = worker.sink.write(shard.name, rows)
    done = len(shard.indices) - len(errors)
    return ShardResult(shard.name, len(shard.indices), done, tuple(errors), files, sum(spent))


def _rows(
    worker: Worker, ready: Iterable[Ready[Row]], errors: list[tuple[str, str]], spent: list[float]
) -> Generator[pa.Table, None, None]:
    """Rows of images that can be read, a batch at a time; the others go to `errors`, the engine's time to `spent`."""
    with worker.turn:
        before = worker.runner.busy
        batches = worker.runner.batches(ready, worker.table.outputs, worker.options.batch, full=True)
        with contextlib.closing(batches):
            for group, arrays in batches:
                if worker.stopped.is_set():
                    raise CancelledError
                refused = [(each.item.key, as_text(str(each.error))) for each in group if each.error]
                errors += refused
                _count_unreachable(worker, group)
                worker.watch(len(group), refused)
                if arrays:
                    yield worker.table.rows([each.item for each in group if not each.error], arrays)
            spent.append(worker.runner.busy - before)


def _count_unreachable(worker: Worker, group: Iterable[Ready[Row]]) -> None:
    """Stop at many images in a row that cannot even be read: a disk or a network is gone, not they."""
    for each in group:
        worker.unreachable = worker.unreachable + 1 if type(each.error) is ImageError else 0
        if worker.unreachable >= UNREACHABLE:
            raise DataError(
                f"{worker.unreachable} images of {worker.source.name} in a row could not be read, the last because: "
                f"{str(each.error).rstrip('.')}; see whether they are still there, and run again."
            )


def _merged(worker: Worker, shard: Shard, known: ShardResult, new: list[pa.Table]) -> pa.Table:
    """Old and new rows in the order of the source."""
    old = worker.sink.read(known.files).replace_schema_metadata(worker.table.schema.metadata)
    table = pa.concat_tables([old, *new])
    places = {worker.source.keys[index]: index for index in shard.indices}
    order = sorted(range(len(table)), key=[places[key] for key in table["key"].to_pylist()].__getitem__)
    return table.take(order)
