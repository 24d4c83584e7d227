"""Does this engine, on this machine, give torch's numbers? The proof that is asked for before an engine serves.

The bundle's golden photos run through the engine that was actually loaded; the result is kept in the bundle's folder,
one file for each engine, precision, runtime version and hardware, so that it is measured once.
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

FOLDER = "certificates"  # in the bundle


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from torch in float32."""

    cosine: float  # at least, of each row
    error: float  # at most: largest difference, as a share of the output's largest absolute value


# The one place for all of them; measured figures in docs/engines.md. float32 differs by the order of sums alone, a
# wrong constant or operator by 1e-2 or more. Half precision rounds each product: to 11 bits in fp16, 8 in bf16.
TOLERANCES = {
    "fp32": Tolerance(0.999999, 1e-4),
    "fp16": Tolerance(0.9999, 1e-2),
    "bf16": Tolerance(0.999, 6e-2),
}


@dataclass(frozen=True)
class Agreement:
    """Of one output with its golden array."""

    cosine: float  # smallest of all rows
    error: float  # as in `Tolerance`

    def within(self, tolerance: Tolerance) -> bool:
        """False for anything that is not a number, too."""
        return self.cosine >= tolerance.cosine and self.error <= tolerance.error


@dataclass(frozen=True)
class Certificate:
    """What was measured for one engine."""

    engine: str
    precision: str
    version: str
    hardware: str
    fingerprint: str  # of the bundle
    golden: str  # sha256 of the golden arrays
    outputs: Mapping[str, Agreement]

    @property
    def holds(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(each.within(TOLERANCES[self.precision]) for each in self.outputs.values())

    @property
    def cosine(self) -> float:
        """The worst."""
        return float(np.min([each.cosine for each in self.outputs.values()]))

    @property
    def error(self) -> float:
        """The worst."""
        return float(np.max([each.error for each in self.outputs.values()]))

    def require(self) -> None:
        """Refuse an engine whose numbers are wrong.

        Raises:
            EngineError: with the numbers.
        """
        allowed = TOLERANCES[self.precision]
        for name, found in self.outputs.items():
            if not found.within(allowed):
                raise EngineError(
                    f"{self.engine} {self.precision} is not to be trusted with this model: its {name} has a cosine of "
                    f"{found.cosine:.6f} with torch (at least {allowed.cosine} is asked for) and differs by "
                    f"{found.error:.2g} of the largest value (at most {allowed.error:g}): use another engine or "
                    "precision."
                )

    def summary(self) -> dict[str, object]:
        """JSON values, for people."""
        about = {name: getattr(self, name) for name in ("engine", "precision", "version", "hardware", "holds")}
        return about | {"cosine": self.cosine, "error": self.error}


def certify(engine: Engine) -> Certificate:
    """The engine's certificate: the one that is kept, or measured now and kept where the bundle can be written to."""
    known = {
        "engine": engine.name,
        "precision": engine.precision,
        "version": f"{engine.version}, {platform.system()} {platform.machine()}",
        "hardware": engine.hardware,
        "fingerprint": engine.bundle.fingerprint,
        "golden": engine.bundle.checksums[GOLDEN],
    }
    path = engine.bundle.path / FOLDER / _file_name(known)
    kept = _read(path)
    if kept and all(getattr(kept, name) == value for name, value in known.items()):
        return kept
    certificate = Certificate(**known, outputs=measure(engine, load_file(engine.bundle.path / GOLDEN)))
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(certificate), indent=2) + "\n")
    except OSError:
        pass  # a bundle on a read-only disk is measured at each start
    return certificate


def certificates(bundle: Bundle) -> list[Certificate]:
    """Those that are kept and belong to the bundle as it is."""
    found = (_read(path) for path in sorted((bundle.path / FOLDER).glob("*.json")))
    return [each for each in found if each and each.fingerprint == bundle.fingerprint]


def measure(engine: Engine, golden: Arrays) -> dict[str, Agreement]:
    """Of every output of every graph, in a batch of all golden rows, or as many as it takes, and in a batch of one."""
    agreements: dict[str, Agreement] = {}
    for graph, outputs in engine.bundle.graphs.items():
        for rows in (slice(engine.max_batch), slice(0, 1)):
            inputs = {name: golden[f"{graph}.{name}"][rows] for name in graph_inputs(engine.bundle, graph)}
            results = engine.run(graph, inputs, outputs)
            for name in outputs:
                key = f"{graph}.{name}"
                found = agreement(results[name], golden[key][rows])
                worst = agreements.get(key, found)
                # numpy's, which keep a NaN
                cosine, error = np.minimum(worst.cosine, found.cosine), np.maximum(worst.error, found.error)
                agreements[key] = Agreement(float(cosine), float(error))
    return agreements


def agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> Agreement:
    """Of two arrays (rows, ...)."""
    one, two = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    with np.errstate(all="ignore"):  # not a number is a result here, and within no tolerance
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        cosine = ((one * two).sum(axis=1) / lengths).min()
        error = np.abs(one - two).max() / np.abs(two).max()
    return Agreement(float(min(cosine, 1.0)) if np.isfinite(cosine) else float("nan"), float(error))


def _read(path: Path) -> Certificate | None:
    """None for what is missing, damaged or from another version of this format."""
    try:
        values = json.loads(path.read_text())
        outputs = {name: Agreement(**each) for name, each in values.pop("outputs").items()}
        return Certificate(**values, outputs=outputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _file_name(known: Mapping[str, str]) -> str:
    """Readable, and as many as there are kinds of machine that share a bundle."""
    where = hashlib.sha256(f"{known['version']}\0{known['hardware']}".encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]", "-", f"{known['engine']}-{known['precision']}-{where}") + ".json"
