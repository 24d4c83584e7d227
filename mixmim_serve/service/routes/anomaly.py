"""POST /anomaly: how far images are from the normal ones that the bundle was calibrated on."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from mixmim_serve.anomaly.detector import Detector, Verdict
from mixmim_serve.anomaly.heatmap import overlay
from mixmim_serve.anomaly.photos import whole
from mixmim_serve.engines.base import Arrays
from mixmim_serve.panel import png
from mixmim_serve.preprocess import Pixels
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.options import OVERLAY, WITH_PLACES
from mixmim_serve.service.request import RequestContext, check_options, context_of
from mixmim_serve.service.responses import ImageResult, negotiate
from mixmim_serve.service.routes.images import feature_bytes, map_images, off_loop, respond, runtime_of
from mixmim_serve.service.runtime import Runtime
from mixmim_serve.service.uploads import read_images


@dataclass(frozen=True)
class Looked:
    """One image as the network saw it."""

    pixels: Pixels
    outputs: Arrays  # without the batch dimension


async def anomaly(request: Request) -> Response:
    """Score, percentile among normal photos, and whether an image is normal at the server's false-alarm rate.

    `map=true` adds the distance of each place, (rows, columns); `overlay=true` the image with its unusual places
    coloured, as a PNG data URI. With `Accept: image/png` the overlay of one image is the whole response.
    """
    runtime, context = runtime_of(request), context_of(request)
    detector = runtime.require_detector()
    check_options(request)
    with_map, with_overlay = WITH_PLACES.read(request), OVERLAY.read(request)
    format_ = negotiate(request, "json", "npz", "safetensors", "png")
    if with_overlay and format_.kind in ("npz", "safetensors"):
        message = "an overlay is a picture: accept application/json or image/png, or ask for map=true."
        raise RequestError(400, "bad_option", message, OVERLAY.name)
    uploads = await read_images(request, runtime.settings)
    if format_.kind == "png" and (count := len(uploads.images)) != 1:
        raise RequestError(400, "one_image", f"got {count} images, but a PNG shows one: accept JSON.", "input")
    context.reservation.hold(len(uploads.images) * feature_bytes(runtime, [detector.calibration.about.stage]))
    looked = await map_images(uploads, lambda image: _look(runtime, detector, image, context))
    began = time.perf_counter()
    if format_.kind == "png":
        return await _overlay_response(runtime, context, detector, looked[0])
    results = await off_loop(runtime, partial(_judge, detector, looked, with_map, with_overlay))
    context.record_stage("encode", time.perf_counter() - began)
    for result in results:
        if not isinstance(result, RequestError):
            runtime.metrics.anomalies.labels("normal" if result["normal"] else "abnormal").inc()
    return await respond(runtime, context, format_, results, uploads)


async def _look(runtime: Runtime, detector: Detector, image: bytes, context: RequestContext) -> Looked:
    """One pass of the network for embedding and patches of the whole image."""
    pixels = await runtime.decode(image, context, whole(runtime.bundle.description.preprocessing))
    return Looked(pixels, await runtime.run("encoder", {"pixels": pixels}, detector.outputs, context))


def _judge(
    detector: Detector, looked: Sequence[Looked | RequestError], with_map: bool, with_overlay: bool
) -> list[ImageResult]:
    """The result of each image; all good ones are compared with the normal ones at once."""
    good = [each for each in looked if isinstance(each, Looked)]
    verdicts = iter(_verdicts(detector, good))
    results: list[ImageResult] = []
    for each in looked:
        if isinstance(each, RequestError):
            results.append(each)
            continue
        verdict = next(verdicts)
        result: dict[str, Any] = {
            "score": verdict.score,
            "percentile": verdict.percentile,
            "normal": verdict.normal,
            "threshold": verdict.threshold,
        }
        if with_map:
            result["map"] = verdict.places
        if with_overlay:
            picture = base64.b64encode(_draw(detector, each, verdict)).decode()
            result["overlay"] = f"data:image/png;base64,{picture}"
        results.append(result)
    return results


def _verdicts(detector: Detector, looked: Sequence[Looked]) -> list[Verdict]:
    if not looked:
        return []
    return detector.verdicts({name: np.stack([each.outputs[name] for each in looked]) for name in detector.outputs})


def _draw(detector: Detector, looked: Looked, verdict: Verdict) -> bytes:
    return png(overlay(looked.pixels, verdict.places, detector.calibration.places))


async def _overlay_response(
    runtime: Runtime, context: RequestContext, detector: Detector, looked: Looked | RequestError
) -> Response:
    """The overlay of one image alone."""
    if isinstance(looked, RequestError):
        raise looked
    began = time.perf_counter()

    def make() -> tuple[Verdict, bytes]:
        (verdict,) = _verdicts(detector, [looked])
        return verdict, _draw(detector, looked, verdict)

    verdict, body = await off_loop(runtime, make)
    runtime.metrics.anomalies.labels("normal" if verdict.normal else "abnormal").inc()
    context.reservation.hold(len(body))
    context.record_stage("encode", time.perf_counter() - began)
    return Response(body, media_type="image/png")
