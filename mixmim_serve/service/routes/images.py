"""POST /embed, /classify, /features, /score and /reconstruct.

Each route goes through the same steps: options, images, places, decoding, engine, answer. Options are checked before
the body is read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from mixmim_serve.bundle import STAGE_OUTPUTS
from mixmim_serve.engines.base import Arrays
from mixmim_serve.errors import ConfigError, ImageError
from mixmim_serve.panel import TILES, draw_panel, png
from mixmim_serve.preprocess import Pixels, normalize
from mixmim_serve.service import query
from mixmim_serve.service.answers import Form, Item, form_of, write
from mixmim_serve.service.encoding import npz_bytes, safetensors_bytes
from mixmim_serve.service.intake import Sent, read_images
from mixmim_serve.service.problems import RequestError, refused
from mixmim_serve.service.runtime import Runtime
from mixmim_serve.service.visit import Visit, visit_of
from mixmim_serve.tasks import (
    RECONSTRUCT_OUTPUTS,
    probabilities,
    random_mask,
    reconstruct_inputs,
    reconstructed,
    require_decoder,
    require_head,
    scoring_masks,
    top_classes,
    unit_errors,
)

BINARY = ("npy", "npz", "safetensors")
MAX_MASKS = 16  # pairs of masks for one score
LARGE = 2**20  # bytes of an answer above which it is written beside the event loop

Result = TypeVar("Result")


async def embed(request: Request) -> Response:
    """One vector an image: `embedding`, (D,); `normalize=true` gives it length 1."""
    runtime, visit = runtime_of(request), visit_of(request)
    query.only(request, "normalize", "dtype")
    form, unit = form_of(request, "json", *BINARY), query.switch(request, "normalize")
    sent = await read_images(request, runtime.settings)
    results = await each(sent, lambda image: runtime.encode(image, ["embedding"], visit))
    items = [of(result, partial(embedding, unit=unit)) for result in results]
    return await _written(runtime, visit, form, items, sent)


async def classify(request: Request) -> Response:
    """The `top` (5) most probable classes of each image; in the binary forms all `probabilities`, (classes,)."""
    runtime, visit = runtime_of(request), visit_of(request)
    require_head(runtime.bundle)
    query.only(request, "top", "dtype")
    top = query.number(request, "top", 5, 1, runtime.bundle.arch.num_classes)
    form = form_of(request, "json", *BINARY)
    sent = await read_images(request, runtime.settings)
    results = await each(sent, lambda image: runtime.encode(image, ["logits"], visit))

    def finish(outputs: Arrays) -> dict[str, Any]:
        if form.kind != "json":
            return {"probabilities": probabilities(outputs["logits"])}
        return {"classes": [dataclasses.asdict(guess) for guess in top_classes(runtime.bundle, outputs["logits"], top)]}

    return await _written(runtime, visit, form, [of(result, finish) for result in results], sent)


async def features(request: Request) -> Response:
    """Maps of the encoder's stages before pooling: `stages=stage4` (or several), as `layout=map` (D, H, W) or `tokens`.

    `tokens` is (H * W, D), row by row.
    """
    runtime, visit = runtime_of(request), visit_of(request)
    query.only(request, "stages", "layout", "dtype")
    stages = query.several(request, "stages", "stage4", STAGE_OUTPUTS)
    tokens = query.choice(request, "layout", "map", ("map", "tokens")) == "tokens"
    form = form_of(request, "npz", "safetensors", "json", *(["npy"] if len(stages) == 1 else []))
    sent = await read_images(request, runtime.settings)
    if visit.ticket:
        visit.ticket.hold(len(sent.images) * _feature_bytes(runtime, stages))
    results = await each(sent, lambda image: runtime.encode(image, stages, visit))

    def finish(outputs: Arrays) -> dict[str, Any]:
        return {name: _tokens(array) if tokens else array for name, array in outputs.items()}

    return await _written(runtime, visit, form, [of(result, finish) for result in results], sent)


async def score(request: Request) -> Response:
    """How unlike its training data an image is: the error of reconstructing what another photo covers of it.

    `masks` (2) pairs of masks, always the same, hide every unit so many times; `map=true` adds the error of each unit,
    (rows, columns). It is the loss of pretraining, so 0 is perfect, and with normalised targets 1 is a plain grey unit.
    """
    runtime, visit = runtime_of(request), visit_of(request)
    require_decoder(runtime.bundle)
    query.only(request, "masks", "map", "dtype")
    count, with_map = query.number(request, "masks", 2, 1, MAX_MASKS), query.switch(request, "map")
    form = form_of(request, "json", "npz", "safetensors")
    sent = await read_images(request, runtime.settings)
    results = await each(sent, lambda image: _unit_errors(runtime, image, count, visit))

    def finish(errors: NDArray[np.float32]) -> dict[str, Any]:
        return {"score": errors.mean(), **({"map": errors} if with_map else {})}

    return await _written(runtime, visit, form, [of(result, finish) for result in results], sent)


async def reconstruct(request: Request) -> Response:
    """Two images mixed and completed: a PNG panel, or the arrays as npz or safetensors.

    `seed` (0) and `ratio` (0.5) choose the units that image B covers.
    """
    runtime, visit = runtime_of(request), visit_of(request)
    require_decoder(runtime.bundle)
    query.only(request, "seed", "ratio")
    seed = query.number(request, "seed", 0, 0, 2**32 - 1)
    ratio = query.number(request, "ratio", 0.5, 0, 1)
    try:
        mask = random_mask(runtime.bundle.arch.units, ratio, seed)
    except ConfigError as error:
        raise RequestError(400, "bad_option", str(error), "ratio") from error
    form = form_of(request, "png", "npz", "safetensors")
    sent = await read_images(request, runtime.settings)
    if (count := len(sent.images)) != 2:
        raise RequestError(
            400,
            "two_images",
            f"got {count} images, need two: curl -F image=@a.jpg -F image=@b.jpg.",
            "input",
        )
    pixels = await each(sent, lambda image: runtime.decode(image, visit))
    image_a, image_b = map(_or_raise, pixels)
    inputs = reconstruct_inputs(image_a, image_b, mask)
    arrays = reconstructed(runtime.bundle, inputs, await runtime.run("reconstruct", inputs, RECONSTRUCT_OUTPUTS, visit))
    began = time.perf_counter()
    written = await _beside(runtime, partial(_reconstruction, runtime, form, arrays))
    visit.note("encode", time.perf_counter() - began)
    return Response(written, media_type=form.media_type)


def runtime_of(request: Request) -> Runtime:
    """The engine room of the server that a request came to."""
    runtime: Runtime = request.app.state.runtime
    return runtime


async def each(sent: Sent, work: Callable[[bytes], Coroutine[Any, Any, Result]]) -> list[Result | RequestError]:
    """The work on every image of a request, side by side; one that is refused is a result that says why.

    Raises:
        EngineError: when the engine fails on one; then the others are given up.
    """

    async def refusable(image: bytes | RequestError, param: str) -> Result | RequestError:
        if isinstance(image, RequestError):
            return image
        try:
            return await work(image)
        except ImageError as error:
            return refused(error, param)

    jobs = [refusable(image, f"input[{index}]") for index, image in enumerate(sent.images)]
    if len(jobs) == 1:
        return [await jobs[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def of(result: Result | RequestError, finish: Callable[[Result], dict[str, Any]]) -> Item:
    """A result made presentable; an image that was refused stays as it is."""
    return result if isinstance(result, RequestError) else finish(result)


async def _written(runtime: Runtime, visit: Visit, form: Form, items: list[Item], sent: Sent) -> Response:
    """The answer; the reason of each refused image is counted."""
    began = time.perf_counter()
    for item in items:
        if isinstance(item, RequestError) and not sent.alone:
            runtime.metrics.fail(item.code)
    size = sum(getattr(value, "nbytes", 0) for item in items if isinstance(item, dict) for value in item.values())
    make = partial(write, form, items, runtime.about, flat=sent.alone)
    response = await _beside(runtime, make) if size > LARGE else make()
    visit.note("encode", time.perf_counter() - began)
    return response


async def _beside(runtime: Runtime, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(runtime.decoders, work)


async def _unit_errors(runtime: Runtime, image: bytes, count: int, visit: Visit) -> NDArray[np.float32]:
    """Errors of each unit (rows, columns), averaged over the pairs of masks."""
    pixels = await runtime.decode(image, visit)
    preprocessing, decoder = runtime.bundle.description.preprocessing, runtime.bundle.arch.decoder
    assert decoder is not None  # noqa: S101 - `require_decoder`
    partner, masks = runtime.golden["reconstruct.image_b"][0], scoring_masks(runtime.bundle.arch.units, count)
    runs = [
        runtime.run("reconstruct", reconstruct_inputs(pixels, partner, mask), ["reconstruction_a"], visit)
        for mask in masks
    ]
    original, side = normalize(pixels, preprocessing), math.isqrt(masks.shape[1])
    errors = np.zeros((side, side), np.float32)
    for mask, outputs in zip(masks, await asyncio.gather(*runs), strict=True):
        found = unit_errors(original, outputs["reconstruction_a"], decoder.normalize_targets)
        errors += np.where(mask.reshape(side, side), found, 0) / count
    return errors


def embedding(outputs: Arrays, *, unit: bool) -> dict[str, NDArray[Any]]:
    """What the encoder gave, at length 1 if asked for."""
    vector = outputs["embedding"]
    return {"embedding": vector / max(float(np.linalg.norm(vector)), 1e-12) if unit else vector}


def _tokens(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """(D, H, W) to (H * W, D)."""
    return np.ascontiguousarray(features.reshape(len(features), -1).T)


def _feature_bytes(runtime: Runtime, stages: Sequence[str]) -> int:
    arch = runtime.bundle.arch
    shapes = dict(zip(STAGE_OUTPUTS, zip(arch.dims, arch.grids, strict=True), strict=True))
    numbers = sum(dim * grid**2 for dim, grid in (shapes[stage] for stage in stages))
    return 2 * 4 * numbers  # as the engine gives them, and as they are written


def _or_raise(pixels: Pixels | RequestError) -> Pixels:
    if isinstance(pixels, RequestError):
        raise pixels
    return pixels


def _reconstruction(runtime: Runtime, form: Form, arrays: Arrays) -> bytes:
    if form.kind == "npz":
        return npz_bytes(arrays, runtime.about)
    if form.kind == "safetensors":
        return safetensors_bytes(arrays, runtime.about)
    return png(draw_panel({name: arrays[name] for name in TILES}, runtime.bundle.description.preprocessing))
