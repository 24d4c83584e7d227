"""POST /v1/embeddings and GET /v1/models, for OpenAI's clients, unmodified.

`input` is an image as a data URI, or a list of them. Answers are base64 of little-endian float32 where the client asks
for it, as OpenAI's own does unless told otherwise.
"""

from __future__ import annotations

import base64
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mixmim_serve.service.encoding import json_response
from mixmim_serve.service.intake import inputs_of, media_type, parse_json
from mixmim_serve.service.problems import RequestError
from mixmim_serve.service.routes.images import each, runtime_of
from mixmim_serve.service.runtime import Runtime, require_runtime
from mixmim_serve.service.visit import visit_of

KEYS = ("input", "model", "encoding_format", "dimensions", "user")


async def embeddings(request: Request) -> Response:
    """One embedding an image; a bad image fails the request, as OpenAI's answers have no place for a single error."""
    runtime, visit = runtime_of(request), visit_of(request)
    if media_type(request) != "application/json":
        raise RequestError(415, "unsupported_body", "send JSON, as OpenAI's clients do; photos as files go to /embed.")
    asked = parse_json(await request.body())
    encoding = _check(asked, runtime)
    sent = inputs_of(asked.get("input"), runtime.settings.max_items)
    visit.bring(len(sent.images))
    results = await each(sent, lambda image: runtime.encode(image, ["embedding"], visit))
    data = []
    for index, result in enumerate(results):
        if isinstance(result, RequestError):
            raise result
        vector = result["embedding"]
        value = vector if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = runtime.bundle.arch.units * len(data)  # of the last stage, what is pooled
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "usage": usage} | runtime.about)


async def models(request: Request) -> Response:
    """The one model that is served."""
    return json_response({"object": "list", "data": [_model(require_runtime(request.app.state))]})


async def model(request: Request) -> Response:
    """The same, by its name."""
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
    }


def _check(asked: dict[str, Any], runtime: Runtime) -> str:
    """The encoding asked for, once everything else is found to be right."""
    for name in asked:
        if name not in KEYS:
            raise RequestError(400, "unknown_key", f"no parameter {name!r} here: it takes {', '.join(KEYS)}.", name)
    _check_name(asked.get("model"), runtime)
    size, wanted = runtime.bundle.arch.embedding_size, asked.get("dimensions")
    if wanted is not None and wanted != size:
        raise RequestError(400, "bad_option", f"embeddings have {size} dimensions and cannot be cut.", "dimensions")
    encoding = asked.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise RequestError(
            400, "bad_option", f"encoding_format must be float or base64, got {encoding!r}.", "encoding_format"
        )
    return str(encoding)


def _check_name(name: object, runtime: Runtime) -> None:
    if name not in (runtime.model_name, runtime.fingerprint):
        message = f"no model {name!r} here: {runtime.model_name!r} is served."
        raise RequestError(404, "model_not_found", message, "model")
