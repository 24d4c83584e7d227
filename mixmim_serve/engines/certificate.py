"""Certificates: how closely an engine, on this machine, agrees with torch. Only engines that agree may serve.

The bundle's golden photos run through the loaded engine. The result is kept in the bundle's folder, one file per
engine, precision, runtime version and hardware, so that it is measured once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mixmim_serve.bundle import GOLDEN, Bundle
from mixmim_serve.engines.base import Arrays, Engine, graph_inputs
from mixmim_serve.errors import EngineError
from mixmim_serve.files import atomic_path
from mixmim_serve.strict_json import read_json

FOLDER = "certificates"  # in the bundle


@dataclass(frozen=True)
class Tolerance:
    """How far an output may deviate from torch in float32."""

    cosine: float  # of each row, at least
    error: float  # largest difference as a share of the output's largest absolute value, at most


# Measured figures: docs/engines.md. float32 differs only by the order of sums, a wrong constant or operator by 1e-2 or
# more. Half precision rounds each product: to 11 bits in fp16, 8 in bf16.
TOLERANCES = {
    "fp32": Tolerance(0.999999, 1e-4),
    "fp16": Tolerance(0.9999, 1e-2),
    "bf16": Tolerance(0.999, 6e-2),
}


@dataclass(frozen=True)
class Agreement:
    """How closely one output agrees with its golden array."""

    cosine: float  # lowest of all rows
    error: float  # as in `Tolerance`

    def within(self, tolerance: Tolerance) -> bool:
        """Whether both figures are within the tolerance; False for NaN."""
        return self.cosine >= tolerance.cosine and self.error <= tolerance.error


@dataclass(frozen=True)
class Certificate:
    """The agreement of one engine with the golden arrays, by output."""

    engine: str
    precision: str
    version: str
    hardware: str
    fingerprint: str  # of the bundle
    golden: str  # sha256 of the golden arrays
    content: str  # `Bundle.content`: another graph or file of weights needs another certificate
    outputs: Mapping[str, Agreement]

    @property
    def holds(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(agreement.within(TOLERANCES[self.precision]) for agreement in self.outputs.values())

    @property
    def cosine(self) -> float:
        """Lowest cosine of all outputs."""
        return float(np.min([agreement.cosine for agreement in self.outputs.values()]))

    @property
    def error(self) -> float:
        """Largest error of all outputs."""
        return float(np.max([agreement.error for agreement in self.outputs.values()]))

    def require(self) -> None:
        """Reject an engine that deviates from torch.

        Raises:
            EngineError: naming the output and its figures.
        """
        tolerance = TOLERANCES[self.precision]
        for name, agreement in self.outputs.items():
            if not agreement.within(tolerance):
                raise EngineError(
                    f"{self.engine} {self.precision} deviates from torch on this model: the cosine of {name} is "
                    f"{agreement.cosine:.6f} (at least {tolerance.cosine} is required) and its error is "
                    f"{agreement.error:.2g} of the largest value (at most {tolerance.error:g}): use another engine or "
                    "precision."
                )

    def summary(self) -> dict[str, object]:
        """A short form for `/model` and the command line, as JSON values."""
        identity = {name: getattr(self, name) for name in ("engine", "precision", "version", "hardware", "holds")}
        return identity | {"cosine": self.cosine, "error": self.error}


def certify(engine: Engine) -> Certificate:
    """The engine's certificate: read from the bundle's folder, or measured now and stored there if it is writable."""
    identity = {
        "engine": engine.name,
        "precision": engine.precision,
        "version": f"{engine.version}, {platform.system()} {platform.machine()}",
        "hardware": engine.hardware,
        "fingerprint": engine.bundle.fingerprint,
        "golden": engine.bundle.checksums[GOLDEN],
        "content": engine.bundle.content,
    }
    path = engine.bundle.path / FOLDER / _file_name(identity)
    stored = _read(path)
    if stored and all(getattr(stored, name) == value for name, value in identity.items()):
        return stored
    certificate = Certificate(**identity, outputs=measure(engine, load_file(engine.bundle.path / GOLDEN)))
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(certificate), indent=2) + "\n")
    except OSError:
        pass  # a bundle on a read-only disk is measured at every start
    return certificate


def certificates(bundle: Bundle) -> list[Certificate]:
    """The stored certificates of this version of the bundle."""
    stored = (_read(path) for path in sorted((bundle.path / FOLDER).glob("*.json")))
    return [certificate for certificate in stored if certificate and certificate.content == bundle.content]


def measure(engine: Engine, golden: Arrays) -> dict[str, Agreement]:
    """Agreement of every output, the worse of two batches: all golden rows (or as many as fit), and one alone."""
    agreements: dict[str, Agreement] = {}
    for graph, outputs in engine.bundle.graphs.items():
        for rows in (slice(engine.max_batch), slice(0, 1)):
            inputs = {name: golden[f"{graph}.{name}"][rows] for name in graph_inputs(engine.bundle, graph)}
            results = engine.run(graph, inputs, outputs)
            for name in outputs:
                key = f"{graph}.{name}"
                current = agreement(results[name], golden[key][rows])
                worst = agreements.get(key, current)
                # np.minimum and np.maximum propagate NaN
                cosine, error = np.minimum(worst.cosine, current.cosine), np.maximum(worst.error, current.error)
                agreements[key] = Agreement(float(cosine), float(error))
    return agreements


def agreement(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> Agreement:
    """Lowest cosine and largest error of two arrays (rows, ...)."""
    actual_rows, expected_rows = (array.reshape(len(array), -1).astype(np.float64) for array in (actual, expected))
    with np.errstate(all="ignore"):  # NaN is a valid result, within no tolerance
        lengths = np.linalg.norm(actual_rows, axis=1) * np.linalg.norm(expected_rows, axis=1)
        cosine = ((actual_rows * expected_rows).sum(axis=1) / lengths).min()
        error = np.abs(actual_rows - expected_rows).max() / np.abs(expected_rows).max()
    return Agreement(float(min(cosine, 1.0)) if np.isfinite(cosine) else float("nan"), float(error))


def _read(path: Path) -> Certificate | None:
    """A stored certificate; None if missing, damaged or written by another version."""
    try:
        values = read_json(path)
        outputs = {name: Agreement(**figures) for name, figures in values.pop("outputs").items()}
        return Certificate(**values, outputs=outputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _file_name(identity: Mapping[str, str]) -> str:
    """Readable, and different for each kind of machine that shares a bundle."""
    machine = hashlib.sha256(f"{identity['version']}\0{identity['hardware']}".encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]", "-", f"{identity['engine']}-{identity['precision']}-{machine}") + ".json"
