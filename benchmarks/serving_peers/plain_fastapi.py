"""FastAPI without batching: each request runs in its thread pool."""

from __future__ import annotations

from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, File, Response

from benchmarks.serving_peers.common import Batches, answer, port

batches = Batches()
app = FastAPI()


@app.post("/embed")
def embed(image: Annotated[bytes, File()]) -> Response:
    """Embed the file of a form."""
    return _answered(image)


@app.post("/raw")
def raw(image: Annotated[bytes, Body(media_type="image/jpeg")]) -> Response:
    """Embed the image in the body."""
    return _answered(image)


def _answered(image: bytes) -> Response:
    return Response(answer(batches.run([batches.decode(image)])[0]), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, port=port(), loop="uvloop", http="httptools", access_log=False, log_level="warning")
