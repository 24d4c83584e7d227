"""Embeddings or logits of images as arrays: evaluation preprocessing, no augmentation, split over the processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.model import Encoder
from mixmim_serve.preprocess import normalize, preprocess
from mixmim_serve.signals import outlive_signals
from mixmim_serve.sources import Source
from training.distributed import World

OnImages = Callable[[int], None]  # called after each batch with its number of images
Pixels = NDArray[np.float32]  # normalised, (3, size, size)
Row = tuple[int, NDArray[np.float32], bytes]  # an image's index in the source, its output, SHA-256 of its file


@dataclass(frozen=True)
class Outputs:
    """One row per readable image, in the source's order."""

    values_NX: Tensor  # float32, on the CPU: embeddings or logits
    indices_N: Tensor  # int64: positions in the source
    unreadable: tuple[str, ...]  # one sentence per image
    hashes: tuple[bytes, ...]  # SHA-256 of each image's file


class EvaluationImages(Dataset["tuple[int, Pixels | str, bytes]"]):
    """(index, normalised pixels, SHA-256 of the file); a reason in place of the pixels for an unreadable image."""

    def __init__(self, source: Source, preprocessing: Preprocessing, indices: range) -> None:
        self.source, self.preprocessing, self.indices = source, preprocessing, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Pixels | str, bytes]:
        index = self.indices[position]
        try:
            data = self.source.read(index)
            pixels = normalize(preprocess(data, self.preprocessing), self.preprocessing)
        except ImageError as error:
            return index, f"{self.source.keys[index]}: {error}", b""
        return index, pixels, hashlib.sha256(data).digest()


def run_network(
    model: Encoder,
    source: Source,
    preprocessing: Preprocessing,
    world: World,
    *,
    logits: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    progress: OnImages = lambda _: None,
) -> Outputs:
    """Embeddings (N, D), or logits (N, C), of all images, in every process; float32 throughout.

    Raises:
        DataError: when no image is readable.
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
    rows: list[Row] = []
    unreadable: list[str] = []
    batches = iter(loader)
    # Every process runs the same number of batches, empty ones too: a sharded network needs all processes each time.
    for _ in range(-(-len(range(0, len(source.keys), world.size)) // batch_size)):
        items: list[tuple[int, Pixels | str, bytes]] = next(batches, [])
        readable = [(index, pixels, digest) for index, pixels, digest in items if not isinstance(pixels, str)]
        unreadable += [reason for _, reason, _ in items if isinstance(reason, str)]
        empty = np.zeros((1, 3, arch.image_size, arch.image_size), np.float32)
        pixels_BCHW = np.stack([pixels for _, pixels, _ in readable]) if readable else empty
        with torch.inference_mode():
            output = model(torch.from_numpy(pixels_BCHW).to(world.device))
        values_BX = (output.logits_BC if logits else output.embedding_BD).float().cpu().numpy()
        rows += [(index, values, digest) for (index, _, digest), values in zip(readable, values_BX, strict=False)]
        progress(len(items))
    rows, unreadable = _gather(rows, unreadable, world)
    if not rows:
        raise DataError(f"none of the {len(source.keys)} images in {source.name} could be read: {unreadable[0]}")
    size = arch.num_classes if logits else arch.embedding_size
    values_NX = np.stack([values for _, values, _ in rows]).reshape(len(rows), size)
    indices_N = torch.tensor([index for index, _, _ in rows])
    return Outputs(torch.from_numpy(values_NX), indices_N, tuple(unreadable), tuple(digest for *_, digest in rows))


def _gather(rows: list[Row], unreadable: list[str], world: World) -> tuple[list[Row], list[str]]:
    """The rows and reasons of all processes, the rows in the source's order."""
    if world.size > 1:
        shares: list[Any] = [None] * world.size
        dist.all_gather_object(shares, (rows, unreadable))
        rows = sorted((row for share in shares for row in share[0]), key=lambda row: row[0])
        unreadable = [reason for share in shares for reason in share[1]]
    return rows, unreadable
