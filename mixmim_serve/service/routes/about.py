"""GET /model, the health probes, /metrics, the OpenAPI document and a page to try the routes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response

from mixmim_serve.config import size_name
from mixmim_serve.heads import MAIN
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.openapi.document import document
from mixmim_serve.service.responses import json_response
from mixmim_serve.service.runtime import require_runtime, unwell

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
DOCS_ASSETS = {"/docs/swagger-ui.css": "text/css", "/docs/swagger-ui-bundle.js": "text/javascript"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mixmim-serve</title>
<link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="ui"><p>This page needs JavaScript; the same is in <a href="openapi.json">openapi.json</a>.</p></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true})</script>
</body></html>
"""


async def model(request: Request) -> Response:
    """Name, description, heads, fingerprints, engine and outputs of the bundle that is served."""
    runtime = require_runtime(request.app.state)
    bundle, heads = runtime.bundle, runtime.heads
    return json_response(
        {
            **runtime.identity,
            "engine_fingerprint": runtime.fingerprint,  # as `fingerprint`
            "bundle": bundle.fingerprint,  # as `model_fingerprint`
            "size": size_name(bundle.arch),
            "engine": runtime.certificate.summary(),
            **bundle.description.to_dict(),
            "anomaly": runtime.detector.summary() if runtime.detector else None,
            "labels": list(bundle.description.labels if heads.default in ("", MAIN) else heads.choose().classes),
            "heads": heads.describe(),
            "embedding_size": bundle.arch.embedding_size,
            "outputs": {graph: list(outputs) for graph, outputs in bundle.graphs.items()},
        }
    )


async def livez(request: Request) -> Response:
    """200 as long as the event loop runs."""
    return PlainTextResponse("alive\n")


async def readyz(request: Request) -> Response:
    """200 when a golden photo, sent through queue and engine within the last second, gave torch's embedding."""
    state = request.app.state
    state.keys.reload()
    if state.keys.problem:
        message = "the file of API keys is missing or invalid, so that no key is accepted; the server's log has more."
        raise RequestError(503, "no_keys", message, headers={"Retry-After": "5"})
    if not await require_runtime(state).is_healthy():
        raise unwell()
    return PlainTextResponse("ready\n")


async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    registry: Metrics = request.app.state.metrics
    return Response(registry.exposition(), media_type=EXPOSITION)


async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    return json_response(document(request.app.state.endpoints))


async def root(request: Request) -> Response:
    """Send a browser to the documentation."""
    return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")


async def docs(request: Request) -> Response:
    """Swagger UI for the OpenAPI document."""
    return HTMLResponse(PAGE)


async def asset(request: Request) -> Response:
    """Swagger UI's files, from the copy inside BentoML: the page fetches nothing from elsewhere."""
    spec = importlib.util.find_spec("bentoml")
    if spec is None or spec.origin is None:
        raise RequestError(404, "not_found", "this page needs BentoML, which is not installed: see /openapi.json.")
    path = Path(spec.origin).parent / "_internal" / "server" / "static_content" / Path(request.url.path).name
    return FileResponse(path, media_type=DOCS_ASSETS[request.url.path])
