"""Batches of cropped uint8 pixels from a source of images, the same for any number of workers and processes.

An unreadable image is reported and replaced by another one of the source, so batches keep their size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.preprocess import decode
from mixmim_serve.signals import outlive_signals
from mixmim_serve.sources import Source
from training.augment import RandomCrop, flip
from training.config import RunConfig
from training.resources import AHEAD, check_shared_memory

ATTEMPTS = 20  # images to try for one place in a batch
WINDOW = 16  # runs of a source that are shuffled together, and hence open at the same time


class TrainingImage(NamedTuple):
    """One cropped image."""

    pixels: np.ndarray | None  # uint8 (crops * size, size, 3); None when every attempt failed
    label: int  # 0 where the source has no labels
    flipped: bool  # to be mirrored on the device
    unreadable: tuple[str, ...]  # one sentence per image


class Batch(NamedTuple):
    """Cropped images, their labels, and the unreadable images."""

    pixels_BHWC: Tensor  # uint8, several crops of an image one below the other; empty when an image is missing
    labels_B: Tensor  # int64
    flipped_B: Tensor  # bool
    unreadable: tuple[str, ...]  # one sentence per image

    def pixels_on(self, device: torch.device) -> Tensor:
        """The pixels, copied to the device without waiting for it and mirrored there."""
        pixels_BHWC = self.pixels_BHWC.to(device, non_blocking=True)
        return flip(pixels_BHWC, self.flipped_B.to(device, non_blocking=True))


class TrainingImages(Dataset[TrainingImage]):
    """The cropped image for (epoch, index); the pair seeds the crop, whichever worker loads it.

    Of several crops all but the first are mirrored here, each with a probability of a half.
    """

    def __init__(
        self, source: Source, size: int, config: RunConfig, classes: Sequence[str] = (), crops: int = 1
    ) -> None:
        self.source, self.size, self.min_crop, self.seed = source, size, config.min_crop, config.seed
        self.crops = crops
        number = {name: position for position, name in enumerate(classes)}
        self.labels = [number[label] for label in source.labels or ()] if classes else None

    def __len__(self) -> int:
        return len(self.source.keys)

    def __getitem__(self, pair: tuple[int, int]) -> TrainingImage:
        epoch, index = pair
        rng = random.Random(f"{self.seed}/{epoch}/{index}")  # noqa: S311 - augmentation, not secrets
        unreadable: list[str] = []
        for _ in range(ATTEMPTS):
            crops = [RandomCrop(self.size, self.min_crop, rng) for _ in range(self.crops)]
            try:
                image = decode(self.source.read(index), reduction=smallest_reduction(crops))
            except ImageError as error:
                unreadable.append(f"{self.source.keys[index]}: {error}")
                index = rng.randrange(len(self))
                continue
            label = self.labels[index] if self.labels else 0
            pixels, *others = (crop(image) for crop in crops)
            flipped = rng.random() < 0.5
            if others:
                pixels = np.concatenate([pixels, *(each[:, ::-1] if rng.random() < 0.5 else each for each in others)])
            return TrainingImage(pixels, label, flipped, tuple(unreadable))
        return TrainingImage(None, 0, False, tuple(unreadable))


def smallest_reduction(crops: Sequence[RandomCrop]) -> Callable[[int, int], int]:
    """For `decode`: by how much an image may shrink so that it is large enough for every crop."""
    return lambda width, height: min(crop.reduction(width, height) for crop in crops)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """(epoch, index) pairs of a process's batches; the order depends only on seed and epoch.

    A global batch is split over processes and accumulated parts so that images i and B - 1 - i, which are mixed, stay
    together: the parts' gradients add up to those of the whole batch.
    """

    def __init__(self, source: Source, config: RunConfig, rank: int = 0, processes: int = 1) -> None:
        config.part_size(processes)
        self.runs, self.seed, self.batch, self.accumulate = (
            source.runs,
            config.seed,
            config.batch_size,
            config.accumulate,
        )
        self.images = len(source.keys)
        self.rank, self.parts = rank, processes * config.accumulate
        self.epoch = 0
        self.start = 0  # steps of the epoch to skip when a run resumes within it
        self.steps = self.images // self.batch  # per epoch; leftover images are dropped until the next one

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order(self.epoch)
        for step in range(self.start, self.steps):
            yield from self.step_parts(self.epoch, step, order)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def order(self, epoch: int) -> list[int]:
        """All image indices in the order of an epoch."""
        return shuffled(self.runs, torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))

    def step_parts(self, epoch: int, step: int, order: list[int] | None = None) -> list[list[tuple[int, int]]]:
        """(epoch, index) pairs of this process's parts of one step of the epoch; `order` saves drawing it again."""
        batch = (order or self.order(epoch))[step * self.batch : (step + 1) * self.batch]
        first = self.rank * self.accumulate
        return [
            [(epoch, index) for index in mirrored(batch, first + part, self.parts)] for part in range(self.accumulate)
        ]


