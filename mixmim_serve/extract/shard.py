"""Do one shard: read, decode, run, write. Executors only decide which shard runs where."""

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
from mixmim_serve.extract.pipeline import AHEAD, Loaded, Runner, decode_small, map_ahead
from mixmim_serve.extract.plan import Shard, ShardResult
from mixmim_serve.extract.sinks import open_sink
from mixmim_serve.extract.table import Row, Table
from mixmim_serve.sources import Source
from mixmim_serve.sources.names import as_text

UNREACHABLE = 100  # consecutive images that cannot even be read: then the source is at fault, not the images


class CancelledError(Exception):
    """The run was cancelled; complete shards stay."""


class Worker:
    """What shards need: a source, an engine, decoding threads, a folder to write to.

    Two shards may be in progress at once: while one runs, the first images of the next are decoded, and while one is
    written, the next runs. `on_batch` is called with the number of images of each batch and the key and reason of its
    errors; it may raise to stop.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        folder: Folder,
        options: ExtractOptions,
        threads: int = 0,
        on_batch: Callable[[int, Sequence[tuple[str, str]]], None] = lambda images, errors: None,
    ) -> None:
        self.source, self.folder, self.options, self.on_batch = source, folder, options, on_batch
        self.preprocessing = engine.bundle.description.preprocessing
        self.table = Table(engine, options)
        self.sink = open_sink(folder, self.table)
        self.runner = Runner(engine)
        self.decoders = ThreadPoolExecutor(threads or usable_cores(), thread_name_prefix="decode")
        self.turn = threading.Lock()  # held by the running shard; the other one waits with its first images decoded
        self.stopped = threading.Event()
        self.unreachable = 0

    def load(self, index: int) -> Loaded[Row]:
        """Read and decode one image.

        Raises:
            DataError: the folder or shard of the image is gone or was altered.
        """
        key, row = self.source.keys[index], Row(self.source.keys[index], 0, 0, "")
        try:
            data = self.source.read(index)
        except ImageError as error:
            self.source.check(index)
            return Loaded(row, None, error)
        try:
            image = decode_small(data, self.preprocessing, self.options.fast_jpeg)
        except ImageError as error:
            return Loaded(Row(key, 0, 0, hashlib.sha256(data).hexdigest()), None, error)
        return Loaded(Row(key, image.width, image.height, hashlib.sha256(data).hexdigest()), image.pixels)

    def stop(self) -> None:
        """Make running shards raise `CancelledError` after their current batch."""
        self.stopped.set()

    def close(self) -> None:
        """Stop, and end the threads."""
        self.stop()
        self.decoders.shutdown(cancel_futures=True)
        self.runner.close()


def extract_shard(worker: Worker, shard: Shard, previous: ShardResult | None = None) -> ShardResult:
    """Do a shard: read, decode, run, write. With `previous` only its failed images are retried and merged in order.

    Raises:
        DataError: the source is gone, or `worker.on_batch` raised it.
        OutputError: the files cannot be written.
        CancelledError: `worker.stop` was called.
    """
    failed = {key for key, _ in previous.errors} if previous else None
    indices = [index for index in shard.indices if failed is None or worker.source.keys[index] in failed]
    errors: list[tuple[str, str]] = []
    busy: list[float] = []
    loaded = map_ahead(worker.decoders, worker.load, indices, AHEAD * worker.options.batch)
    with contextlib.closing(loaded), contextlib.closing(_rows(worker, loaded, errors, busy)) as rows:
        if previous and previous.rows:
            files = worker.sink.write(shard.name, iter([_merged(worker, shard, previous, list(rows))]))
        else:
            files = worker.sink.write(shard.name, rows)
    written = len(shard.indices) - len(errors)
    return ShardResult(shard.name, len(shard.indices), written, tuple(errors), files, sum(busy))


def _rows(
    worker: Worker, loaded: Iterable[Loaded[Row]], errors: list[tuple[str, str]], busy: list[float]
) -> Generator[pa.Table, None, None]:
    """Rows of the readable images, batch by batch; adds the others to `errors` and the engine's seconds to `busy`."""
    with worker.turn:
        before = worker.runner.busy
        batches = worker.runner.batches(loaded, worker.table.outputs, worker.options.batch, full=True)
        with contextlib.closing(batches):
            for group, arrays in batches:
                if worker.stopped.is_set():
                    raise CancelledError
                failed = [(entry.item.key, as_text(str(entry.error))) for entry in group if entry.error]
                errors += failed
                _count_unreachable(worker, group)
                worker.on_batch(len(group), failed)
                if arrays:
                    yield worker.table.rows([entry.item for entry in group if not entry.error], arrays)
            busy.append(worker.runner.busy - before)


def _count_unreachable(worker: Worker, group: Iterable[Loaded[Row]]) -> None:
    """Stop after many consecutive images that cannot even be read: then a disk or network has failed."""
    for entry in group:
        worker.unreachable = worker.unreachable + 1 if type(entry.error) is ImageError else 0
        if worker.unreachable >= UNREACHABLE:
            raise DataError(
                f"{worker.unreachable} consecutive images of {worker.source.name} could not be read, the last because: "
                f"{str(entry.error).rstrip('.')}; check that they still exist, and run again."
            )


def _merged(worker: Worker, shard: Shard, previous: ShardResult, new: list[pa.Table]) -> pa.Table:
    """The previous and the new rows, in the order of the source."""
    old = worker.sink.read(previous.files).replace_schema_metadata(worker.table.schema.metadata)
    table = pa.concat_tables([old, *new])
    positions = {worker.source.keys[index]: index for index in shard.indices}
    order = sorted(range(len(table)), key=[positions[key] for key in table["key"].to_pylist()].__getitem__)
    return table.take(order)
