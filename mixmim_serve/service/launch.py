"""Start the BentoML server in place of this process."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

from mixmim_serve.bundle import open_bundle
from mixmim_serve.config import size_name
from mixmim_serve.engines.base import check_kind
from mixmim_serve.errors import ConfigError

TARGET = "mixmim_serve.service.bento:MixMIMService"
BUNDLE_VARIABLE = "MIXMIM_BUNDLE"
ENGINE_VARIABLE = "MIXMIM_ENGINE"
SUPERVISOR_VARIABLE = "MIXMIM_SUPERVISOR"  # process id of the server that `mixmim serve` became
GRACE = 30  # seconds for requests in flight after SIGTERM


def launch(bundle: Path, host: str, port: int, engine: str) -> None:
    """Check what can be checked, say how to try it, then become `bentoml serve`.

    Raises:
        BundleError: when the bundle cannot be read, or was altered.
        ConfigError: when the address is taken or not ours.
        EngineError: for an unknown engine.
    """
    opened = open_bundle(bundle)
    opened.verify()  # the server does it again; here it is one sentence, there a traceback inside BentoML's log
    check_kind(engine)
    check_address(host, port)
    photo = "examples/hat.jpg" if Path("examples/hat.jpg").is_file() else "photo.jpg"
    print(  # noqa: T201
        f"serving {size_name(opened.arch)} from {bundle} at http://{host}:{port}\n"
        f"try: curl -F image=@{photo} http://{host}:{port}/embed",
        flush=True,
    )
    environment = os.environ | {
        BUNDLE_VARIABLE: str(bundle.resolve()),
        ENGINE_VARIABLE: engine,
        SUPERVISOR_VARIABLE: str(os.getpid()),  # exec keeps it
    }
    environment.setdefault("BENTOML_DO_NOT_TRACK", "true")  # "1" would not switch its telemetry off
    environment.setdefault("BENTOML_HOME", str(_cache() / f"bentoml-{port}"))  # one a server, or they share state
    command = [sys.executable, "-m", "bentoml", "serve", TARGET, "--host", host, "--port", str(port)]
    os.execve(sys.executable, [*command, "--timeout-graceful-shutdown", str(GRACE)], environment)  # noqa: S606


def check_address(host: str, port: int) -> None:
    """Bind once, because a server that dies later says it in a traceback.

    Raises:
        ConfigError: when the address cannot be bound.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use: choose another with --port.") from error
        raise ConfigError(f"cannot bind {host}:{port}: {error.strerror or error}.") from error


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixmim-serve"
