"""The process that runs one job: it reads the task as a line of JSON, and writes progress and outcome as such lines.

It stops when its standard input closes, is killed when the server is, and runs at idle priority.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import logging.config
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from mixmim_serve.engines import open_engine
from mixmim_serve.errors import InUseError, MixMIMError
from mixmim_serve.extract import lead
from mixmim_serve.extract.job import Executor, ExtractJob, Summary
from mixmim_serve.extract.local import LocalExecutor
from mixmim_serve.extract.options import ExtractOptions, Resources
from mixmim_serve.extract.progress import ExtractProgress
from mixmim_serve.service.jobs.roots import Roots
from mixmim_serve.service.jobs.store import CRASHED
from mixmim_serve.service.metrics import log_config
from mixmim_serve.signals import die_with_parent
from mixmim_serve.sources import Source, local, storage
from mixmim_serve.sources.names import as_text

REPORT_EVERY = 0.5  # seconds
STOP_SECONDS = 30.0  # to finish a batch and write the manifest after a stop was requested
LOCK_SECONDS = 60.0  # that the process of a killed server may still hold the folder's lock

log = logging.getLogger("mixmim_serve.jobs")


def main() -> None:
    """Run the job that standard input describes."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to a whole service; the server says when to stop
    out = _claim_stdout()
    task = json.loads(sys.stdin.readline())
    stop = threading.Event()
    threading.Thread(target=_watch_stdin, args=(stop,), daemon=True).start()
    run_at_idle_priority()
    warnings.filterwarnings("ignore", module="PIL")
    logging.config.dictConfig(log_config(task["log_format"]))

    def send(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        summary = run_task(task, send, stop)
        send(complete=summary.complete)
    except MixMIMError as error:
        send(failed=without_paths(str(error), task))
    except BrokenPipeError:  # the server is gone
        pass
    except Exception:
        log.exception("a job failed")
        send(failed=CRASHED)


def run_task(task: Mapping[str, Any], send: Callable[..., None], stop: threading.Event) -> Summary:
    """Extract as `mixmim extract` does, confined to the roots, and send the progress.

    The current folder is the root of the source, so that messages name nothing above it.

    Raises:
        MixMIMError: when it cannot be done.
    """
    roots = Roots(task["roots"])
    root, source = roots.find(task["source"])
    os.chdir(root or task["out"].rpartition(os.sep)[0])
    local.confine(roots.confinement.at(root))
    options = dict(task["options"])
    effort = Resources(options.pop("max_failures"))
    job = ExtractJob(Path(task["bundle"]), source, task["out"], options=ExtractOptions(**options), effort=effort)
    engine = open_engine(job.bundle, task["engine"])
    passed_over: dict[str, int] = {}

    def report(progress: ExtractProgress) -> None:
        send(progress=dataclasses.asdict(progress) | {"passed_over": passed_over})

    def executor(job: ExtractJob, opened: Source) -> Executor:
        roots.check(opened, root)
        passed_over.update(opened.passed_over)
        return LocalExecutor(job, opened, engine)

    run = partial(lead.run, executor=executor, progress=_throttled(report), cancelled=stop.is_set)
    summary = _when_unlocked(partial(run, job))
    if task["retry_failed"] and summary.complete:
        summary = run(dataclasses.replace(job, retry_failed=True))
    report(summary.progress)
    return summary


def run_at_idle_priority() -> None:
    """Use only processor time that nothing else wants; on Windows the process is created that way.

    When memory runs out, Linux kills this process first, whichever one asked for more.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        for thread in os.listdir("/proc/self/task"):  # libraries have started some already; later ones inherit it
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        if hasattr(os, "nice"):
            os.nice(19)


def without_paths(message: str, task: Mapping[str, Any]) -> str:
    """The message with the paths of this machine replaced, so that it may leave it."""
    for path, name in ((task["out"], "the folder of results"), (task["bundle"], "the bundle")):
        message = message.replace(path, name)
    for root in sorted((root for root in task["roots"] if not storage.is_url(root)), key=len, reverse=True):
        message = message.replace(f"{root}{os.sep}", "").replace(root, "the root")
    return as_text(message)


def _claim_stdout() -> IO[str]:
    """Standard output, for messages alone; what libraries print goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _watch_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    stop.set()
    time.sleep(STOP_SECONDS)
    os._exit(1)


def _throttled(report: Callable[[ExtractProgress], None]) -> Callable[[ExtractProgress], None]:
    """`report`, at most once per `REPORT_EVERY` seconds."""
    last = -REPORT_EVERY

    def throttled(progress: ExtractProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY:
            last = time.monotonic()
            report(progress)

    return throttled


def _when_unlocked(run: Callable[[], Summary]) -> Summary:
    """Run as soon as the process of a killed server has released the folder's lock."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return run()
        except InUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
