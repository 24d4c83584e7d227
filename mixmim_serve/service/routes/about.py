"""GET /model, the probes, /metrics, the OpenAPI document and a page to try it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response

from mixmim_serve.service.encoding import json_response
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.openapi import document
from mixmim_serve.service.problems import RequestError
from mixmim_serve.service.runtime import require_runtime

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
DOCS_ASSETS = {"/docs/swagger-ui.css": "text/css", "/docs/swagger-ui-bundle.js": "text/javascript"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mixmim-serve</title>
<link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="ui"><p>This page needs scripts; the same is in <a href="openapi.json">openapi.json</a>.</p></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true})</script>
</body></html>
"""


async def model(request: Request) -> Response:
    """What is served."""
    runtime = require_runtime(request.app.state)
    bundle = runtime.bundle
    return json_response(
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


async def livez(request: Request) -> Response:
    """200 as long as the event loop turns."""
    return PlainTextResponse("alive\n")


async def readyz(request: Request) -> Response:
    """200 when a golden photo through the queue and the engine gives torch's embedding, now or a second ago."""
    runtime = require_runtime(request.app.state)
    if not await runtime.is_well():
        raise RequestError(
            503, "not_well", "the engine does not give the right answer to a known photo: restart the server.",
            headers={"Retry-After": "5"},
        )  # fmt: skip
    return PlainTextResponse("ready\n")


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    found: Metrics = request.app.state.metrics
    return Response(found.text(), media_type=EXPOSITION)


async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    return json_response(document())


async def docs(request: Request) -> Response:
    """Swagger's page for the OpenAPI document."""
    return HTMLResponse(PAGE)


async def asset(request: Request) -> Response:
    """Swagger's files, of the copy that BentoML brings: nothing is fetched from elsewhere."""
    found = importlib.util.find_spec("bentoml")
    if found is None or found.origin is None:
        raise RequestError(404, "not_found", "this page needs BentoML, which is not installed: see /openapi.json.")
    path = Path(found.origin).parent / "_internal" / "server" / "static_content" / Path(request.url.path).name
    return FileResponse(path, media_type=DOCS_ASSETS[request.url.path])
