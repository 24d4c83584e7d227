"""A calibration: what normal photos look like to one engine, as one file of a bundle.

`anomaly.ENGINE.CONTENT.safetensors`, named after the engine fingerprint and its own content. It has a checksum in
config.json like the bundle's other files, so that copying and publishing keep it; the model fingerprint does not
change. A new one is complete before config.json names it, and only then the old one is deleted: a bundle is valid at
any moment. Numbers lie in arrays, the rest as JSON in the file's metadata; nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mixmim_serve.anomaly.heatmap import PLACE_QUANTILES
from mixmim_serve.anomaly.memory import Memory
from mixmim_serve.anomaly.nearest import References
from mixmim_serve.anomaly.patches import Floats, Whitening
from mixmim_serve.bundle import STAGE_OUTPUTS, Bundle, open_bundle
from mixmim_serve.engines import Engine, engine_fingerprint
from mixmim_serve.errors import BundleError
from mixmim_serve.files import atomic_path

FORMAT = 1
KEY = "mixmim"  # of the JSON in the file's metadata
_FILE = re.compile(r"anomaly\.([0-9a-f]{16})\.[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class About:
    """Where a calibration comes from."""

    model: str
    model_fingerprint: str
    fingerprint: str  # of the engine
    engine: str  # its name and precision
    photos: int  # normal ones that it was made from
    stage: str  # of the patches
    rate: float  # of false alarms, unless told otherwise
    masks: int = 0  # pairs under which photos were reconstructed; 0 without a decoder
    format: int = FORMAT


@dataclass(frozen=True)
class Calibration:
    """What normal photos look like to one engine; N photos, each scored against others only."""

    about: About
    memory: Memory
    whiten: Whitening  # of patches
    parts: Floats  # (N, 2), distances of each photo from the others; see `memory.Distances`
    folds: Floats  # (N,), the part of the photos that each belongs to: scored against the other parts
    places: Floats  # quantiles of the distances of all places, at `PLACE_QUANTILES`
    reconstruction: Floats  # quantiles of the score of POST /score, at 0, 0.01, ..., 1; empty without a decoder

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All numbers by name."""
        memory = self.memory
        return {
            "patches.mean": self.whiten.mean,
            "patches.matrix": self.whiten.matrix,
            "patches.references": memory.patches.vectors,
            "patches.around": memory.around,
            "embeddings.mean": memory.whiten.mean,
            "embeddings.matrix": memory.whiten.matrix,
            "embeddings.references": memory.embeddings.vectors,
            "normal.parts": self.parts,
            "normal.folds": self.folds,
            "normal.places": self.places,
            "normal.reconstruction": self.reconstruction,
        }

    def summary(self) -> dict[str, Any]:
        """What `mixmim info` and GET /model say of it."""
        facts = dataclasses.asdict(self.about)
        sizes = {"patches": len(self.memory.patches), "dimensions": self.memory.patches.vectors.shape[1]}
        return {name: facts[name] for name in ("engine", "fingerprint", "photos", "stage")} | sizes


def from_arrays(about: About, arrays: Mapping[str, Any]) -> Calibration:
    """The inverse of `Calibration.arrays`.

    Raises:
        KeyError, ValueError: for arrays that do not belong together.
    """
    patches, embeddings = (Whitening(arrays[f"{part}.mean"], arrays[f"{part}.matrix"]) for part in _PARTS)
    references = [References(arrays[f"{part}.references"]) for part in _PARTS]
    for whiten, known in zip((patches, embeddings), references, strict=True):
        if whiten.matrix.shape != (len(whiten.mean), known.vectors.shape[1]) or not len(known):
            raise ValueError("its arrays do not belong together")
    memory = Memory(references[0], arrays["patches.around"], embeddings, references[1])
    normal = {name: arrays[f"normal.{name}"] for name in ("parts", "folds", "places", "reconstruction")}
    indices = memory.around
    if (
        indices.dtype.kind != "i"
        or indices.ndim != 2
        or len(indices) != len(references[0])
        or not 0 <= indices.min() <= indices.max() < len(indices)
    ):
        raise ValueError("its arrays do not belong together")
    if normal["parts"].shape != (len(normal["folds"]), len(_PARTS)) or normal["places"].shape != (
        len(PLACE_QUANTILES),
    ):
        raise ValueError("its arrays do not belong together")
    if not len(normal["folds"]) or not all(np.isfinite(values).all() for values in arrays.values()):
        raise ValueError("it knows of no photo, or has inf or NaN")
    if about.stage not in STAGE_OUTPUTS or not isinstance(about.rate, float):
        raise ValueError(f"stage {about.stage!r} and rate {about.rate!r} cannot be")
    return Calibration(about, memory, patches, **normal)


