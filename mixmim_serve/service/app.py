"""The routes: POST /embed, /classify, /reconstruct and GET /model.

A request goes through four steps: read the images under limits, decode them in a pool, let the batcher run them,
encode the answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mixmim_serve.bundle import Bundle
from mixmim_serve.config import size_name
from mixmim_serve.engines import Engine, engine_fingerprint
from mixmim_serve.engines.base import Arrays
from mixmim_serve.engines.buckets import buckets_between
from mixmim_serve.engines.certificate import certify
from mixmim_serve.errors import ImageError
from mixmim_serve.panel import TILES, draw_panel, npz, png
from mixmim_serve.preprocess import Pixels, preprocess
from mixmim_serve.service.batcher import Batcher
from mixmim_serve.service.requests import LimitBody, RequestError, exception_handlers, query_number, read_images
from mixmim_serve.tasks import (
    RECONSTRUCT_OUTPUTS,
    random_mask,
    reconstruct_inputs,
    reconstructed,
    require_decoder,
    require_head,
    top_classes,
)

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 512  # images admitted at once, decoded or not; above it 429
DECODE_THREADS = 4
NPY = "application/x-npy"
NPZ = "application/x-npz"


class Runtime:
    """One engine with its batchers and the pool that decodes.

    Raises:
        EngineError: when the engine's numbers are wrong.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.certificate = certify(engine)
        self.certificate.require()
        self.fingerprint = engine_fingerprint(engine)
        self.decoders = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        self.engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.batchers = {graph: Batcher(engine, graph, self.engine_thread) for graph in engine.bundle.graphs}
        self.in_flight = 0

    @property
    def bundle(self) -> Bundle:
        """What is served."""
        return self.engine.bundle

    @property
    def model_name(self) -> str:
        """The size by name."""
        return size_name(self.bundle.arch)

    def warm_up(self) -> None:
        """Run each graph once, so that the first request waits for nothing.

        An engine with a largest batch prepares each bucket when it first meets it: it meets them now.

        Raises:
            EngineError: when the engine cannot answer.
        """
        size, units = self.bundle.arch.image_size, self.bundle.arch.units
        blank = np.zeros((1, size, size, 3), np.uint8)
        largest = self.batchers["encoder"].max_batch
        for batch in buckets_between(1, largest) if self.engine.max_batch else (1,):
            self.engine.run("encoder", {"pixels": blank.repeat(batch, axis=0)}, ["embedding"])
        if "reconstruct" in self.bundle.graphs:
            inputs = reconstruct_inputs(blank, blank, random_mask(units)[None])
            self.engine.run("reconstruct", inputs, RECONSTRUCT_OUTPUTS)

    async def preprocess(self, images: Sequence[bytes]) -> list[Pixels]:
        """Decode and preprocess in the pool, all at once.

        Raises:
            RequestError: for the first image that is refused, naming it.
        """
        loop = asyncio.get_running_loop()
        preprocessing = self.bundle.description.preprocessing
        jobs = [loop.run_in_executor(self.decoders, preprocess, image, preprocessing) for image in images]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        for number, result in enumerate(results):
            if isinstance(result, ImageError):
                log.info("refused image %d: %s (%r)", number, result, result.__cause__)
                raise RequestError(result.status, str(result), f"image[{number}]") from result
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def encode(self, images: Sequence[bytes], outputs: Sequence[str]) -> list[Arrays]:
        """Encoder outputs of each image, without the batch dimension."""
        pixels = await self.preprocess(images)
        batcher = self.batchers["encoder"]
        return await asyncio.gather(*(batcher.run({"pixels": image}, outputs) for image in pixels))

    def close(self) -> None:
        """End the threads; what runs is finished."""
        self.decoders.shutdown()
        self.engine_thread.shutdown()


class Admission:
    """Room for a request's images, refused before anything is decoded when there is none."""

    def __init__(self, runtime: Runtime, images: int) -> None:
        self.runtime, self.images = runtime, images

    def __enter__(self) -> None:
        if self.runtime.in_flight + self.images > MAX_IN_FLIGHT:
            raise RequestError(429, f"{self.runtime.in_flight} images are waiting already: try again in a second.")
        self.runtime.in_flight += self.images

    def __exit__(self, *_: object) -> None:
        self.runtime.in_flight -= self.images


