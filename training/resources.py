"""Too little memory, or shared memory, as one sentence that says what to change."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from mixmim_serve.errors import ResourceError
from training.config import RunConfig

# How torch says it, beside its OutOfMemoryError; it has no types for these.
NO_MEMORY = ("DefaultCPUAllocator",)
NO_SHARED_MEMORY = ("shared memory", "</torch_", "Bus error")
DEAD_WORKER = "DataLoader worker"
SHARED = Path("/dev/shm")  # noqa: S108 - where torch's loaders put batches, on Linux
AHEAD = 2  # batches a worker has ready, torch's prefetch_factor
MORE_SHARED = "give the container more (docker run --shm-size=8g), or lower --workers (0 needs none)."


def check_shared_memory(config: RunConfig, batch_bytes: int) -> None:
    """Refuse to start where batches on their way from the workers cannot all be held.

    torch would lose the batch that does not fit, say so in a worker's traceback, and wait for it for ever (2.13).

    Raises:
        ResourceError: there is less than that.
    """
    if not config.workers or not SHARED.is_dir():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = processes * (AHEAD * config.workers + 1) * batch_bytes  # one more is in use
    free = shutil.disk_usage(SHARED).free
    if needed > free:
        raise ResourceError(
            f"the {processes * config.workers} processes that decode images need {needed / 1e6:.0f} MB of shared "
            f"memory, and {SHARED} has {free / 1e6:.0f} MB free: {MORE_SHARED}"
        )


@contextlib.contextmanager
def explain_shortage(config: RunConfig, processes: int) -> Iterator[None]:
    """Let a run that has too little of something end with a sentence.

    Raises:
        ResourceError: too little memory or shared memory, or a process that decodes images was killed.
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
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(each in text for each in NO_MEMORY):
        return (
            f"not enough memory for {config.part(processes)} images at a time: "
            f"--set accumulate={2 * config.accumulate} halves them for the same batch, "
            "--set checkpoint_activations=true keeps less of each, --batch-size lowers the batch."
        )
    if any(each in text for each in NO_SHARED_MEMORY):
        return f"the {config.workers} processes that decode images have too little shared memory: {MORE_SHARED}"
    if DEAD_WORKER in text:
        return (
            "a process that decodes images was killed, most likely for its memory: lower --workers, and go on with "
            "--resume."
        )
    return None