def shuffled(runs: Sequence[range], generator: torch.Generator) -> list[int]:
    """A random order with at most WINDOW runs open at a time; with one run (a folder) every order is possible."""
    order: list[int] = []
    runs = (
        [runs[number] for number in torch.randperm(len(runs), generator=generator).tolist()] if len(runs) > 1 else runs
    )
    for first in range(0, len(runs), WINDOW):
        indices = [index for run in runs[first : first + WINDOW] for index in run]
        order += [indices[position] for position in torch.randperm(len(indices), generator=generator).tolist()]
    return order


def mirrored(batch: list[int], part: int, parts: int) -> list[int]:
    """The part's slice of the first half of the batch and the mirrored slice of the second half."""
    half = len(batch) // parts // 2
    if len(batch) // parts % 2:  # possible in fine-tuning only
        return batch[part::parts]
    end = len(batch) - part * half
    return batch[part * half : (part + 1) * half] + batch[end - half : end]


def collate(items: list[TrainingImage]) -> Batch:
    """Stack the images; without pixels when one of them is missing."""
    images = [torch.from_numpy(item.pixels.copy()) for item in items if item.pixels is not None]
    complete = len(images) == len(items)
    return Batch(
        torch.stack(images) if complete else torch.empty(0, 0, 0, 3, dtype=torch.uint8),
        torch.tensor([item.label for item in items]),
        torch.tensor([item.flipped for item in items]),
        tuple(reason for item in items for reason in item.unreadable),
    )


def load_step(dataset: TrainingImages, sampler: StepSampler, step: int) -> tuple[list[Batch], list[str]]:
    """This process's batches of a step of the run, loaded again from their seeds, and the keys of their images."""
    parts = sampler.step_parts(*divmod(step, sampler.steps))
    keys = [dataset.source.keys[index] for part in parts for _, index in part]
    return [collate([dataset[pair] for pair in part]) for part in parts], keys


def build_loader(
    dataset: TrainingImages, config: RunConfig, rank: int = 0, processes: int = 1
) -> tuple[DataLoader[Batch], StepSampler]:
    """A loader of this process's batches of one epoch; set `sampler.epoch` before iterating.

    Raises:
        DataError: when the source holds too few images for one batch.
        ConfigError: when the batch cannot be split over the processes.
        ResourceError: when there is too little shared memory for the workers.
    """
    if len(dataset) < config.batch_size:
        raise DataError(
            f"{dataset.source.name} holds {len(dataset)} images, fewer than a batch of {config.batch_size}: "
            "add images, or lower batch_size."
        )
    check_shared_memory(config, config.part_size(processes) * dataset.crops * 3 * dataset.size**2)
    sampler = StepSampler(dataset.source, config, rank, processes)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        prefetch_factor=AHEAD if config.workers else None,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return loader, sampler
