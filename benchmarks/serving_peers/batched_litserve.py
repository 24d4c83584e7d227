"""LitServe: batches of up to 32 images, collected for at most 5 ms, decoded in threads in the engine's process.

LitServe reads the annotation of `decode_request`, so annotations must not be strings here.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import litserve
from fastapi import File, Response
from numpy.typing import NDArray

from benchmarks.serving_peers.common import MAX_BATCH, Batches, answer, port

WAIT = 0.005  # seconds


class Embed(litserve.LitAPI):
    """The embedding service."""

    def setup(self, device: str) -> None:
        """Open the engine in the worker process."""
        self.batches = Batches()

    def decode_request(self, request: Annotated[bytes, File(alias="image")]) -> bytes:  # type: ignore[override]
        """The unchanged bytes: this runs once per image, so `batch` decodes, with threads."""
        return request

    def batch(self, inputs: Sequence[bytes]) -> list[Any]:
        """Decode the images in parallel."""
        return list(self.batches.pool.map(self.batches.decode, inputs))

    def predict(self, x: list[Any]) -> NDArray[Any]:
        """Embeddings (B, D)."""
        return self.batches.run(x)

    def unbatch(self, output: NDArray[Any]) -> list[Any]:
        """One row per image."""
        return list(output)

    def encode_response(self, output: NDArray[Any]) -> Response:
        """The JSON response."""
        return Response(answer(output), media_type="application/json")


if __name__ == "__main__":
    api = Embed(max_batch_size=MAX_BATCH, batch_timeout=WAIT, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120, fast_queue=True)
    server.run(host="127.0.0.1", port=port(), generate_client_file=False, log_level="warning", access_log=False)
