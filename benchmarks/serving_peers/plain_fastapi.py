"""FastAPI, one image at a time: a function in its pool of threads."""

from __future__ import annotations

from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, File, Response

from benchmarks.serving_peers.common import Batches, answer, port

batches = Batches()
app = FastAPI()


@app.post("/embed")
def embed(image: Annotated[bytes, File()]) -> Response:
    """A form with one file."""
    return _answered(image)


@app.post("/raw")
def raw(image: Annotated[bytes, Body(media_type="image/jpeg")]) -> Response:
    """An image as the body."""
    return _answered(image)


def _answered(image: bytes) -> Response:
    return Response(answer(batches.run([batches.decode(image)])[0]), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, port=port(), loop="uvloop", http="httptools", access_log=False, log_level="warning")
