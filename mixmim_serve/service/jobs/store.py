"""The list of jobs, in an SQLite file. A row is written before its request is answered."""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmim_serve.errors import ConfigError

FORMAT = 1  # version of the file; raised when an older server would misread it
STATES = ("queued", "running", "cancelling", "done", "failed", "cancelled")
CRASHED = "the server failed on this job; its log has the reason."
ENDED = ("done", "failed", "cancelled")
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    source TEXT NOT NULL,
    options TEXT NOT NULL,
    retry_failed INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    progress TEXT NOT NULL DEFAULT '{}',
    message TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number);
"""
SAME = """
SELECT * FROM jobs
WHERE source = ? AND options = ? AND retry_failed = 0 AND state IN ('queued', 'running')
"""
NEW = "INSERT INTO jobs (id, source, options, state, created) VALUES (?, ?, ?, 'queued', ?) RETURNING *"
BEFORE = """
SELECT * FROM jobs
WHERE number <> ? AND (state IN ('running', 'cancelling') OR (state = 'queued' AND number < ?))
"""
START_NEXT = """
UPDATE jobs SET state = 'running', started = ?
WHERE number = (SELECT min(number) FROM jobs WHERE state = 'queued') RETURNING *
"""
END = "UPDATE jobs SET state = ?, ended = ?, progress = ?, message = ? WHERE id = ?"
RESUME = """
UPDATE jobs SET state = 'queued', retry_failed = ?, ended = NULL, message = NULL
WHERE id = ? AND state IN ('done', 'failed', 'cancelled') RETURNING *
"""


@dataclass(frozen=True)
class JobRecord:
    """The current state of a job; times are seconds since 1970."""

    number: int
    id: str
    source: str
    options: dict[str, Any]
    retry_failed: bool
    state: str
    created: float
    started: float | None
    ended: float | None
    progress: dict[str, Any]
    message: str | None


class JobStore:
    """The SQLite file; may be used from any thread.

    Raises:
        ConfigError: when it cannot be opened, or a later version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._sqlite = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as error:
            raise _cannot_open(path, error) from error
        try:
            self._prepare(path)
        except BaseException:
            self._sqlite.close()
            raise

    def _prepare(self, path: Path) -> None:
        try:
            self._sqlite.row_factory = sqlite3.Row
            self._sqlite.execute("PRAGMA journal_mode=WAL")
            self._sqlite.execute("PRAGMA synchronous=FULL")
            (version,) = self._sqlite.execute("PRAGMA user_version").fetchone()
            if version > FORMAT:
                raise ConfigError(f"{path} was written by a later version of this server: choose another jobs_dir.")
            self._sqlite.executescript(SCHEMA)
            self._sqlite.execute(f"PRAGMA user_version={FORMAT}")
        except sqlite3.Error as error:
            raise _cannot_open(path, error) from error

    def recover(self) -> None:
        """Queue the job that was running when the last server ended; cancel the one that was being cancelled."""
        with self._change() as change:
            change("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
            change("UPDATE jobs SET state = 'cancelled', ended = ? WHERE state = 'cancelling'", time.time())

    def add(self, source: str, options: dict[str, Any], most: int) -> tuple[JobRecord, bool] | None:
        """A new job and True; the unfinished job with the same work and False; None when `most` are waiting."""
        work = source, json.dumps(options, sort_keys=True)
        with self._change() as change:
            if same := change(SAME, *work):
                return _record(same[0]), False
            if len(change("SELECT number FROM jobs WHERE state = 'queued'")) >= most:
                return None
            (created,) = change(NEW, secrets.token_hex(8), *work, time.time())
            return _record(created), True

    def get(self, job_id: str) -> JobRecord | None:
        """A job by its id."""
        records = self._read("SELECT * FROM jobs WHERE id = ?", job_id)
        return records[0] if records else None

    def newest(self, states: Sequence[str], most: int) -> list[JobRecord]:
        """At most `most` jobs in these states, the newest first."""
        query = "SELECT * FROM jobs WHERE state IN (SELECT value FROM json_each(?)) ORDER BY number DESC LIMIT ?"
        return self._read(query, json.dumps(states), most)

    def counts(self) -> dict[str, int]:
        """The number of jobs in each state."""
        with self._lock:
            counts = dict(self._sqlite.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: counts.get(state, 0) for state in STATES}

    def ahead(self, record: JobRecord) -> int:
        """The number of jobs that run before a queued one."""
        return len(self._read(BEFORE, record.number, record.number))

    def start_next(self) -> JobRecord | None:
        """Mark the oldest queued job as running and return it; None when the queue is empty."""
        with self._change() as change:
            rows = change(START_NEXT, time.time())
        return _record(rows[0]) if rows else None

    def end(self, job_id: str, state: str, progress: dict[str, Any], message: str | None = None) -> None:
        """Record that a job has ended, or that it is queued again."""
        ended = time.time() if state in ENDED else None
        with self._change() as change:
            change(END, state, ended, json.dumps(progress), message, job_id)

    def cancel(self, job_id: str) -> JobRecord | None:
        """Cancel a queued job, mark a running one as being cancelled, and leave one that has ended as it is."""
        with self._change() as change:
            now = time.time()
            change("UPDATE jobs SET state = 'cancelled', ended = ? WHERE id = ? AND state = 'queued'", now, job_id)
            change("UPDATE jobs SET state = 'cancelling' WHERE id = ? AND state = 'running'", job_id)
        return self.get(job_id)

    def resume(self, job_id: str, retry_failed: bool) -> JobRecord | None:
        """Queue a job that has ended again; None if it has not ended."""
        with self._change() as change:
            rows = change(RESUME, retry_failed, job_id)
        return _record(rows[0]) if rows else None

    def remove(self, job_id: str) -> None:
        """Delete a job from the list."""
        with self._change() as change:
            change("DELETE FROM jobs WHERE id = ?", job_id)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._sqlite.close()

    def _read(self, statement: str, *values: Any) -> list[JobRecord]:
        with self._lock:
            return [_record(row) for row in self._sqlite.execute(statement, values)]

    @contextlib.contextmanager
    def _change(self) -> Iterator[Callable[..., list[sqlite3.Row]]]:
        """A transaction: all of its statements take effect, or none."""
        with self._lock:
            self._sqlite.execute("BEGIN IMMEDIATE")
            try:
                yield lambda statement, *values: self._sqlite.execute(statement, values).fetchall()
                self._sqlite.execute("COMMIT")
            except BaseException:
                if self._sqlite.in_transaction:  # a full disk ends it at once
                    self._sqlite.execute("ROLLBACK")
                raise


def is_disk_full(error: sqlite3.Error | OSError) -> bool:
    """Whether an error of the list or its folder means that nothing more can be written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
    return getattr(error, "sqlite_errorcode", None) in full or "disk is full" in str(error)


def _cannot_open(path: Path, error: sqlite3.Error) -> ConfigError:
    return ConfigError(f"cannot open the list of jobs in {path} ({error}): choose another jobs_dir.")


def _record(row: sqlite3.Row) -> JobRecord:
    values = dict(row)
    decoded = {name: json.loads(values[name]) for name in ("options", "progress")}
    return JobRecord(**values | decoded | {"retry_failed": bool(values["retry_failed"])})
