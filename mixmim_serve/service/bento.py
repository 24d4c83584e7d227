"""The BentoML service: packaging, lifecycle, health and metrics. The routes are in app.py.

BentoML's own inputs and batching are not used: they download URLs that clients send, and let one bad image fail its
neighbours (docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import warnings
from pathlib import Path

import bentoml

from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.engines import open_engine
from mixmim_serve.errors import MixMIMError
from mixmim_serve.service.app import Runtime, create_app
from mixmim_serve.service.launch import BUNDLE_VARIABLE, ENGINE_VARIABLE, SUPERVISOR_VARIABLE

app = create_app()

PR_SET_PDEATHSIG = 1  # prctl(2)


@bentoml.service(name="mixmim-serve", workers=1, traffic={"timeout": 60})
@bentoml.asgi_app(app, path="/")
class MixMIMService:
    """One bundle, one engine, one process."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # of odd files that decode all the same
        _end_with_server()
        try:
            self.runtime = load_runtime()
        except MixMIMError as error:
            _end_server(error)
            raise
        app.state.runtime = self.runtime
        _tune_garbage_collection()

    async def __is_ready__(self) -> bool:
        return getattr(app.state, "runtime", None) is self.runtime

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Let what is in flight finish."""
        app.state.runtime = None
        self.runtime.close()


def load_runtime() -> Runtime:
    """The bundle and engine that the environment names, warm.

    Raises:
        BundleError, EngineError: when they cannot serve.
    """
    bundle = Path(os.environ.get(BUNDLE_VARIABLE) or DEFAULT_BUNDLE)
    runtime = Runtime(open_engine(bundle, os.environ.get(ENGINE_VARIABLE) or "auto"))
    runtime.warm_up()
    return runtime


def _is_worker() -> bool:
    """Whether this process is a worker that `mixmim serve` started, and not a test or `bentoml serve`."""
    return os.environ.get(SUPERVISOR_VARIABLE) == str(os.getppid())


def _end_server(error: MixMIMError) -> None:
    """BentoML would start a worker that cannot load again and again; `mixmim serve` ends with the reason instead."""
    if _is_worker():
        sys.stderr.write(f"mixmim: {error}\n")
        os.kill(os.getppid(), signal.SIGTERM)


def _end_with_server() -> None:
    """Have Linux end this worker when its server is killed; it would keep the port and its memory for ever."""
    if _is_worker() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _tune_garbage_collection() -> None:
    """What lives now lives for ever: scanning it again and again took p99 from 67 to 266 ms (BentoML 1.4.39)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
