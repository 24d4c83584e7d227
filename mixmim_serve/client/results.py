"""What the calls return. Each result says which model it is of; results of two fingerprints do not compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.tasks import Class

Floats = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What all results have."""

    model: str
    fingerprint: str  # of weights, preprocessing, runtime and precision


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding(Result):
    """One image as a vector."""

    vector: Floats  # (D,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes(Result):
    """What one image shows."""

    classes: tuple[Class, ...]  # best first


@dataclass(frozen=True, kw_only=True, eq=False)
class Features(Result):
    """The encoder's stages before pooling."""

    stages: Mapping[str, Floats]  # by name, (D, H, W), or (H * W, D) as tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Score(Result):
    """How unlike the model's training data an image is."""

    score: float  # 0 is perfect reconstruction
    map: Floats | None  # of each unit, (rows, columns), where it was asked for


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction(Result):
    """Two images, mixed and completed: normalised pixels (3, H, W), and which units of the mixture are of image B."""

    image_a: Floats
    image_b: Floats
    from_partner: NDArray[np.bool_]  # (units,)
    mixed: Floats
    reconstruction_a: Floats
    reconstruction_b: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInfo(Result):
    """What is served."""

    embedding_size: int
    labels: tuple[str, ...]  # empty without a head
    outputs: Mapping[str, tuple[str, ...]]  # by graph
    about: Mapping[str, Any]  # the whole answer of GET /model
