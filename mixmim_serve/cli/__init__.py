"""The `mixmim` command. Each body builds a configuration and calls one function; heavy imports stay inside."""

from mixmim_serve.cli import bench, features, heads, images, models, publish, training
from mixmim_serve.cli.common import app, main

__all__ = ["app", "bench", "features", "heads", "images", "main", "models", "publish", "training"]
