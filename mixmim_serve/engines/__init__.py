"""Runtimes for bundles: arrays in, arrays out. Each is imported only when it is opened."""

from mixmim_serve.engines.base import Engine, engine_fingerprint, identity
from mixmim_serve.engines.opening import open_engine

__all__ = ["Engine", "engine_fingerprint", "identity", "open_engine"]
