"""No server, an upper bound: files through the engine in batches of 32, decoded ahead in as many threads.

Reads lines `SECONDS FILE...` and answers each with images/s and CPU seconds per image.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

from benchmarks.serving_peers.common import MAX_BATCH, engine
from mixmim_serve.engines import Engine
from mixmim_serve.extract.pipeline import run_files


def rate(engine: Engine, files: list[Path], seconds: float) -> tuple[float, float]:
    """Images/s and CPU seconds per image, measured after the first batch."""
    endless = itertools.cycle(files)
    results = run_files(engine, endless, ["embedding"], MAX_BATCH)  # type: ignore[arg-type]
    for _ in range(MAX_BATCH):
        next(results)
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(MAX_BATCH):
            next(results)
        count += MAX_BATCH
    return count / (time.perf_counter() - began), (time.process_time() - cpu) / count


if __name__ == "__main__":
    loaded = engine()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, *names = line.split()
        print(*rate(loaded, [Path(name) for name in names], float(seconds)), flush=True)
