"""What a step costs, for comparisons at an equal budget: variants take turns, so that other work hits all of them."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.learning import ALONE
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import Source
from training.data import Batch
from training.run_folder import RunFolder
from training.task import Task
from training.trainer import Trainer

ROUNDS = 5  # timed steps of each, after a first one, which is slower


def epochs_at_equal_cost(
    path: Path, tasks: Mapping[str, Callable[[], Task]], sources: Mapping[str, Source], of: str, epochs: int
) -> dict[str, int]:
    """Epochs of each task that cost what `epochs` of the task `of` cost; measured once and kept in `path`.

    The tasks' configurations must have no workers, so that decoding is part of the cost.
    """
    if not path.exists():
        costs = seconds_per_image({name: make() for name, make in tasks.items()}, sources, ROUNDS)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"device": ALONE.device.type, "seconds per image": costs}, indent=2) + "\n")
        print("seconds per image:", ", ".join(f"{name} {seconds:.4f}" for name, seconds in costs.items()), flush=True)
    costs = json.loads(path.read_text())["seconds per image"]
    epoch = {name: costs[name] * len(sources[name].keys) for name in tasks}  # seconds
    return {name: max(1, round(epoch[of] * epochs / seconds)) for name, seconds in epoch.items()}


def seconds_per_image(tasks: Mapping[str, Task], sources: Mapping[str, Source], rounds: int) -> dict[str, float]:
    """Median seconds of all cores (on a GPU: of the clock) per image, decoding included, without torch.compile."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: Trainer(task, sources[name], RunFolder(Path(folder) / name), ALONE) for name, task in tasks.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        batches = {name: Batches(trainer) for name, trainer in trainers.items()}
        for _ in range(rounds + 1):
            for name, trainer in trainers.items():
                began = clock()
                trainer.train_step(batches[name].next() for _ in range(trainer.config.accumulate))
                seconds[name].append(clock() - began)
    return {name: statistics.median(each[1:]) / tasks[name].config.batch_size for name, each in seconds.items()}


class Batches:
    """A trainer's batches, over and over."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.left = iter(trainer.loader)

    def next(self) -> Batch:
        """The next one."""
        batch: Batch | None = next(self.left, None)
        if batch is None:
            self.left = iter(self.trainer.loader)
            batch = next(self.left)
        return batch


def clock() -> float:
    """Seconds: of this process's threads on a CPU, else of the clock once the device is done."""
    if ALONE.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
