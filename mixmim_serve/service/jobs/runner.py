"""Runs the jobs of one server: a thread takes one at a time from the list and runs it in a process of its own.

A process can be given idle priority whatever library computes in it, and one that crashes on an image or runs out of
memory leaves the server alone. It ends when its standard input closes, as when a job is cancelled, and is killed when
the server is.
"""

from __future__ import annotations

import contextlib
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
from mixmim_serve.errors import ConfigError, DataError, InUseError, OutputError
from mixmim_serve.extract.folder import ERRORS, MANIFEST
from mixmim_serve.locks import lock_folder
from mixmim_serve.service.jobs.options import parse_options
from mixmim_serve.service.jobs.pool import RequestPool
from mixmim_serve.service.jobs.roots import MAX_NAMES, Roots
from mixmim_serve.service.jobs.store import CRASHED, ENDED, JobRecord, JobStore
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.settings import Settings
from mixmim_serve.sources.patterns import SearchLimit
from mixmim_serve.strict_json import read_json

WORKER = "mixmim_serve.service.jobs.worker"
DIED = "its process ended with {code}: complete shards are kept, resume the job (the server's log may have the reason)."
# Ctrl-C is for the server, which then ends the process. Not in a session of its own: with autogroup, Linux shares the
# processor between sessions first, whatever the priorities within each.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
RETRY_SECONDS = 5.0  # until the next try when the list cannot be written
END_SECONDS = 40.0  # for a process to end by itself; it has 30 to finish a batch and write its manifest
SEARCH_SECONDS = 20.0  # for a request to find its source
SEARCHES, SEARCHES_WAITING = 2, 16  # at once, and in the queue behind them; above that 429
LOOKS, LOOKS_WAITING = 2, 256  # the same of everything else that job requests do

log = logging.getLogger(__name__)


