"""The app: routes, and what lies around all of them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route

from mixmim_serve.service.front import Front
from mixmim_serve.service.keys import Keys
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.problems import exception_handlers
from mixmim_serve.service.routes import about, images, jobs, openai, stream
from mixmim_serve.service.settings import Settings

EXPOSED = ["X-Request-Id", "Server-Timing", "Retry-After"]  # to pages of other origins


def create_app(settings: Settings | None = None) -> Starlette:
    """The app with no engine yet: give `app.state.runtime` one before the first request.

    Raises:
        ConfigError: when the file of API keys cannot be read.
    """
    settings = settings or Settings()
    routes = [*_post_routes(), *_get_routes(), *_job_routes()]
    paths = frozenset(route.path for route in routes if isinstance(route, Route))
    metrics = Metrics()
    around = [Middleware(Front, settings, metrics, Keys(settings.api_keys), paths)]
    if settings.cors:
        origins = list(settings.cors)
        around.insert(0, Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST", "DELETE"],
                                    allow_headers=["*"], expose_headers=EXPOSED))  # fmt: skip
    app = Starlette(routes=routes, middleware=around, exception_handlers=exception_handlers())
    app.state.settings, app.state.metrics = settings, metrics
    app.state.runtime, app.state.jobs, app.state.draining = None, None, False
    return app


def _post_routes() -> list[BaseRoute]:
    return [
        Route("/embed", images.embed, methods=["POST"]),
        Route("/embed/stream", stream.EmbedStream()),
        Route("/classify", images.classify, methods=["POST"]),
        Route("/features", images.features, methods=["POST"]),
        Route("/score", images.score, methods=["POST"]),
        Route("/reconstruct", images.reconstruct, methods=["POST"]),
        Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
    ]


def _get_routes() -> list[BaseRoute]:
    return [
        Route("/model", about.model),
        Route("/v1/models", openai.models),
        Route("/v1/models/{name:path}", openai.model),
        Route("/livez", about.livez),
        Route("/healthz", about.livez),
        Route("/readyz", about.readyz),
        Route("/metrics", about.metrics),
        Route("/openapi.json", about.openapi),
        Route("/docs", about.docs),
        *(Route(path, about.asset) for path in about.DOCS_ASSETS),
    ]


def _job_routes() -> list[BaseRoute]:
    return [
        Route("/jobs", jobs.create, methods=["POST"]),
        Route("/jobs", jobs.show),
        Route("/jobs", jobs.remove, methods=["DELETE"]),
        Route("/jobs/cancel", jobs.cancel, methods=["POST"]),
        Route("/jobs/resume", jobs.resume, methods=["POST"]),
        Route("/jobs/file", jobs.file),
    ]
