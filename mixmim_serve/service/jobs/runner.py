"""Jobs of one server: the list, and a thread that has one at a time done in a process of its own.

A process, because it can be given the least priority whatever library computes in it, and because one that fails on an
image or is killed for its memory leaves the server alone. It ends when its standard input does: when a job is
cancelled, and however the server itself ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixmim_serve.bundle import Bundle
from mixmim_serve.config import unknown
from mixmim_serve.errors import ConfigError, DataError, InUseError, OutputError
from mixmim_serve.extract.folder import ERRORS, MANIFEST
from mixmim_serve.extract.options import ExtractOptions, Resources
from mixmim_serve.locks import lock_folder
from mixmim_serve.service.jobs.roots import Roots
from mixmim_serve.service.jobs.store import ENDED, SERVER_FAILED, Record, Store
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.settings import Settings

WORKER = "mixmim_serve.service.jobs.worker"
FORMATS = ("parquet", "npy")  # Lance's files are read by its library only, and from a folder
MAX_BATCH = 256  # images a call of the engine
MAX_IMAGES = 1_000_000  # a shard
# Types of what may be asked for, besides a list of features.
SIMPLE = {each.name: type(each.default) for each in dataclasses.fields(ExtractOptions) if each.name != "features"}
SIMPLE["max_failures"] = float
DIED = (
    "the process that did it ended with {code}: what it wrote is whole, resume the job (the log may have the reason)."
)
# Ctrl-C is for the server, which then ends the process. Not a session of its own: Linux would share the processor
# between sessions first (autogroup), whatever the priorities in each.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
RETRY_SECONDS = 5.0  # until the list is tried again that could not be written
END_SECONDS = 40.0  # for a process to end by itself; it has 30 to finish a batch and write its list

log = logging.getLogger(__name__)


class Jobs:
    """See the module. Close it.

    Raises:
        ConfigError: a root that is no folder, a folder that another server uses or that cannot be written to, or
            packages that are missing.
    """

    def __init__(self, settings: Settings, bundle: Bundle, engine: str) -> None:
        if not (importlib.util.find_spec("pyarrow") and importlib.util.find_spec("filelock")):
            raise ConfigError("jobs need packages that are not installed: run pip install 'mixmim-serve[extract]'.")
        self.settings, self.bundle, self.engine = settings, bundle, engine
        self.roots = Roots(settings.jobs_roots)
        self.folder = jobs_folder(settings)
        try:
            self._lock = lock_folder(self.folder)
        except InUseError as error:
            message = f"another server does the jobs in {self.folder}: choose another with --set jobs_dir=."
            raise ConfigError(message) from error
        except OutputError as error:
            raise ConfigError(str(error)) from error
        self.store = Store(self.folder / "jobs.sqlite")
        self.store.take_up()
        self._progress: tuple[str, dict[str, Any]] = "", {}  # of the job that runs; kept when it ends
        self._running: tuple[str, subprocess.Popen[str]] | None = None
        self._changing = threading.Lock()  # of what runs
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    def start(self, metrics: Metrics) -> None:
        """Begin with what is queued."""
        metrics.watch_jobs(self.store.counts)
        self._thread.start()

    def submit(self, source: object, options: object) -> tuple[Record, bool] | None:
        """Queue a job and True; the one that already does the same and False; None when too many wait.

        Raises:
            ConfigError: an option that cannot be.
            DataError: no such source.
        """
        if not isinstance(source, str):
            raise DataError("name a source: a folder, file or pattern below the roots of this server.")
        self.roots.find(source)
        found = self.store.add(source, parse_options(options, self.bundle), self.settings.jobs_waiting)
        self._wake.set()
        return found

    def cancel(self, id_: str) -> Record | None:
        """Stop a job after its batch; what is whole stays. None: no such job."""
        record = self.store.cancel(id_)
        with self._changing:
            if record and record.state == "cancelling" and self._running and self._running[0] == id_:
                _let_end(self._running[1])
        return record

    def resume(self, record: Record, *, retry_failed: bool) -> Record | None:
        """Queue a job again that has ended: it goes on where it was. None: it has not ended.

        Raises:
            DataError: its source is gone.
        """
        self.roots.find(record.source)
        with self._changing:
            found = self.store.resume(record.id, retry_failed)
        self._wake.set()
        return found

    def remove(self, id_: str) -> bool:
        """Delete a job that has ended, with its results; False if it has not."""
        with self._changing:  # nobody resumes it meanwhile
            record = self.store.get(id_)
            if record is None or record.state not in ENDED:
                return False
            if self.out(id_).is_dir():
                shutil.rmtree(self.out(id_))
            self.store.remove(id_)
        return True

    def out(self, id_: str) -> Path:
        """The folder of a job's results."""
        return self.folder / id_

    def progress(self, record: Record) -> dict[str, Any]:
        """How far a job is, by the names of `extract.progress.ExtractProgress`; empty before its first batch."""
        id_, progress = self._progress
        return progress if id_ == record.id else record.progress

    def results(self, record: Record) -> tuple[int, dict[str, int]]:
        """Rows, and names and bytes of the files, that are whole."""
        manifest = self.manifest(record) or {"rows": 0, "shards": []}
        names = {name: int(about["bytes"]) for shard in manifest["shards"] for name, about in shard["files"].items()}
        for name in (MANIFEST, ERRORS):
            with contextlib.suppress(OSError):
                names[name] = (self.out(record.id) / name).stat().st_size
        return manifest["rows"], names

    def manifest(self, record: Record) -> dict[str, Any] | None:
        """What `mixmim extract` wrote of a job, without the paths of this machine; None before it wrote it."""
        try:
            found: dict[str, Any] = json.loads((self.out(record.id) / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        found["bundle"] = found["model"]
        found["source"]["name"] = record.source
        return found

    def stop(self) -> None:
        """Ask the process to end after its batch; the next server goes on with its job."""
        self._closing = True
        self._wake.set()
        with self._changing:
            if self._running:
                _let_end(self._running[1])

    def close(self) -> None:
        """Stop, and wait until nothing runs."""
        self.stop()
        if self._thread.ident:
            self._thread.join()
        self.store.close()
        self._lock.release()

    def _work(self) -> None:
        while True:
            self._wake.clear()  # before the look, so that no call is lost
            if self._closing:
                return
            try:
                if record := self.store.begin():
                    self._settle(record, *self._do(record))
                else:
                    self._wake.wait()
            except sqlite3.Error:  # such as on a full disk; a job whose end could not be noted is taken up again
                log.exception("the list of jobs cannot be written")
                self._wake.wait(RETRY_SECONDS)
                with contextlib.suppress(sqlite3.Error):
                    self.store.take_up()

    def _do(self, record: Record) -> tuple[dict[str, Any], int]:
        """The last message of the process that does a job, and its exit code."""
        log.info("job %s begins", record.id)
        last: dict[str, Any] = {}
        try:
            with self._process(record) as process:
                for line in process.stdout or ():
                    last = json.loads(line)
                    if "progress" in last:
                        self._progress = record.id, last["progress"]
        except (OSError, subprocess.SubprocessError):  # a job must not end all others
            log.exception("job %s failed", record.id)
            return {"failed": SERVER_FAILED}, 1
        return last, process.returncode

    @contextlib.contextmanager
    def _process(self, record: Record) -> Iterator[subprocess.Popen[str]]:
        """The process that does a job; gone when the block ends."""
        process = subprocess.Popen(  # noqa: S603 - nothing of a client's is in it
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
            creationflags=getattr(subprocess, "IDLE_PRIORITY_CLASS", 0),
            **OWN_GROUP,
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin  # noqa: S101 - PIPE
                process.stdin.write(json.dumps(self._task(record)) + "\n")
                process.stdin.flush()
            with self._changing:
                self._running = record.id, process
            now = self.store.get(record.id)
            if self._closing or (now and now.state == "cancelling"):  # asked for before there was a process
                _let_end(process)
            yield process
            process.wait(END_SECONDS)
        finally:
            with self._changing:
                self._running = None
            process.kill()
            process.wait()
            _let_end(process)
            if process.stdout:
                process.stdout.close()

    def _task(self, record: Record) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle.path.absolute()),
            "engine": self.engine,
            "source": record.source,
            "out": str(self.out(record.id)),
            "roots": [*map(str, self.roots.folders), *self.roots.urls],
            "options": record.options,
            "retry_failed": record.retry_failed,
            "log_format": self.settings.log_format,
        }

    def _settle(self, record: Record, last: Mapping[str, Any], code: int) -> None:
        """Write down how a job ended."""
        now = self.store.get(record.id)
        cancelled = now is not None and now.state == "cancelling"
        message = None
        if "failed" in last:
            state, message = "failed", last["failed"]
        elif last.get("complete"):
            state = "done"
        elif cancelled:
            state = "cancelled"
        elif self._closing:
            state = "queued"
        else:
            state, message = "failed", DIED.format(code=f"signal {-code}" if code < 0 else f"code {code}")
        log.info("job %s is %s%s", record.id, state, f": {message}" if message else "")
        self.store.end(record.id, state, self.progress(record), message)


def jobs_folder(settings: Settings) -> Path:
    """Where the list of jobs and their results are."""
    if settings.jobs_dir:
        return Path(settings.jobs_dir).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "mixmim-serve" / "jobs"


def parse_options(given: object, bundle: Bundle) -> dict[str, Any]:
    """Options of a job from JSON, each checked, with the defaults of those that are not given.

    Raises:
        ConfigError: one that is unknown, of another type, out of range or not in this model.
    """
    if not isinstance(given, dict):
        raise ConfigError("options must be a JSON object.")
    known = ("features", *SIMPLE)
    for name, value in given.items():
        if name not in known:
            raise unknown("option", name, known)
        if name == "features":
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise ConfigError(f"features must be a list of names, got {value!r}.")
        elif not isinstance(value, (int, float) if SIMPLE[name] is float else SIMPLE[name]) or (
            isinstance(value, bool) and SIMPLE[name] is not bool
        ):
            raise ConfigError(f"{name} must be of type {SIMPLE[name].__name__}, got {value!r}.")
    values = dict(given)
    effort = Resources(values.pop("max_failures", Resources.max_failures))
    options = ExtractOptions(**values)
    if options.format not in FORMATS:
        raise ConfigError(f"jobs write {' or '.join(FORMATS)}, not {options.format}.")
    if options.batch > MAX_BATCH or options.images > MAX_IMAGES:
        raise ConfigError(f"a batch has at most {MAX_BATCH} images, and a shard {MAX_IMAGES:,}.")
    options.check(bundle)
    return options.to_dict() | {"max_failures": effort.max_failures}


def _let_end(process: subprocess.Popen[str]) -> None:
    """Ask a process to stop, by the end of its standard input."""
    with contextlib.suppress(OSError):
        if process.stdin:
            process.stdin.close()
