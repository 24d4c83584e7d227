"""What a network says of images, as arrays: evaluation preprocessing, no augmentation, split over the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.model import Encoder
from mixmim_serve.preprocess import normalize, preprocess
from mixmim_serve.signals import outlive_signals
from mixmim_serve.sources import Source
from training.distributed import World

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Outputs:
    """One row an image that could be read, in the source's order."""

    values_NX: Tensor  # float32, on the CPU: embeddings or logits
    indices_N: Tensor  # int64: positions in the source
    unreadable: tuple[str, ...]  # one sentence an image


class EvaluationImages(Dataset["tuple[int, np.ndarray | str]"]):
    """(index, normalised pixels (3, size, size)), or the reason why there are none."""

    def __init__(self, source: Source, preprocessing: Preprocessing, indices: range) -> None:
        self.source, self.preprocessing, self.indices = source, preprocessing, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, np.ndarray | str]:
        index = self.indices[position]
        try:
            return index, normalize(preprocess(self.source.read(index), self.preprocessing), self.preprocessing)
        except ImageError as error:
            return index, f"{self.source.keys[index]}: {error}"


def run_network(
    model: Encoder,
    source: Source,
    preprocessing: Preprocessing,
    world: World,
    *,
    logits: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = lambda _: None,
) -> Outputs:
    """Embeddings (N, D), or logits (N, C), of all images, in every process; float32 throughout.

    Raises:
        DataError: when no image could be read.
    """
    share = range(world.rank, len(source.keys), world.size)
    loader: DataLoader[Any] = DataLoader(
        EvaluationImages(source, preprocessing, share),
        batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=outlive_signals,
    )
    arch = model.arch
    size = arch.num_classes if logits else arch.embedding_size
    found: list[tuple[int, np.ndarray]] = []
    unreadable: list[str] = []
    parts = iter(loader)
    # Every process runs the same number of batches, empty ones too: a sharded network needs all of them each time.
    for _ in range(-(-len(range(0, len(source.keys), world.size)) // batch_size)):
        items: list[tuple[int, np.ndarray | str]] = next(parts, [])
        good = [(index, pixels) for index, pixels in items if not isinstance(pixels, str)]
        unreadable += [reason for _, reason in items if isinstance(reason, str)]
        pixels_BCHW = (
            np.stack([pixels for _, pixels in good]) if good else np.zeros((1, 3, *[arch.image_size] * 2), "f")
        )
        with torch.inference_mode():
            output = model(torch.from_numpy(pixels_BCHW).to(world.device))
        values = (output.logits_BC if logits else output.embedding_BD).float().cpu().numpy()
        found += [(index, value) for (index, _), value in zip(good, values, strict=False)]
        progress(len(items))
    found, unreadable = _gather(found, unreadable, world)
    if not found:
        raise DataError(f"none of the {len(source.keys)} images in {source.name} could be read: {unreadable[0]}")
    rows = np.stack([value for _, value in found]).reshape(len(found), size)
    return Outputs(torch.from_numpy(rows), torch.tensor([index for index, _ in found]), tuple(unreadable))


def _gather(
    found: list[tuple[int, np.ndarray]], unreadable: list[str], world: World
) -> tuple[list[tuple[int, np.ndarray]], list[str]]:
    """What all processes have, in the source's order."""
    if world.size > 1:
        shares: list[Any] = [None] * world.size
        dist.all_gather_object(shares, (found, unreadable))
        found = sorted((item for share in shares for item in share[0]), key=lambda item: item[0])
        unreadable = [reason for share in shares for reason in share[1]]
    return found, unreadable
