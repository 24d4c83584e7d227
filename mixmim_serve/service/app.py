"""The app: the route table, and what lies around all routes."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from mixmim_serve.service.auth import ApiKeys
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.middleware import RequestMiddleware, exception_handlers
from mixmim_serve.service.options import (
    DTYPE,
    FILE_NAME,
    HEAD,
    JOB_ID,
    JOB_LIMIT,
    JOB_STATES,
    LAYOUT,
    MASKS,
    NORMALIZE,
    OVERLAY,
    RATIO,
    RETRY_FAILED,
    SEED,
    SHOWN_JOB_ID,
    STAGES,
    TOP,
    WITH_MAP,
    WITH_PLACES,
)
from mixmim_serve.service.request import Admission, Endpoint
from mixmim_serve.service.routes import about, anomaly, images, jobs, openai, stream
from mixmim_serve.service.settings import Settings

EXPOSED_HEADERS = ["X-Request-Id", "Server-Timing", "Retry-After"]  # to pages of other origins

# The middleware, the metrics and the OpenAPI document read this table too.
ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("/embed", "POST", images.embed, (NORMALIZE, DTYPE), takes_place=True),
    Endpoint("/classify", "POST", images.classify, (HEAD, TOP, DTYPE), takes_place=True),
    Endpoint("/features", "POST", images.features, (STAGES, LAYOUT, DTYPE), takes_place=True),
    Endpoint("/score", "POST", images.score, (MASKS, WITH_MAP, DTYPE), takes_place=True),
    Endpoint("/anomaly", "POST", anomaly.anomaly, (WITH_PLACES, OVERLAY, DTYPE), takes_place=True),
    Endpoint("/reconstruct", "POST", images.reconstruct, (SEED, RATIO), takes_place=True),
    Endpoint("/embed/stream", "POST", stream.embed_stream, (NORMALIZE, DTYPE), streams=True, takes_place=True),
    Endpoint("/v1/embeddings", "POST", openai.embeddings, takes_place=True),
    Endpoint("/v1/models", "GET", openai.models),
    Endpoint("/v1/models/{name:path}", "GET", openai.model),
    Endpoint("/jobs", "POST", jobs.create, ()),
    Endpoint("/jobs", "GET", jobs.show, (SHOWN_JOB_ID, JOB_STATES, JOB_LIMIT)),
    Endpoint("/jobs", "DELETE", jobs.remove, (JOB_ID,)),
    Endpoint("/jobs/cancel", "POST", jobs.cancel, (JOB_ID,)),
    Endpoint("/jobs/resume", "POST", jobs.resume, (JOB_ID, RETRY_FAILED)),
    Endpoint("/jobs/file", "GET", jobs.file, (JOB_ID, FILE_NAME)),
    Endpoint("/model", "GET", about.model),
    Endpoint("/livez", "GET", about.livez, is_open=True),
    Endpoint("/healthz", "GET", about.livez, is_open=True),
    Endpoint("/readyz", "GET", about.readyz, is_open=True),
    Endpoint("/metrics", "GET", about.metrics, is_open=True),
    Endpoint("/openapi.json", "GET", about.openapi, is_open=True),
    Endpoint("/docs", "GET", about.docs, is_open=True),
    *(Endpoint(path, "GET", about.asset, is_open=True, is_documented=False) for path in about.DOCS_ASSETS),
    Endpoint("/", "GET", about.root, is_open=True, is_documented=False),
)


def create_app(settings: Settings | None = None) -> Starlette:
    """The app without an engine: set `app.state.runtime` before the first request.

    Raises:
        ConfigError: when the file of API keys cannot be read.
    """
    settings = settings or Settings()
    metrics, admission = Metrics(), _admission(settings)
    metrics.watch_admission(admission)
    keys = ApiKeys(settings.api_keys)
    app = Starlette(
        routes=[_route(endpoint) for endpoint in ENDPOINTS],
        middleware=[*_cors(settings), Middleware(RequestMiddleware, settings, metrics, keys, admission, ENDPOINTS)],
        exception_handlers=exception_handlers(),
    )
    app.state.settings, app.state.metrics, app.state.admission = settings, metrics, admission
    app.state.endpoints, app.state.keys = ENDPOINTS, keys
    app.state.runtime, app.state.jobs, app.state.draining = None, None, False
    return app


def _admission(settings: Settings) -> Admission:
    return Admission(
        settings.max_waiting,
        settings.max_held_bytes,
        min(settings.max_client_waiting, settings.max_waiting),
        settings.max_client_megapixels * 1e6,
    )


def _route(endpoint: Endpoint) -> Route:
    """Starlette's route; an ASGI app answers every method itself."""
    methods = None if endpoint.streams else [endpoint.method]
    return Route(endpoint.path, endpoint.handler, methods=methods)


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.cors:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    ]
