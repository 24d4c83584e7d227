"""The list of jobs, in a file of SQLite. A row is written before its request is answered."""

from __future__ import annotations

import contextlib
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

FORMAT = 1  # of the file; raised when an older server would misread it
STATES = ("queued", "running", "cancelling", "done", "failed", "cancelled")
SERVER_FAILED = "the server failed on this job; its log has the reason."
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
WHERE number <> ?1 AND (state IN ('running', 'cancelling') OR (state = 'queued' AND number < ?1))
"""
BEGIN = """
UPDATE jobs SET state = 'running', started = ?
WHERE number = (SELECT min(number) FROM jobs WHERE state = 'queued') RETURNING *
"""
END = "UPDATE jobs SET state = ?, ended = ?, progress = ?, message = ? WHERE id = ?"
RESUME = """
UPDATE jobs SET state = 'queued', retry_failed = ?, ended = NULL, message = NULL
WHERE id = ? AND state IN ('done', 'failed', 'cancelled') RETURNING *
"""


@dataclass(frozen=True)
class Record:
    """A job as it is now; times are seconds since 1970."""

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


class Store:
    """The file; may be used from any thread.

    Raises:
        ConfigError: it cannot be opened, or a later version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._sqlite = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._sqlite.row_factory = sqlite3.Row
            self._sqlite.execute("PRAGMA journal_mode=WAL")
            self._sqlite.execute("PRAGMA synchronous=FULL")
            (found,) = self._sqlite.execute("PRAGMA user_version").fetchone()
            if found > FORMAT:
                raise ConfigError(f"{path} was written by a later version of this server: choose another jobs_dir.")
            self._sqlite.executescript(SCHEMA)
            self._sqlite.execute(f"PRAGMA user_version={FORMAT}")
        except sqlite3.Error as error:
            raise ConfigError(
                f"the list of jobs in {path} cannot be opened ({error}): choose another jobs_dir."
            ) from error

    def take_up(self) -> None:
        """What ran when the last server ended, however it ended, is next; what was about to be cancelled is."""
        with self._change() as change:
            change("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
            change("UPDATE jobs SET state = 'cancelled', ended = ? WHERE state = 'cancelling'", time.time())

    def add(self, source: str, options: dict[str, Any], most: int) -> tuple[Record, bool] | None:
        """A new job and True; one that has not ended yet and does the same, and False; None when `most` wait."""
        asked = source, json.dumps(options, sort_keys=True)
        with self._change() as change:
            if found := change(SAME, *asked):
                return _record(found[0]), False
            if len(change("SELECT number FROM jobs WHERE state = 'queued'")) >= most:
                return None
            (created,) = change(NEW, secrets.token_hex(8), *asked, time.time())
            return _record(created), True

    def get(self, id_: str) -> Record | None:
        """A job by its id."""
        found = self._read("SELECT * FROM jobs WHERE id = ?", id_)
        return found[0] if found else None

    def newest(self, states: Sequence[str], most: int) -> list[Record]:
        """Jobs in these states, the newest first."""
        among = "SELECT * FROM jobs WHERE state IN (SELECT value FROM json_each(?)) ORDER BY number DESC LIMIT ?"
        return self._read(among, json.dumps(states), most)

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with self._lock:
            found = dict(self._sqlite.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def ahead(self, record: Record) -> int:
        """Jobs that are done before a queued one."""
        return len(self._read(BEFORE, record.number))

    def begin(self) -> Record | None:
        """The oldest that is queued, which runs now."""
        with self._change() as change:
            found = change(BEGIN, time.time())
        return _record(found[0]) if found else None

    def end(self, id_: str, state: str, progress: dict[str, Any], message: str | None = None) -> None:
        """A job has ended, or is queued again."""
        ended = time.time() if state in ENDED else None
        with self._change() as change:
            change(END, state, ended, json.dumps(progress), message, id_)

    def cancel(self, id_: str) -> Record | None:
        """A job that waits is cancelled; one that runs is about to be; one that has ended stays as it is."""
        with self._change() as change:
            change("UPDATE jobs SET state = 'cancelled', ended = ? WHERE id = ? AND state = 'queued'", time.time(), id_)
            change("UPDATE jobs SET state = 'cancelling' WHERE id = ? AND state = 'running'", id_)
        return self.get(id_)

    def resume(self, id_: str, retry_failed: bool) -> Record | None:
        """Queue a job again that has ended; None if it has not."""
        with self._change() as change:
            found = change(RESUME, retry_failed, id_)
        return _record(found[0]) if found else None

    def remove(self, id_: str) -> None:
        """Forget a job."""
        with self._change() as change:
            change("DELETE FROM jobs WHERE id = ?", id_)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._sqlite.close()

    def _read(self, statement: str, *values: Any) -> list[Record]:
        with self._lock:
            return [_record(row) for row in self._sqlite.execute(statement, values)]

    @contextlib.contextmanager
    def _change(self) -> Iterator[Callable[..., list[sqlite3.Row]]]:
        """A transaction: all of its statements, or none."""
        with self._lock:
            self._sqlite.execute("BEGIN IMMEDIATE")
            try:
                yield lambda statement, *values: self._sqlite.execute(statement, values).fetchall()
                self._sqlite.execute("COMMIT")
            except BaseException:
                self._sqlite.execute("ROLLBACK")
                raise


def _record(row: sqlite3.Row) -> Record:
    values = dict(row)
    decoded = {name: json.loads(values[name]) for name in ("options", "progress")}
    return Record(**values | decoded | {"retry_failed": bool(values["retry_failed"])})
