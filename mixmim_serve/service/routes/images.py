"""POST /embed, /classify, /features, /score and /reconstruct.

Each route takes the same steps: options, images, places, decoding, engine, response. Options are checked before the
body is read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from mixmim_serve.bundle import STAGE_OUTPUTS
from mixmim_serve.engines.base import Arrays
from mixmim_serve.errors import ConfigError, ImageError, quoted
from mixmim_serve.heads import Head, Heads
from mixmim_serve.panel import TILES, draw_panel, png
from mixmim_serve.preprocess import Pixels
from mixmim_serve.service.errors import RequestError, image_refused
from mixmim_serve.service.options import HEAD, LAYOUT, MASKS, NORMALIZE, RATIO, SEED, STAGES, TOP, WITH_MAP
from mixmim_serve.service.request import RequestContext, check_options, context_of
from mixmim_serve.service.responses import (
    ImageResult,
    ResponseFormat,
    cast_floats,
    negotiate,
    npz_bytes,
    safetensors_bytes,
    write,
)
from mixmim_serve.service.runtime import Runtime
from mixmim_serve.service.uploads import Uploads, read_images
from mixmim_serve.tasks import (
    RECONSTRUCT_OUTPUTS,
    Floats,
    partner_of,
    probabilities,
    random_mask,
    reconstruct_inputs,
    reconstructed,
    require_decoder,
    score_map,
    scoring_masks,
    top_classes,
)

BINARY = ("npy", "npz", "safetensors")
LARGE_RESPONSE = 2**20  # bytes above which a response is written off the event loop

Result = TypeVar("Result")


async def embed(request: Request) -> Response:
    """One vector per image: `embedding`, (D,); `normalize=true` scales it to length 1."""
    runtime, context = runtime_of(request), context_of(request)
    check_options(request)
    format_, unit_length = negotiate(request, "json", *BINARY), NORMALIZE.read(request)
    uploads = await read_images(request, runtime.settings)
    outputs = await map_images(uploads, lambda image: runtime.encode(image, ["embedding"], context))
    results = [finish_result(output, partial(embedding, unit_length=unit_length)) for output in outputs]
    return await respond(runtime, context, format_, results, uploads)


async def classify(request: Request) -> Response:
    """The `top` (5) most probable classes of each image; in binary formats all `probabilities`, (classes,).

    `head` names one of the model's heads, in the URL or as a text field of the form.
    """
    runtime, context = runtime_of(request), context_of(request)
    runtime.heads.require()
    check_options(request)
    _chosen_head(request, runtime.heads)
    TOP.read(request, maximum=max(len(head.classes) for head in runtime.heads.by_name.values()))
    format_ = negotiate(request, "json", *BINARY)
    uploads = await read_images(request, runtime.settings, texts=(HEAD.name,))
    head = _chosen_head(request, runtime.heads, uploads.texts.get(HEAD.name, ""))
    top = TOP.read(request, maximum=len(head.classes))
    outputs = await map_images(uploads, lambda image: runtime.classify(image, head, context))

    def finish(logits: Floats) -> dict[str, Any]:
        if format_.kind != "json":
            return {"probabilities": probabilities(logits)}
        return {"classes": [dataclasses.asdict(guess) for guess in top_classes(head, logits, top)]}

    results = [finish_result(output, finish) for output in outputs]
    return await respond(runtime, context, format_, results, uploads, head.identity)


def _chosen_head(request: Request, heads: Heads, in_form: str = "") -> Head:
    """The head that a request asks for, in its URL or its form.

    Raises:
        RequestError: 400 for a name that is not among the heads, or two different ones.
    """
    name = HEAD.read(request)
    if name and in_form and name != in_form:
        raise HEAD.refuse(f"the same in the URL and the form ({quoted(name)} in the URL)", in_form)
    name = name or in_form
    if name and name not in heads.names:
        raise HEAD.refuse(f"one of {', '.join(heads.names)}", name)
    return heads.choose(name)


async def features(request: Request) -> Response:
    """Maps of the encoder's `stages` before pooling, as `layout=map` (D, H, W) or `layout=tokens` (H * W, D).

    Tokens are in row-major order.
    """
    runtime, context = runtime_of(request), context_of(request)
    check_options(request)
    stages = STAGES.read(request)
    as_tokens = LAYOUT.read(request) == "tokens"
    format_ = negotiate(request, "npz", "safetensors", "json", *(["npy"] if len(stages) == 1 else []))
    uploads = await read_images(request, runtime.settings)
    context.reservation.hold(len(uploads.images) * feature_bytes(runtime, stages))
    outputs = await map_images(uploads, lambda image: runtime.encode(image, stages, context))

    def finish(arrays: Arrays) -> dict[str, Any]:
        return {name: _tokens(array) if as_tokens else array for name, array in arrays.items()}

    return await respond(runtime, context, format_, [finish_result(output, finish) for output in outputs], uploads)


async def score(request: Request) -> Response:
    """How badly the network reconstructs an image: the error in the units that another photo covers.

    `masks` (2) pairs of masks, always the same, cover every unit so many times; `map=true` adds the error per unit,
    (rows, columns). The score is the pretraining loss: 0 is perfect, and with normalised targets 1 is a plain grey
    unit. A calibrated bundle adds `percentile`, the share of normal photos with a lower score.
    """
    runtime, context = runtime_of(request), context_of(request)
    require_decoder(runtime.bundle)
    check_options(request)
    count, with_map = MASKS.read(request), WITH_MAP.read(request)
    format_ = negotiate(request, "json", "npz", "safetensors")
    uploads = await read_images(request, runtime.settings)
    outputs = await map_images(uploads, lambda image: _unit_errors(runtime, image, count, context))

    def finish(errors: NDArray[np.float32]) -> dict[str, Any]:
        place = runtime.detector.reconstruction_percentile(errors.mean(), count) if runtime.detector else {}
        return {"score": errors.mean(), **place, **({"map": errors} if with_map else {})}

    return await respond(runtime, context, format_, [finish_result(output, finish) for output in outputs], uploads)


async def reconstruct(request: Request) -> Response:
    """Two images mixed and completed: a PNG panel, or the arrays as npz or safetensors.

    `seed` (0) and `ratio` (0.5) choose the units that image B covers.
    """
    runtime, context = runtime_of(request), context_of(request)
    require_decoder(runtime.bundle)
    check_options(request)
    seed, ratio = SEED.read(request), RATIO.read(request)
    try:
        mask = random_mask(runtime.bundle.arch.units, ratio, seed)
    except ConfigError as error:
        raise RequestError(400, "bad_option", str(error), "ratio") from error
    format_ = negotiate(request, "png", "npz", "safetensors")
    uploads = await read_images(request, runtime.settings)
    if (count := len(uploads.images)) != 2:
        message = f"got {count} images, need two: curl -F image=@a.jpg -F image=@b.jpg."
        raise RequestError(400, "two_images", message, "input")
    pixels = await map_images(uploads, lambda image: runtime.decode(image, context))
    image_a, image_b = map(_pixels_or_raise, pixels)
    inputs = reconstruct_inputs(image_a, image_b, mask)
    try:
        outputs = await runtime.run("reconstruct", inputs, RECONSTRUCT_OUTPUTS, context)
    except ImageError as error:
        raise image_refused(error, "input") from error
    arrays = reconstructed(runtime.bundle, inputs, outputs)
    began = time.perf_counter()
    body = await off_loop(runtime, partial(_reconstruction_bytes, runtime, format_, arrays))
    context.reservation.hold(len(body))
    context.record_stage("encode", time.perf_counter() - began)
    return Response(body, media_type=format_.media_type)


def runtime_of(request: Request) -> Runtime:
    """The runtime of the server that a request came to."""
    runtime: Runtime = request.app.state.runtime
    return runtime


async def map_images(
    uploads: Uploads, work: Callable[[bytes], Coroutine[Any, Any, Result]]
) -> list[Result | RequestError]:
    """Apply `work` to every image of a request concurrently; a refused image gives its error as the result.

    Raises:
        EngineError: when the engine fails on one; then the others are cancelled.
    """

    async def one(image: bytes | RequestError, param: str) -> Result | RequestError:
        if isinstance(image, RequestError):
            return image
        try:
            return await work(image)
        except ImageError as error:
            return image_refused(error, param)

    jobs = [one(image, f"input[{index}]") for index, image in enumerate(uploads.images)]
    if len(jobs) == 1:
        return [await jobs[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def finish_result(output: Result | RequestError, finish: Callable[[Result], dict[str, Any]]) -> ImageResult:
    """`finish` applied to what the engine gave for an image; the error of a refused image stays as it is."""
    return output if isinstance(output, RequestError) else finish(output)


async def respond(
    runtime: Runtime,
    context: RequestContext,
    format_: ResponseFormat,
    results: list[ImageResult],
    uploads: Uploads,
    about: Mapping[str, str] | None = None,
) -> Response:
    """Write the response, with what `about` adds to its identity, and count the reason of each refused image."""
    identity = runtime.identity | dict(about or {})
    began = time.perf_counter()
    arrays = [value for result in results if isinstance(result, dict) for value in result.values()]
    size = sum(getattr(array, "nbytes", 0) for array in arrays)

    def make() -> tuple[list[ImageResult], Response]:
        cast = [cast_floats(result, format_.dtype, f"input[{index}]") for index, result in enumerate(results)]
        return cast, write(format_, cast, identity, flat=uploads.alone)

    cast, response = await off_loop(runtime, make) if size > LARGE_RESPONSE else make()
    for result in cast:
        if isinstance(result, RequestError) and not uploads.alone:
            runtime.metrics.count_failure(result.code)
    context.reservation.hold(len(response.body))
    context.record_stage("encode", time.perf_counter() - began)
    return response


async def off_loop(runtime: Runtime, work: Callable[[], Result]) -> Result:
    """`work` in a thread that writes responses: numpy lets the event loop run meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(runtime.encode_thread, work)


