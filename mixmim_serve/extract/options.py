"""What a run of extraction is told: `Options` decide the numbers and files and are recorded, `Resources` only how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mixmim_serve.bundle import Bundle
from mixmim_serve.errors import ConfigError, quoted
from mixmim_serve.extract.pipeline import BATCH

FORMATS = ("parquet", "npy", "lance")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Options:
    """Two runs with equal options, source and fingerprint write the same bytes."""

    features: tuple[str, ...] = ()  # outputs of the encoder besides the embedding: stage1..stage4, logits
    format: str = "parquet"
    dtype: str = "float32"  # in which embedding and features are stored
    batch: int = BATCH  # images a call of the engine
    fast_jpeg: bool = False  # large JPEGs decoded at a fraction of their size
    images: int = 0  # a shard; 0: as `plan.images_a_shard` says

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}: choose one of {', '.join(FORMATS)}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown type {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        if self.batch < 1 or self.images < 0:
            raise ConfigError("a batch has 1 image at least, and a shard cannot have fewer than none.")

    def check(self, bundle: Bundle) -> None:
        """Check that the bundle gives what is asked for.

        Raises:
            ConfigError: for a feature that it does not have, listing those it has.
        """
        known = [name for name in bundle.graphs["encoder"] if name != "embedding"]
        for name in self.features:
            if name not in known:
                raise ConfigError(f"this model has no features named {quoted(name)}: choose among {', '.join(known)}.")
        if len(set(self.features)) < len(self.features):
            raise ConfigError("name each of the features once.")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self) | {"features": list(self.features)}


@dataclass(frozen=True)
class Resources:
    """How hard to try, and with what; nothing here changes a number."""

    max_failures: float = 0.1  # share of images that cannot be read; more stop the run
    threads: int = 0  # that decode, in each process; 0: one a core
    actors: int = 1  # of Ray, at most; Ray starts nodes for them where it may
    gpus: float = 0.0  # of one actor: 0.25 lets four share a device
    cpus: float = 1.0  # of one actor
    address: str = ""  # of the Ray cluster: auto, or ray://...; empty: this machine

    def __post_init__(self) -> None:
        if not 0 <= self.max_failures <= 1:
            raise ConfigError("max_failures is a share between 0 and 1.")
        if self.threads < 0 or self.actors < 1 or self.gpus < 0 or self.cpus < 0:
            raise ConfigError("threads, gpus and cpus cannot be negative, and there is one actor at least.")
