"""The `mixmim` command. Each body builds a config and calls one function; heavy imports live inside the bodies."""

from mixmim_serve.cli import bench, images, models, publish, training
from mixmim_serve.cli.common import app, main

__all__ = ["app", "bench", "images", "main", "models", "publish", "training"]
