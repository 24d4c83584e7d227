"""Runtimes that run a bundle: arrays in, arrays out. Each is imported only when it is opened."""

from mixmim_serve.engines.base import Engine, open_engine

__all__ = ["Engine", "open_engine"]
