"""LitServe: batches of up to 32, an image waits 5 ms for others; decoded in threads, in the process of the engine.

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
    """One model."""

    def setup(self, device: str) -> None:
        """In the worker."""
        self.batches = Batches()

    def decode_request(self, request: Annotated[bytes, File(alias="image")]) -> bytes:  # type: ignore[override]
        """As it is: one call an image, so decoding is left to `batch`, which may use threads."""
        return request

    def batch(self, inputs: Sequence[bytes]) -> list[Any]:
        """Decoded side by side."""
        return list(self.batches.pool.map(self.batches.decode, inputs))

    def predict(self, x: list[Any]) -> NDArray[Any]:
        """(B, D)."""
        return self.batches.run(x)

    def unbatch(self, output: NDArray[Any]) -> list[Any]:
        """One row an image."""
        return list(output)

    def encode_response(self, output: NDArray[Any]) -> Response:
        """JSON."""
        return Response(answer(output), media_type="application/json")


if __name__ == "__main__":
    api = Embed(max_batch_size=MAX_BATCH, batch_timeout=WAIT, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120, fast_queue=True)
    server.run(host="127.0.0.1", port=port(), generate_client_file=False, log_level="warning", access_log=False)
