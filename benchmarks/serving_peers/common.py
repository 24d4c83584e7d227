"""The engine and decoding threads of every peer, configured by environment variables, as BentoML requires."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mixmim_serve.cores import usable_cores
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.preprocess import Pixels, preprocess

BUNDLE, ENGINE, PORT = "PEER_BUNDLE", "PEER_ENGINE", "PEER_PORT"  # environment variables
MAX_BATCH = 32


def engine() -> Engine:
    """Open the engine named in the environment."""
    return open_engine(Path(os.environ[BUNDLE]), os.environ[ENGINE])


def port() -> int:
    """The port to listen on."""
    return int(os.environ[PORT])


class Batches:
    """Image files to embeddings (B, D), decoded in parallel."""

    def __init__(self) -> None:
        self.engine = engine()
        self.decode = partial(preprocess, preprocessing=self.engine.bundle.description.preprocessing)
        self.pool = ThreadPoolExecutor(usable_cores())

    def embed(self, images: Sequence[bytes]) -> NDArray[Any]:
        """Embeddings of a batch of any size."""
        return self.run(list(self.pool.map(self.decode, images)))

    def run(self, pixels: Sequence[Pixels]) -> NDArray[Any]:
        """Embeddings of decoded images."""
        return self.engine.run("encoder", {"pixels": np.stack(pixels)}, ["embedding"])["embedding"]


def answer(embedding: NDArray[Any]) -> bytes:
    """The JSON response, as our server writes it."""
    return orjson.dumps({"embedding": embedding}, option=orjson.OPT_SERIALIZE_NUMPY)
