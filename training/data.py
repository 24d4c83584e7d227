"""A folder of images as batches of augmented uint8 pixels; unreadable images are dropped and named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.images import list_images
from mixmim_serve.preprocess import decode, read_limited
from training.augment import crop_and_flip
from training.config import PretrainConfig


@dataclass(frozen=True)
class Batch:
    """Augmented images and what could not be read."""

    pixels_BHWC: Tensor  # uint8
    unreadable: tuple[str, ...]  # one sentence an image


class PretrainingImages(Dataset["np.ndarray | str"]):
    """An image a path; the item is uint8 (size, size, 3), or the reason why there is none."""

    def __init__(self, paths: list[Path], size: int, config: PretrainConfig) -> None:
        self.paths, self.size, self.config = paths, size, config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray | str:
        """The image for (epoch, index): the pair seeds its augmentation, whichever worker draws it."""
        epoch, index = key
        try:
            image = decode(read_limited(self.paths[index]))
        except ImageError as error:
            return f"{self.paths[index]}: {error}"
        rng = random.Random(f"{self.config.seed}/{epoch}/{index}")  # noqa: S311 - augmentation, not secrets
        return crop_and_flip(image, self.size, self.config.min_crop, rng)


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs; the order depends on seed and epoch alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0
        self.start = 0  # images of the epoch to pass over, when a run is resumed within it

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        return iter([(self.epoch, index) for index in order[self.start :]])

    def __len__(self) -> int:
        return self.length


def collate(items: list[np.ndarray | str]) -> Batch:
    """Stack what could be read."""
    readable = [torch.from_numpy(item.copy()) for item in items if not isinstance(item, str)]
    pixels = torch.stack(readable) if readable else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    return Batch(pixels, tuple(item for item in items if isinstance(item, str)))


def build_loader(folder: Path, size: int, config: PretrainConfig) -> tuple[DataLoader[Batch], EpochSampler]:
    """Batches of one epoch at a time; set `sampler.epoch` before iterating.

    Raises:
        DataError: when the folder holds too few images for one batch.
    """
    paths = list_images(folder)
    if len(paths) < config.batch_size:
        raise DataError(f"{folder} holds {len(paths)} images, fewer than a batch of {config.batch_size}: add images.")
    sampler = EpochSampler(len(paths), config.seed)
    loader: DataLoader[Any] = DataLoader(
        PretrainingImages(paths, size, config),
        batch_size=config.batch_size,
        sampler=sampler,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        collate_fn=collate,
        drop_last=True,
    )
    return loader, sampler
