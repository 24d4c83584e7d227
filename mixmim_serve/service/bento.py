"""The BentoML service: what `bentoml build` packs and `bentoml serve` starts. The routes are those of app.py.

BentoML's own inputs, batching and metrics are not used: they download URLs that clients send, let one bad image fail
its neighbours, and create a time series for every path that a client requests (docs/decisions.md).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import bentoml

from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.service.app import create_app
from mixmim_serve.service.jobs.runner import JobRunner
from mixmim_serve.service.runtime import Runtime, open_runtime
from mixmim_serve.service.server import tune_allocation, tune_garbage_collection
from mixmim_serve.service.settings import from_environment

settings = from_environment()
app = create_app(settings)

BUNDLE_VARIABLE = "MIXMIM_BUNDLE"
ENGINE_VARIABLE = "MIXMIM_ENGINE"
BENTO_BUNDLE = Path(__file__).parents[2] / "bundle"  # where `bentoml build` may put a bundle of the user's own


@bentoml.service(
    name="mixmim-serve",
    workers=1,
    traffic={"timeout": settings.request_seconds + 5},
    metrics={"enabled": False},
)
@bentoml.asgi_app(app, path="/")
class MixMIMService:
    """One bundle, one engine, one process."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # about odd files that decode all the same
        self.runtime = load_runtime()
        app.state.runtime = self.runtime
        if settings.jobs_roots:
            app.state.jobs = JobRunner(settings, self.runtime.bundle, engine_kind())
            app.state.jobs.start(app.state.metrics)
        tune_garbage_collection()
        tune_allocation()

    async def __is_ready__(self) -> bool:
        return app.state.runtime is self.runtime and await self.runtime.is_healthy()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Finish the work in progress, then end."""
        app.state.runtime = None
        if app.state.jobs:
            app.state.jobs.close()
        self.runtime.close()


def load_runtime() -> Runtime:
    """The runtime of the bundle and engine that the environment names, warm.

    Raises:
        BundleError, EngineError: when they cannot serve.
    """
    named = os.environ.get(BUNDLE_VARIABLE)
    bundle = Path(named) if named else BENTO_BUNDLE if BENTO_BUNDLE.is_dir() else DEFAULT_BUNDLE
    return open_runtime(bundle, engine_kind(), settings, app.state.metrics)


def engine_kind() -> str:
    """The engine that the environment names."""
    return os.environ.get(ENGINE_VARIABLE) or "auto"