class JobRunner:
    """The list of jobs, and the thread that runs them; close it.

    Raises:
        ConfigError: when a root is not a folder, when the jobs folder is in use by another server or not writable,
            or when packages are missing.
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
            message = f"another server uses the jobs folder {self.folder}: choose another with --set jobs_dir=."
            raise ConfigError(message) from error
        except OutputError as error:
            raise ConfigError(str(error)) from error
        self.store = JobStore(self.folder / "jobs.sqlite")
        self.store.recover()
        self._progress: tuple[str, dict[str, Any]] = "", {}  # of the current job; kept when it ends
        self._running: tuple[str, subprocess.Popen[str]] | None = None
        self._running_lock = threading.Lock()
        self.searches = RequestPool("jobs-search", SEARCHES, SEARCHES_WAITING)
        self.looks = RequestPool("jobs-request", LOOKS, LOOKS_WAITING)
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    def start(self, metrics: Metrics) -> None:
        """Start on the jobs in the queue."""
        metrics.watch_jobs(self.store.counts)
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether the server is shutting down."""
        return self._closing

    def limit(self, cancelled: threading.Event) -> SearchLimit:
        """The limit for one request's search, which also ends when `cancelled` is set or the server stops."""

        def stopped() -> bool:
            return self._closing or cancelled.is_set()

        return SearchLimit(SEARCH_SECONDS, MAX_NAMES, stopped, in_background=True)

    def submit(self, source: object, options: object, limit: SearchLimit) -> tuple[JobRecord, bool] | None:
        """Queue a job.

        Returns:
            The new job and True, or the unfinished job with the same source and options and False; None when too
            many jobs are waiting.

        Raises:
            ConfigError: for an invalid option.
            DataError: when there is no such source, or it is not found within the limit.
        """
        if not isinstance(source, str):
            raise DataError("name a source: a folder, file or pattern below the roots of this server.")
        parsed = parse_options(options, self.bundle)
        self.roots.find(source, limit)
        submitted = self.store.add(source, parsed, self.settings.jobs_waiting)
        self._wake.set()
        return submitted

    def cancel(self, job_id: str) -> JobRecord | None:
        """Stop a job after its current batch; complete shards are kept. None when there is no such job."""
        record = self.store.cancel(job_id)
        with self._running_lock:
            if record and record.state == "cancelling" and self._running and self._running[0] == job_id:
                _let_end(self._running[1])
        return record

    def resume(self, record: JobRecord, retry_failed: bool, limit: SearchLimit) -> JobRecord | None:
        """Queue a job that has ended again; it resumes where it stopped. None when it has not ended.

        Raises:
            DataError: when its source is gone, or not found within the limit.
        """
        self.roots.find(record.source, limit)
        with self._running_lock:
            resumed = self.store.resume(record.id, retry_failed)
        self._wake.set()
        return resumed

    def remove(self, job_id: str) -> bool:
        """Delete a job that has ended, with its results; False if it has not ended."""
        with self._running_lock:  # so that it cannot be resumed in between
            record = self.store.get(job_id)
            if record is None or record.state not in ENDED:
                return False
            if self.out(job_id).is_dir():
                shutil.rmtree(self.out(job_id))
            self.store.remove(job_id)
        return True

    def out(self, job_id: str) -> Path:
        """The folder of a job's results."""
        return self.folder / job_id

    def progress(self, record: JobRecord) -> dict[str, Any]:
        """The fields of an extraction's progress; empty before the first batch."""
        job_id, progress = self._progress
        return progress if job_id == record.id else record.progress

    def results(self, record: JobRecord) -> tuple[int, dict[str, int]]:
        """The number of rows, and the sizes in bytes of the files by name, of all complete shards."""
        manifest = self.manifest(record) or {"rows": 0, "shards": []}
        names = {name: int(entry["bytes"]) for shard in manifest["shards"] for name, entry in shard["files"].items()}
        for name in (MANIFEST, ERRORS):
            with contextlib.suppress(OSError):
                names[name] = (self.out(record.id) / name).stat().st_size
        return manifest["rows"], names

    def manifest(self, record: JobRecord) -> dict[str, Any] | None:
        """The manifest of a job's results without the paths of this machine; None before there is one."""
        try:
            manifest: dict[str, Any] = read_json(self.out(record.id) / MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        manifest["bundle"] = manifest["model"]
        manifest["source"]["name"] = record.source
        return manifest

    def stop(self) -> None:
        """Ask the process to end after its current batch; the next server resumes its job."""
        self._closing = True
        self._wake.set()
        with self._running_lock:
            if self._running:
                _let_end(self._running[1])

    def close(self) -> None:
        """Stop, and wait for the current job's process to end."""
        self.stop()
        if self._thread.ident:
            self._thread.join()
        self.searches.close()
        self.looks.close()
        self.store.close()
        self._lock.release()

    def _work(self) -> None:
        while True:
            self._wake.clear()  # before looking, so that no call is lost
            if self._closing:
                return
            try:
                if record := self.store.start_next():
                    self._finish(record, *self._run_job(record))
                else:
                    self._wake.wait()
            except sqlite3.Error:  # such as a full disk; a job whose end could not be recorded runs again
                log.exception("cannot write the list of jobs")
                self._wake.wait(RETRY_SECONDS)
                with contextlib.suppress(sqlite3.Error):
                    self.store.recover()

    def _run_job(self, record: JobRecord) -> tuple[dict[str, Any], int]:
        """The last message of the process that runs a job, and its exit code."""
        log.info("job %s starts", record.id)
        last: dict[str, Any] = {}
        try:
            with self._process(record) as process:
                for line in process.stdout or ():
                    last = json.loads(line)
                    if "progress" in last:
                        self._progress = record.id, last["progress"]
        except (OSError, subprocess.SubprocessError):  # one job must not end the thread
            log.exception("job %s failed", record.id)
            return {"failed": CRASHED}, 1
        return last, process.returncode

    @contextlib.contextmanager
    def _process(self, record: JobRecord) -> Iterator[subprocess.Popen[str]]:
        """The process that runs a job; gone when the block ends."""
        process = subprocess.Popen(  # noqa: S603 - the command holds nothing from a client
            [sys.executable, "-P", "-m", WORKER, str(os.getpid())],
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
            with self._running_lock:
                self._running = record.id, process
            current = self.store.get(record.id)
            if self._closing or (current and current.state == "cancelling"):  # asked for before the process existed
                _let_end(process)
            yield process
            process.wait(END_SECONDS)
        finally:
            with self._running_lock:
                self._running = None
            process.kill()
            process.wait()
            _let_end(process)
            if process.stdout:
                process.stdout.close()

    def _task(self, record: JobRecord) -> dict[str, Any]:
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

    def _finish(self, record: JobRecord, last: Mapping[str, Any], code: int) -> None:
        """Record how a job ended."""
        current = self.store.get(record.id)
        cancelled = current is not None and current.state == "cancelling"
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
    """The folder of the list of jobs and their results."""
    if settings.jobs_dir:
        return Path(settings.jobs_dir).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "mixmim-serve" / "jobs"


def _let_end(process: subprocess.Popen[str]) -> None:
    """Ask a process to end, by closing its standard input."""
    with contextlib.suppress(OSError):
        if process.stdin:
            process.stdin.close()
