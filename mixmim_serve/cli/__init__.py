"""The `mixmim` command. Each body builds a configuration and calls one function; heavy imports stay inside."""

from mixmim_serve.cli import anomaly, bench, distill, features, heads, images, judging, models, publish, training
from mixmim_serve.cli.common import app, main

__all__ = [
    "anomaly",
    "app",
    "bench",
    "distill",
    "features",
    "heads",
    "images",
    "judging",
    "main",
    "models",
    "publish",
    "training",
]
