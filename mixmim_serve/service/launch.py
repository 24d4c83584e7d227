"""Check what can be checked in one sentence, say how to try it, then serve."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from mixmim_serve.bundle import open_bundle
from mixmim_serve.config import size_name
from mixmim_serve.engines.opening import check_kind
from mixmim_serve.errors import ConfigError
from mixmim_serve.service.keys import VARIABLE as KEYS_VARIABLE
from mixmim_serve.service.settings import Settings

BUNDLE_VARIABLE = "MIXMIM_BUNDLE"  # for servers that `mixmim serve` does not start
ENGINE_VARIABLE = "MIXMIM_ENGINE"
LOCAL = ("127.0.0.1", "::1", "localhost")


def launch(path: Path, host: str, port: int, engine: str, settings: Settings) -> None:
    """Serve a bundle until a signal ends it.

    Raises:
        BundleError: when the bundle cannot be read, or was altered.
        ConfigError: when the address is taken or not ours, or the API keys cannot be read.
        EngineError: for an unknown engine, or one that cannot run the bundle.
    """
    bundle = open_bundle(path)
    check_kind(engine)
    with bind(host, port) as listener:
        from mixmim_serve.service.server import prepare, run

        app = prepare(bundle, engine, settings)
        photo = "examples/hat.jpg" if Path("examples/hat.jpg").is_file() else "photo.jpg"
        open_to_all = host not in LOCAL and not (settings.api_keys or os.environ.get(KEYS_VARIABLE))
        note = "\nanybody who reaches this address may use it: --api-keys FILE asks for a key" if open_to_all else ""
        if app.state.jobs:
            note += f"\njobs may read below {', '.join(settings.jobs_roots)}, and write to {app.state.jobs.folder}"
        print(  # noqa: T201
            f"serving {size_name(bundle.arch)} from {path} at http://{host}:{port}\n"
            f"try: curl -F image=@{photo} http://{host}:{port}/embed{note}",
            flush=True,
        )
        run(app, listener)


def bind(host: str, port: int) -> socket.socket:
    """The socket to listen on; it does not yet, so nobody is let in before the model is loaded.

    Raises:
        ConfigError: when the address cannot be bound.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use: choose another with --port.") from error
        raise ConfigError(f"cannot bind {host}:{port}: {error.strerror or error}.") from error
    return listener
