"""The process that does one job: the task comes as a line of JSON, progress and the end go out as such lines.

It stops when its standard input ends, and works only with what processor time nobody else wants.
"""

from __future__ import annotations

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
from mixmim_serve.service.access_log import log_config
from mixmim_serve.service.jobs.roots import Roots
from mixmim_serve.service.jobs.store import SERVER_FAILED
from mixmim_serve.sources import Source, storage

REPORT_EVERY = 0.5  # seconds
LAST_SECONDS = 30.0  # to finish a batch and write the manifest after a stop was asked for
HELD_SECONDS = 60.0  # that the process of a server that was killed may hold the folder

log = logging.getLogger("mixmim_serve.jobs")


def main() -> None:
    """Do the job on standard input."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to all of a service; the server says when to stop
    out = _own_stdout()
    task = json.loads(sys.stdin.readline())
    stop = threading.Event()
    threading.Thread(target=_watch_stdin, args=(stop,), daemon=True).start()
    step_back()
    warnings.filterwarnings("ignore", module="PIL")
    logging.config.dictConfig(log_config(task["log_format"]))

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        summary = do(task, lambda progress: tell(progress=dataclasses.asdict(progress)), stop)
        tell(progress=dataclasses.asdict(summary.progress))
        tell(complete=summary.complete)
    except MixMIMError as error:
        tell(failed=without_paths(str(error), task))
    except BrokenPipeError:  # nobody is there to tell
        pass
    except Exception:
        log.exception("a job failed")
        tell(failed=SERVER_FAILED)


def do(task: Mapping[str, Any], report: Callable[[ExtractProgress], None], stop: threading.Event) -> Summary:
    """What `mixmim extract` does, from below the root of the source, so that its messages name nothing above.

    Raises:
        MixMIMError: why it cannot be done.
    """
    roots = Roots(task["roots"])
    root, source = roots.find(task["source"])
    os.chdir(root or task["out"].rpartition(os.sep)[0])
    options = dict(task["options"])
    effort = Resources(options.pop("max_failures"))
    job = ExtractJob(Path(task["bundle"]), source, task["out"], options=ExtractOptions(**options), effort=effort)
    engine = open_engine(job.bundle, task["engine"])

    def executor(job: ExtractJob, opened: Source) -> Executor:
        roots.check(opened)
        return LocalExecutor(job, opened, engine)

    run = partial(lead.run, executor=executor, progress=_now_and_then(report), cancelled=stop.is_set)
    summary = _once_free(partial(run, job))
    if task["retry_failed"] and summary.complete:
        summary = run(dataclasses.replace(job, retry_failed=True))
    return summary


def step_back() -> None:
    """Run only when nobody else wants the processor; Windows was told when the process was made."""
    try:
        for thread in os.listdir("/proc/self/task"):  # libraries have started some; those to come inherit it
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        if hasattr(os, "nice"):
            os.nice(19)


def without_paths(message: str, task: Mapping[str, Any]) -> str:
    """A message that may leave the machine."""
    for path, name in ((task["out"], "the folder of results"), (task["bundle"], "the bundle")):
        message = message.replace(path, name)
    for root in sorted((each for each in task["roots"] if not storage.is_url(each)), key=len, reverse=True):
        message = message.replace(f"{root}{os.sep}", "").replace(root, "the root")
    return message


def _own_stdout() -> IO[str]:
    """Standard output for messages; what libraries print there goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _watch_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    stop.set()
    time.sleep(LAST_SECONDS)
    os._exit(1)


def _now_and_then(report: Callable[[ExtractProgress], None]) -> Callable[[ExtractProgress], None]:
    last = -REPORT_EVERY

    def told(progress: ExtractProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY:
            last = time.monotonic()
            report(progress)

    return told


def _once_free(run: Callable[[], Summary]) -> Summary:
    """Run as soon as the process of a server that was killed has let go of the folder."""
    deadline = time.monotonic() + HELD_SECONDS
    while True:
        try:
            return run()
        except InUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
