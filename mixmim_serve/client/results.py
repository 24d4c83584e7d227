"""What the calls return. Each result names its model; results with different engine fingerprints do not compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.tasks import Class

Floats = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """Base class of all results."""

    model: str  # the bundle's name
    fingerprint: str  # the engine fingerprint: of weights, preprocessing, runtime and precision
    model_fingerprint: str = ""  # of weights and preprocessing alone; empty from an older server


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding(Result):
    """The embedding of one image."""

    vector: Floats  # (D,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes(Result):
    """The most probable classes of one image."""

    classes: tuple[Class, ...]  # best first
    head: str | None = None  # that answered; None for the one inside the network


@dataclass(frozen=True, kw_only=True, eq=False)
class Features(Result):
    """Dense features of one image, before pooling."""

    stages: Mapping[str, Floats]  # by name, (D, H, W), or (H * W, D) with layout "tokens"


@dataclass(frozen=True, kw_only=True, eq=False)
class Score(Result):
    """How badly the network reconstructs one image, which says little about whether it is unusual."""

    score: float  # 0 is perfect reconstruction
    map: Floats | None  # of each unit, (rows, columns), if requested
    percentile: float | None = None  # share of normal photos with a lower score, if the bundle is calibrated


@dataclass(frozen=True, kw_only=True, eq=False)
class Anomaly(Result):
    """How far one image is from the normal ones that the bundle was calibrated on."""

    score: float  # 0 is the median normal photo; five in six normal photos are below about 1
    percentile: float  # share of normal photos with a lower score, in percent
    normal: bool  # whether the score is at most the threshold
    threshold: float  # for the server's rate of false alarms
    map: Floats | None  # distance of each place from normal ones, (rows, columns), if requested
    overlay: bytes | None  # the image with its unusual places coloured, as PNG, if requested


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction(Result):
    """Two images, mixed and completed, as normalised pixels (3, H, W)."""

    image_a: Floats
    image_b: Floats
    from_partner: NDArray[np.bool_]  # (units,), True where the mixed image shows image B
    mixed: Floats
    reconstruction_a: Floats
    reconstruction_b: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInfo(Result):
    """The served model."""

    embedding_size: int
    labels: tuple[str, ...]  # of the default head; empty without a head
    outputs: Mapping[str, tuple[str, ...]]  # by graph
    about: Mapping[str, Any]  # the complete response of GET /model
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # classes by head; empty from an older server
