"""Turns a shortage of memory or shared memory into one sentence that says what to change."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from mixmim_serve.errors import ResourceError
from training.config import RunConfig

# Parts of torch's messages for errors that have no type of their own.
NO_MEMORY = ("DefaultCPUAllocator",)
NO_SHARED_MEMORY = ("shared memory", "</torch_", "Bus error")
DEAD_WORKER = "DataLoader worker"
SHARED = Path("/dev/shm")  # noqa: S108 - where torch's data loaders put batches on Linux
AHEAD = 2  # batches that each worker prefetches
MORE_SHARED = "give the container more (docker run --shm-size=8g), or lower --workers (0 needs none)."


def check_shared_memory(config: RunConfig, batch_bytes: int) -> None:
    """Check that shared memory can hold all prefetched batches.

    Otherwise torch (2.13) would lose the batch that does not fit, print a worker's traceback, and wait forever.

    Raises:
        ResourceError: when it cannot.
    """
    if not config.workers or not SHARED.is_dir():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = processes * (AHEAD * config.workers + 1) * batch_bytes  # + 1: the batch in use
    free = shutil.disk_usage(SHARED).free
    if needed > free:
        raise ResourceError(
            f"the {processes * config.workers} decoding processes need {needed / 1e6:.0f} MB of shared memory, but "
            f"{SHARED} has {free / 1e6:.0f} MB free: {MORE_SHARED}"
        )


@contextlib.contextmanager
def explain_shortage(config: RunConfig, processes: int) -> Iterator[None]:
    """Turn errors about memory into one sentence.

    Raises:
        ResourceError: when memory or shared memory runs out, or a decoding process was killed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = _explanation(error, config, processes)
        if message is None:
            raise
        raise ResourceError(message) from error


def _explanation(error: Exception, config: RunConfig, processes: int) -> str | None:
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(phrase in text for phrase in NO_MEMORY):
        return (
            f"not enough memory for {config.part_size(processes)} images at a time: "
            f"--set accumulate={2 * config.accumulate} halves them for the same batch, "
            "--set checkpoint_activations=true needs less per image, --batch-size lowers the batch."
        )
    if any(phrase in text for phrase in NO_SHARED_MEMORY):
        return f"the {config.workers} decoding processes have too little shared memory: {MORE_SHARED}"
    if DEAD_WORKER in text:
        return (
            "a decoding process was killed, most likely for lack of memory: lower --workers and continue with --resume."
        )
    return None
