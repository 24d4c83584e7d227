"""What a pretraining run's embeddings look like without labels: measures of a fixed sample, and nearest neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import ImageError
from mixmim_serve.model import Encoder
from mixmim_serve.preprocess import preprocess
from mixmim_serve.sources import Source
from training.distributed import World
from training.evaluation.embed import Outputs, run_network
from training.evaluation.spectrum import spectrum

SAMPLE = 1024  # images, spread over the source
EVALUATIONS = 100  # in a run, at most: with few images an epoch takes seconds
QUERIES, NEIGHBOURS = 8, 7  # rows and columns of the picture
TILE, GAP = 80, 4  # pixels


@dataclass(frozen=True)
class Sample:
    """Every `step`-th image of a source, as a source."""

    source: Source
    step: int

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.source.name

    @property
    def keys(self) -> Sequence[str]:
        """See `Source`."""
        return self.source.keys[:: self.step]

    @property
    def labels(self) -> Sequence[str] | None:
        """See `Source`."""
        return None if self.source.labels is None else self.source.labels[:: self.step]

    @property
    def runs(self) -> Sequence[range]:
        """See `Source`."""
        return [range(len(self.keys))]

    @property
    def places(self) -> Iterable[str]:
        """See `Source`."""
        return self.source.places

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return self.source.read(index * self.step)

    def check(self, index: int) -> None:
        """See `Source`."""
        self.source.check(index * self.step)

    def digest(self) -> str:
        """See `Source`."""
        return hashlib.sha256(f"{self.step} {self.source.digest()}".encode()).hexdigest()


class Monitor:
    """Measures the embeddings of a sample of the training images, at most `EVALUATIONS` times in a run."""

    def __init__(self, source: Source, preprocessing: Preprocessing, epochs: int) -> None:
        self.sample = Sample(source, max(1, -(-len(source.keys) // SAMPLE)))
        self.preprocessing, self.epochs = preprocessing, epochs
        self.every = max(1, -(-epochs // EVALUATIONS))
        self.embeddings: Outputs | None = None  # of the last measurement

    def is_due(self, epochs: int) -> bool:
        """Whether to measure after this many epochs; always after the last."""
        return epochs % self.every == 0 or epochs == self.epochs

    def measure(self, model: Encoder, world: World, workers: int) -> dict[str, float]:
        """Effective rank, decay of the spectrum, dead channels and uniformity; {} for a single image."""
        self.embeddings = run_network(model, self.sample, self.preprocessing, world, workers=workers)
        values_ND = self.embeddings.values_NX
        return spectrum(values_ND).metrics() if len(values_ND) > 1 else {}

    def neighbours(self) -> Image.Image | None:
        """Eight fixed images, one per row, each followed by its seven nearest in the sample (cosine)."""
        if self.embeddings is None or len(self.embeddings.values_NX) < 2:
            return None
        unit_ND = F.normalize(self.embeddings.values_NX, dim=1)
        count = len(unit_ND)
        queries_Q = torch.arange(min(QUERIES, count)) * count // min(QUERIES, count)
        cosines_QN = unit_ND[queries_Q] @ unit_ND.T
        cosines_QN[torch.arange(len(queries_Q)), queries_Q] = 2.0  # the image itself comes first
        nearest_QK = cosines_QN.topk(min(NEIGHBOURS + 1, count)).indices
        rows, columns = nearest_QK.shape
        picture = Image.new("RGB", (columns * (TILE + GAP) + 2 * GAP, rows * (TILE + GAP) + GAP), "white")
        for row, indices_K in enumerate(self.embeddings.indices_N[nearest_QK].tolist()):
            for column, index in enumerate(indices_K):
                left = GAP + column * (TILE + GAP) + (GAP if column else 0)
                picture.paste(self._tile(index), (left, GAP + row * (TILE + GAP)))
        return picture

    def _tile(self, index: int) -> Image.Image:
        """The image as the network sees it, small; grey if it can no longer be read."""
        try:
            return Image.fromarray(preprocess(self.sample.read(index), self.preprocessing)).resize((TILE, TILE))
        except ImageError:
            return Image.new("RGB", (TILE, TILE), "lightgrey")