async def _unit_errors(runtime: Runtime, image: bytes, count: int, context: RequestContext) -> NDArray[np.float32]:
    """Reconstruction error of each unit (rows, columns), averaged over the pairs of masks."""
    pixels = await runtime.decode(image, context)
    partner, masks = partner_of(runtime.golden), scoring_masks(runtime.bundle.arch.units, count)
    runs = [
        runtime.run("reconstruct", reconstruct_inputs(pixels, partner, mask), ["reconstruction_a"], context)
        for mask in masks
    ]
    completed = [outputs["reconstruction_a"] for outputs in await asyncio.gather(*runs)]
    return score_map(runtime.bundle, pixels, masks, completed)


def embedding(arrays: Arrays, *, unit_length: bool) -> dict[str, NDArray[Any]]:
    """The encoder's embedding (D,), scaled to length 1 if asked for."""
    vector = arrays["embedding"]
    return {"embedding": vector / max(float(np.linalg.norm(vector)), 1e-12) if unit_length else vector}


def _tokens(feature_map: NDArray[np.float32]) -> NDArray[np.float32]:
    """(D, H, W) to (H * W, D)."""
    return np.ascontiguousarray(feature_map.reshape(len(feature_map), -1).T)


def feature_bytes(runtime: Runtime, stages: Sequence[str]) -> int:
    """Bytes of one image's feature maps, as the engine gives them and once more as they are written."""
    arch = runtime.bundle.arch
    shapes = dict(zip(STAGE_OUTPUTS, zip(arch.dims, arch.grids, strict=True), strict=True))
    numbers = sum(dim * grid**2 for dim, grid in (shapes[stage] for stage in stages))
    return 2 * 4 * numbers


def _pixels_or_raise(pixels: Pixels | RequestError) -> Pixels:
    if isinstance(pixels, RequestError):
        raise pixels
    return pixels


def _reconstruction_bytes(runtime: Runtime, format_: ResponseFormat, arrays: Arrays) -> bytes:
    if format_.kind == "npz":
        return npz_bytes(arrays, runtime.identity)
    if format_.kind == "safetensors":
        return safetensors_bytes(arrays, runtime.identity)
    return png(draw_panel({name: arrays[name] for name in TILES}, runtime.bundle.description.preprocessing))
