"""What a pretraining run's embeddings of some fixed photos look like: measures without labels, k-NN, neighbours.

Nothing here draws from torch's generators, and the photos are decoded once: each further measurement costs one forward
pass over them. They are kept as uint8 pixels: 49 KB each at 128 px, 151 KB at 224 px.

Shape suffixes:
    N photos   D dimensions of an embedding   Q queries   K neighbours   C classes
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mixmim_serve.config import Preprocessing
from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ImageError
from mixmim_serve.model import Encoder
from mixmim_serve.preprocess import Pixels, preprocess
from mixmim_serve.sources import Source
from training.evaluation.confusion import accuracy
from training.evaluation.knn import unit_length, vote
from training.evaluation.spectrum import spectrum

BATCH = 64  # photos in a forward pass
JUDGES = 10  # neighbours that vote for the class of a photo
PER_CLASS = 5  # photos of a class, on average, from which on folders are taken for classes
FOLDERS_KNN = f"folders_knn{JUDGES}_top1"
QUERIES, NEIGHBOURS = 8, 7  # rows and columns of the picture
TILE, GAP, FRAME = 80, 4, 3  # pixels
SAME, OTHER = "#2e7d32", "#c2410c"  # frames of neighbours of the photo's own class and of others


class Monitor:
    """Measures the embeddings of up to `photos` images, spread evenly over the source."""

    def __init__(self, source: Source, preprocessing: Preprocessing, photos: int) -> None:
        count = len(source.keys)
        photos = min(photos, count)
        self.source, self.preprocessing = source, preprocessing
        self.indices = [number * count // photos for number in range(photos)]  # in the source
        self.pixels_NHWC: Tensor | None = None  # uint8; read at the first measurement
        self.classes: tuple[str, ...] = ()  # () without labels that could be classes
        self.labels_N = torch.empty(0, dtype=torch.int64)
        self.unit_ND = torch.empty(0, 0)  # the last measurement's embeddings, of unit length
        self.epochs = -1  # when that was

    def measure(self, model: Encoder, normalize: nn.Module, device: torch.device, epochs: int) -> dict[str, float]:
        """The measures after `epochs` epochs, by name; {} with fewer than two readable photos, or for inf and NaN."""
        if self.pixels_NHWC is None:
            self.pixels_NHWC = self._read()
        if len(self.pixels_NHWC) < 2:
            return {}
        with torch.inference_mode():
            parts = [model(normalize(part.to(device))).embedding_BD for part in torch.split(self.pixels_NHWC, BATCH)]
        embeddings_ND = torch.cat(parts).float().cpu()
        if not embeddings_ND.isfinite().all():
            return {}  # the training says so itself, at the next gradient that is not finite
        self.unit_ND, self.epochs = unit_length(embeddings_ND), epochs
        measures = spectrum(embeddings_ND).metrics()
        return measures | ({FOLDERS_KNN: self._top1()} if self.classes else {})

    def neighbours(self, epochs: int) -> Image.Image | None:
        """Eight fixed photos, one per row, each followed by its seven nearest; None unless `epochs` was just measured.

        Where folders are classes, neighbours of the same class have a green frame, others an orange one.
        """
        if self.epochs != epochs or self.pixels_NHWC is None:
            return None
        count = len(self.unit_ND)
        rows = min(QUERIES, count)
        queries_Q = torch.arange(rows) * count // rows
        nearest_QK = self._cosines(queries_Q).topk(min(NEIGHBOURS, count - 1)).indices
        step = TILE + GAP
        picture = Image.new("RGB", ((nearest_QK.shape[1] + 1) * step + 3 * GAP, rows * step + GAP), "white")
        for row, (query, nearest_K) in enumerate(zip(queries_Q.tolist(), nearest_QK.tolist(), strict=True)):
            for column, number in enumerate((query, *nearest_K)):
                left = GAP + column * step + (2 * GAP if column else 0)
                tile = Image.fromarray(self.pixels_NHWC[number].numpy()).resize((TILE, TILE))
                if column and self.classes:
                    colour = SAME if self.labels_N[number] == self.labels_N[query] else OTHER
                    ImageDraw.Draw(tile).rectangle((0, 0, TILE - 1, TILE - 1), outline=colour, width=FRAME)
                picture.paste(tile, (left, GAP + row * step))
        return picture

    def _read(self) -> Tensor:
        """The readable photos, as the network sees them before normalisation: uint8 (N, size, size, 3)."""
        with ThreadPoolExecutor(usable_cores()) as pool:
            read = list(pool.map(self._pixels, self.indices))
        self.indices = [index for index, pixels in zip(self.indices, read, strict=True) if pixels is not None]
        if self.source.labels is not None:
            self.classes, self.labels_N = numbered([self.source.labels[index] for index in self.indices])
        size = self.preprocessing.image_size
        kept = [pixels for pixels in read if pixels is not None]
        return torch.from_numpy(np.stack(kept) if kept else np.empty((0, size, size, 3), np.uint8))

    def _pixels(self, index: int) -> Pixels | None:
        try:
            return preprocess(self.source.read(index), self.preprocessing)
        except ImageError:
            return None  # training names it in unreadable.txt

    def _cosines(self, rows_Q: Tensor) -> Tensor:
        """Cosines of these photos with all, (Q, N); with itself each has the lowest."""
        cosines_QN = self.unit_ND[rows_Q] @ self.unit_ND.T
        cosines_QN[torch.arange(len(rows_Q)), rows_Q] = -2.0
        return cosines_QN

    def _top1(self) -> float:
        """Top-1 in percent of the photos, each judged by its nearest others."""
        cosines_NN = self._cosines(torch.arange(len(self.unit_ND)))
        nearest = cosines_NN.topk(min(JUDGES, len(cosines_NN) - 1))
        scores_NC = vote(nearest.values, self.labels_N[nearest.indices], len(self.classes))
        return round(accuracy(scores_NC, self.labels_N).top1, 2)


def numbered(labels: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Class names and int64 labels; no names unless there are two classes with `PER_CLASS` photos each on average."""
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2 or len(labels) < PER_CLASS * len(classes):
        return (), torch.empty(0, dtype=torch.int64)
    number = {name: position for position, name in enumerate(classes)}
    return classes, torch.tensor([number[label] for label in labels])
