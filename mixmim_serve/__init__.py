"""mixmim-serve: MixMIM backbones, served. The names below need no torch."""

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
