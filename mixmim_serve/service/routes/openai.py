"""POST /v1/embeddings and GET /v1/models, for unmodified OpenAI clients.

`input` is an image as a data URI, or a list of them. Embeddings are base64 of little-endian float32 where the client
asks for it, as OpenAI's own client does by default.
"""

from __future__ import annotations

import base64
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mixmim_serve.errors import quoted
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.request import context_of
from mixmim_serve.service.responses import json_response
from mixmim_serve.service.routes.images import map_images, runtime_of
from mixmim_serve.service.runtime import Runtime, require_runtime
from mixmim_serve.service.uploads import decode_inputs, media_type, parse_json

KEYS = ("input", "model", "encoding_format", "dimensions", "user")


async def embeddings(request: Request) -> Response:
    """One embedding per image. A bad image fails the request: OpenAI's format has no place for its error."""
    runtime, context = runtime_of(request), context_of(request)
    if media_type(request) != "application/json":
        raise RequestError(415, "unsupported_body", "send JSON, as OpenAI's clients do; photos as files go to /embed.")
    body = parse_json(await request.body(), max_items=runtime.settings.max_items)
    encoding = _check_body(body, runtime)
    uploads = decode_inputs(body.get("input"), runtime.settings.max_items)
    context.expect_images(len(uploads.images))
    results = await map_images(uploads, lambda image: runtime.encode(image, ["embedding"], context))
    data = []
    for index, result in enumerate(results):
        if isinstance(result, RequestError):
            raise result
        vector = result["embedding"]
        value = vector if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = runtime.bundle.arch.units * len(data)  # of the last stage, which are pooled
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "usage": usage} | runtime.identity)


async def models(request: Request) -> Response:
    """A list of the one model that is served."""
    return json_response({"object": "list", "data": [_model(require_runtime(request.app.state))]})


async def model(request: Request) -> Response:
    """The model that is served, by its name."""
    runtime = require_runtime(request.app.state)
    _check_name(request.path_params["name"], runtime)
    return json_response(_model(runtime))


def _model(runtime: Runtime) -> dict[str, Any]:
    return {
        "id": runtime.model_name,
        "object": "model",
        "created": 0,  # a bundle does not say
        "owned_by": "mixmim-serve",
        "fingerprint": runtime.fingerprint,
        "model_fingerprint": runtime.bundle.fingerprint,
    }


def _check_body(body: dict[str, Any], runtime: Runtime) -> str:
    """The requested encoding, after a check of all parameters but `input`."""
    for name in body:
        if name not in KEYS:
            message = f"unknown parameter {quoted(name)}: the body takes {', '.join(KEYS)}."
            raise RequestError(400, "unknown_key", message, name)
    _check_name(body.get("model"), runtime)
    size, dimensions = runtime.bundle.arch.embedding_size, body.get("dimensions")
    if dimensions is not None and dimensions != size:
        message = f"embeddings have {size} dimensions and cannot be shortened: ask for {size}, or leave it out."
        raise RequestError(400, "bad_option", message, "dimensions")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        message = f"encoding_format must be float or base64, got {quoted(encoding)}."
        raise RequestError(400, "bad_option", message, "encoding_format")
    return str(encoding)


def _check_name(name: object, runtime: Runtime) -> None:
    if name is not None and not isinstance(name, str):
        raise RequestError(400, "bad_option", f"model must be a string, got {quoted(name)}.", "model")
    if name not in runtime.identity.values():
        message = f"unknown model {quoted(name)}: this server has {runtime.model_name!r}."
        raise RequestError(404, "model_not_found", message, "model")
