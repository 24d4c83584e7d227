"""Settings of a run: `ExtractOptions` determine the output and are recorded, `Resources` do not affect it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmim_serve.bundle import STAGE_OUTPUTS, Bundle
from mixmim_serve.errors import ConfigError, quoted
from mixmim_serve.extract.pipeline import BATCH
from mixmim_serve.heads import MAIN, read_heads
from mixmim_serve.shipped import is_shipped

FORMATS = ("parquet", "npy", "lance")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ExtractOptions:
    """What to write. Runs with equal options, source and fingerprint write the same bytes."""

    features: tuple[str, ...] = ()  # encoder outputs besides the embedding: stage1..stage4, logits
    format: str = "parquet"
    dtype: str = "float32"  # of the stored embedding and features
    batch: int = BATCH  # images per call of the engine
    fast_jpeg: bool = False  # decode large JPEGs at a fraction of their size
    images: int = 0  # per shard; 0: `plan.images_per_shard`
    classes: bool | None = None  # the most probable class and its probability; None: see `decided`
    head: str = ""  # that classes and logits are from; empty: the default one

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}: choose one of {', '.join(FORMATS)}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown type {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        if self.batch < 1 or self.images < 0:
            raise ConfigError("batch must be at least 1, and images per shard at least 1, or 0 for the default.")

    def check(self, bundle: Bundle) -> None:
        """Check that the bundle has the features, and the head for classes.

        Raises:
            ConfigError: for a feature or head that it lacks, listing those it has.
        """
        heads = read_heads(bundle)
        if (self.classes or self.head) and not heads.by_name:
            raise ConfigError("this model has no classification head: extract without classes.")
        if self.head:
            heads.choose(self.head)
            if self.classes is False and "logits" not in self.features:
                raise ConfigError(f"the head {self.head} is chosen, but no classes or logits: leave one of them out.")
        available = [*STAGE_OUTPUTS, *(("logits",) if heads.by_name else ())]
        for name in self.features:
            if name not in available:
                raise ConfigError(f"this model has no features {quoted(name)}: choose among {', '.join(available)}.")
        if len(set(self.features)) < len(self.features):
            raise ConfigError("a feature is listed twice: list each one once.")

    def decided(self, bundle: Bundle, begun: Mapping[str, Any] | None = None) -> ExtractOptions:
        """The options with `classes` true or false: as given, else as in the options of a begun folder, else by model.

        `head` is then the name of one, or empty where neither classes nor logits are stored. The shipped model's
        classes mean nothing to other photos, so they have to be asked for, as has any head by its name; those of any
        other model with a head are written.
        """
        heads = read_heads(bundle)
        classes = self.classes
        if classes is None and self.head:
            classes = True
        if classes is None and begun is not None:
            classes = bool(begun.get("classes", True)) and bool(heads.by_name)
        if classes is None:
            classes = bool(heads.by_name) and not is_shipped(bundle)
        head = self.head or _begun_head(begun) or heads.default
        return dataclasses.replace(self, classes=classes, head=head if classes or "logits" in self.features else "")

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values, for the manifest."""
        return dataclasses.asdict(self) | {"features": list(self.features)}


def has_head(bundle: Bundle) -> bool:
    """Whether a head is inside the network. Folders of older versions then have classes; their manifests do not say."""
    return "logits" in bundle.graphs["encoder"]


def _begun_head(begun: Mapping[str, Any] | None) -> str:
    """The head of a begun folder; older versions knew only the one inside the network."""
    return "" if begun is None else str(begun.get("head", MAIN if begun.get("classes", True) else ""))


@dataclass(frozen=True)
class Resources:
    """Threads, workers and tolerance of a run; none of them changes the output."""

    max_failures: float = 0.1  # share of unreadable images above which the run stops
    threads: int = 0  # for decoding, per process; 0: one per usable core
    actors: int = 1  # of Ray, at most; a cluster that scales starts nodes for them
    gpus: float = 0.0  # per actor; with 0.25 four actors share a GPU
    cpus: float = 1.0  # per actor
    address: str = ""  # of the Ray cluster: auto or ray://...; empty: this machine

    def __post_init__(self) -> None:
        if not 0 <= self.max_failures <= 1:
            raise ConfigError(f"max_failures must be a share between 0 and 1, got {self.max_failures}.")
        if self.threads < 0 or self.actors < 1 or self.gpus < 0 or self.cpus < 0:
            raise ConfigError("threads, gpus and cpus must be 0 or more, and actors at least 1.")