_PARTS = ("patches", "embeddings")


def store(bundle: Bundle, calibration: Calibration) -> Bundle:
    """Write a calibration into the bundle's folder, in place of the one for the same engine.

    Raises:
        BundleError: when it is of another model.
        OSError: when the folder cannot be written to.
    """
    if calibration.about.model_fingerprint != bundle.fingerprint:
        raise _other_model(bundle, calibration.about)
    text = json.dumps(dataclasses.asdict(calibration.about))
    content = save({name: np.ascontiguousarray(a) for name, a in calibration.arrays().items()}, {KEY: text})
    digest, engine = hashlib.sha256(content).hexdigest(), calibration.about.fingerprint[:16]
    name = f"anomaly.{engine}.{digest[:16]}.safetensors"
    with atomic_path(bundle.path / name) as temporary:
        temporary.write_bytes(content)
    old = [file for file in files(bundle) if file != name and _engine_of(file) == engine]
    checksums = {file: checksum for file, checksum in bundle.checksums.items() if file not in old} | {name: digest}
    dataclasses.replace(bundle, checksums=dict(sorted(checksums.items()))).save_config()
    for file in old:
        with contextlib.suppress(OSError):  # a leftover does no harm
            (bundle.path / file).unlink()
    return open_bundle(bundle.path)


def files(bundle: Bundle) -> list[str]:
    """Names of the bundle's calibrations, one per engine."""
    return [name for name in bundle.checksums if _FILE.fullmatch(name)]


def abouts(bundle: Bundle) -> list[About]:
    """Where the bundle's calibrations come from, without their numbers.

    Raises:
        BundleError: when one is damaged.
    """
    return [_read(bundle, name, with_arrays=False)[0] for name in files(bundle)]


def open_calibration(engine: Engine) -> Calibration:
    """The calibration of an engine's bundle for this engine.

    Raises:
        BundleError: when there is none, or it is of another model or damaged.
    """
    bundle, own = engine.bundle, engine_fingerprint(engine)
    known = [name for name in files(bundle) if own.startswith(_engine_of(name))]
    if not known:
        raise _not_calibrated(bundle, f"{engine.name} {engine.precision}")
    about, arrays = _read(bundle, known[0])
    if about.model_fingerprint != bundle.fingerprint or about.fingerprint != own:
        raise _other_model(bundle, about)
    try:
        return from_arrays(about, arrays)
    except (KeyError, ValueError) as error:
        raise _damaged(bundle, known[0], error) from error


def _read(bundle: Bundle, name: str, *, with_arrays: bool = True) -> tuple[About, dict[str, NDArray[Any]]]:
    try:
        with safe_open(bundle.path / name, framework="np") as file:
            values = json.loads(file.metadata()[KEY])
            if values["format"] != FORMAT:
                raise ValueError(f"it has format {values['format']}, this version reads {FORMAT}")
            about = About(**values)
            arrays = {key: file.get_tensor(key) for key in file.keys()} if with_arrays else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(bundle, name, error) from error
    return about, arrays


def _engine_of(name: str) -> str:
    match = _FILE.fullmatch(name)
    return match[1] if match else ""


def _not_calibrated(bundle: Bundle, engine: str) -> BundleError:
    others = ", ".join(about.engine for about in abouts(bundle))
    if others:
        return BundleError(
            f"this bundle was calibrated for {others}, but {engine} runs it, whose distances differ: run mixmim "
            "calibrate with this engine too, or choose the other one."
        )
    return BundleError(
        "this bundle is not calibrated: run mixmim calibrate BUNDLE NORMAL_PHOTOS, so that it knows what is normal."
    )


def _other_model(bundle: Bundle, about: About) -> BundleError:
    return BundleError(
        f"the calibration in {bundle.path} is of model fingerprint {about.model_fingerprint}, the bundle has "
        f"{bundle.fingerprint}: run mixmim calibrate again."
    )


def _damaged(bundle: Bundle, name: str, error: Exception) -> BundleError:
    return BundleError(f"{bundle.path / name} cannot be read ({error}): run mixmim calibrate again.")
