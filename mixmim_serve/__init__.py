"""MixMIM backbones: pretrain, export, embed and serve. Importing these names does not load torch."""

from mixmim_serve.config import Architecture, DecoderConfig, Preprocessing, architecture, size_names
from mixmim_serve.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    ImageError,
    MixMIMError,
    ServerError,
)
from mixmim_serve.version import __version__

__all__ = [
    "Architecture",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DecoderConfig",
    "EngineError",
    "ImageError",
    "MixMIMError",
    "Preprocessing",
    "ServerError",
    "__version__",
    "architecture",
    "size_names",
]