def create_app() -> Starlette:
    """The routes, with no engine yet: give `app.state.runtime` one before the first request."""
    routes = [
        Route("/embed", embed, methods=["POST"]),
        Route("/classify", classify, methods=["POST"]),
        Route("/reconstruct", reconstruct, methods=["POST"]),
        Route("/model", model, methods=["GET"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(LimitBody)], exception_handlers=exception_handlers())


async def embed(request: Request) -> Response:
    """One vector an image: JSON, or float32 npy (images, D) by `Accept: application/x-npy`."""
    runtime = _runtime(request)
    images = await read_images(request)
    with Admission(runtime, len(images)):
        results = await runtime.encode(images, ["embedding"])
    vectors = np.stack([result["embedding"] for result in results])
    if NPY in request.headers.get("accept", ""):
        return Response(_npy(vectors), media_type=NPY)
    return _json(runtime, [{"embedding": vector.tolist()} for vector in vectors])


async def classify(request: Request) -> Response:
    """The `top` (5) most probable classes of each image."""
    runtime = _runtime(request)
    require_head(runtime.bundle)
    top = query_number(request, "top", 5, 1, runtime.bundle.arch.num_classes)
    images = await read_images(request)
    with Admission(runtime, len(images)):
        results = await runtime.encode(images, ["logits"])
    guesses = [top_classes(runtime.bundle, result["logits"], top) for result in results]
    return _json(runtime, [{"classes": [dataclasses.asdict(guess) for guess in one]} for one in guesses])


async def reconstruct(request: Request) -> Response:
    """Two images mixed and completed: a PNG panel, or the arrays by `Accept: application/x-npz`.

    `seed` (0) and `ratio` (0.5) choose the units that image B covers.
    """
    runtime = _runtime(request)
    require_decoder(runtime.bundle)
    seed = query_number(request, "seed", 0, 0, 2**32 - 1)
    mask = random_mask(runtime.bundle.arch.units, query_number(request, "ratio", 0.5, 0, 1), seed)
    images = await read_images(request)
    if len(images) != 2:
        raise RequestError(400, f"got {len(images)} images, need two: curl -F image=@a.jpg -F image=@b.jpg.", "image")
    with Admission(runtime, 2):
        image_a, image_b = await runtime.preprocess(images)
        inputs = reconstruct_inputs(image_a, image_b, mask)
        outputs = await runtime.batchers["reconstruct"].run(inputs, RECONSTRUCT_OUTPUTS)
        arrays = reconstructed(runtime.bundle, inputs, outputs)
        loop = asyncio.get_running_loop()
        if NPZ in request.headers.get("accept", ""):
            return Response(await loop.run_in_executor(runtime.decoders, npz, arrays), media_type=NPZ)
        return Response(
            await loop.run_in_executor(runtime.decoders, _panel_png, runtime, arrays), media_type="image/png"
        )


async def model(request: Request) -> Response:
    """What is served."""
    runtime = _runtime(request)
    bundle = runtime.bundle
    return JSONResponse(
        {
            "model": runtime.model_name,
            "fingerprint": runtime.fingerprint,
            "bundle": bundle.fingerprint,
            "engine": runtime.certificate.summary(),
            **bundle.description.to_dict(),
            "embedding_size": bundle.arch.embedding_size,
            "outputs": {graph: list(outputs) for graph, outputs in bundle.graphs.items()},
        }
    )


def _runtime(request: Request) -> Runtime:
    runtime: Runtime | None = getattr(request.app.state, "runtime", None)
    if runtime is None:
        raise RequestError(503, "the engine is still loading: try again in a second.")
    return runtime


def _json(runtime: Runtime, items: list[dict[str, Any]]) -> JSONResponse:
    """One image answers flat, several under `data`."""
    about = {"model": runtime.model_name, "fingerprint": runtime.fingerprint}
    if len(items) == 1:
        return JSONResponse(items[0] | about)
    return JSONResponse({"data": [{"index": index, **item} for index, item in enumerate(items)]} | about)


def _npy(array: NDArray[Any]) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _panel_png(runtime: Runtime, arrays: Arrays) -> bytes:
    return png(draw_panel({name: arrays[name] for name in TILES}, runtime.bundle.description.preprocessing))
