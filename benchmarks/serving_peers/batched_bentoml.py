"""BentoML's batching: up to 32 images, with a maximum latency so high that it rejects no request."""

from __future__ import annotations

from typing import Any

import bentoml
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.serving_peers.common import MAX_BATCH, Batches
from mixmim_serve.preprocess import Pixels, resize_and_crop


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 1024}, metrics={"enabled": False})
class Embed:
    """The embedding service."""

    def __init__(self) -> None:
        self.batches = Batches()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def embed(self, image: list[Image.Image]) -> NDArray[Any]:
        """Embeddings (B, D); BentoML opens the images, their pixels are decoded here."""
        return self.batches.run(list(self.batches.pool.map(self._pixels, image)))

    def _pixels(self, image: Image.Image) -> Pixels:
        preprocessing = self.batches.engine.bundle.description.preprocessing
        return np.asarray(resize_and_crop(image.convert("RGB"), preprocessing))
