"""The bundle: a folder that the server runs, with no training code and no torch.

config.json            the description (architecture, preprocessing, labels, provenance), precision, outputs,
                       versions, fingerprint, and the sha256 of every other file
weights.safetensors    the checkpoint itself; both graphs point into it, so nothing is stored twice
encoder.onnx           pixels -> embedding, stage1..stage4, logits if there is a head
reconstruct.onnx       image_a, image_b, from_partner -> mixed, reconstruction_a, reconstruction_b (if a decoder)
golden.safetensors     inputs made from real photos and torch's answers: `encoder.pixels`, `encoder.embedding`...
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmim_serve.config import STAGES, Architecture
from mixmim_serve.description import Description
from mixmim_serve.errors import BundleError, ConfigError
from mixmim_serve.files import atomic_path, sha256

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
FORMAT = 1  # raised when an older reader would misread the folder

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "tiny"

STAGE_OUTPUTS = tuple(f"stage{number}" for number in range(1, STAGES + 1))


def encoder_outputs(arch: Architecture) -> tuple[str, ...]:
    """Names of the encoder's outputs, in the graph's order."""
    return ("embedding", *STAGE_OUTPUTS, *(("logits",) if arch.num_classes else ()))


@dataclass(frozen=True)
class Bundle:
    """A bundle folder that has been read; `verify` compares its files with their checksums."""

    path: Path
    description: Description
    graphs: Mapping[str, tuple[str, ...]]  # outputs of each graph
    precision: Mapping[str, str]  # "weights" as stored, "compute" as run
    fingerprint: str
    versions: Mapping[str, str]
    checksums: Mapping[str, str]  # sha256 of each file

    @property
    def arch(self) -> Architecture:
        """The network."""
        return self.description.arch

    def graph_path(self, graph: str) -> Path:
        """The ONNX file of a graph.

        Raises:
            BundleError: when the bundle does not have it.
        """
        if graph not in self.graphs:
            raise BundleError(f"{self.path} has no {graph} graph; it has {', '.join(self.graphs)}.")
        return self.path / f"{graph}.onnx"

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            BundleError: naming the first file that is missing or altered.
        """
        for name, expected in self.checksums.items():
            path = self.path / name
            if not path.is_file():
                raise BundleError(f"{self.path} lacks {name}: export it again.")
            if sha256(path) != expected:
                raise BundleError(f"{path} was altered after the export (its sha256 differs): export it again.")

    def save_config(self) -> None:
        """Write config.json, last of all: a folder without it is no bundle."""
        values = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            **self.description.to_dict(),
            "precision": dict(self.precision),
            "graphs": {name: list(outputs) for name, outputs in self.graphs.items()},
            "versions": dict(self.versions),
            "sha256": dict(self.checksums),
        }
        with atomic_path(self.path / CONFIG) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")


def open_bundle(path: Path) -> Bundle:
    """Read a bundle's configuration; the large files are not touched.

    Raises:
        BundleError: when the folder is no bundle of ours.
    """
    config = path / CONFIG
    if not config.is_file():
        raise BundleError(f"{path} is no bundle: expected a folder with {CONFIG}, as `mixmim export` writes it.")
    try:
        values = json.loads(config.read_text())
        if values["format"] != FORMAT:
            raise BundleError(f"{path} is of format {values['format']}, this version reads {FORMAT}: export it again.")
        return Bundle(
            path=path,
            description=Description.from_dict(values),
            graphs={name: tuple(outputs) for name, outputs in values["graphs"].items()},
            precision=dict(values["precision"]),
            fingerprint=values["fingerprint"],
            versions=dict(values["versions"]),
            checksums=dict(values["sha256"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise BundleError(f"{config} is damaged ({error}): export the bundle again.") from error


def fingerprint(
    description: Description, precision: Mapping[str, str], weights: Mapping[str, bytes | memoryview]
) -> str:
    """128 bits that change with anything that changes the numbers: weights, network, preprocessing, precision.

    Labels and provenance are left out, and so is the order of the weights.
    """
    about = {
        "architecture": dataclasses.asdict(description.arch),
        "preprocessing": dataclasses.asdict(description.preprocessing),
        "precision": dict(precision),
    }
    digest = hashlib.sha256(canonical_json(about))
    for name in sorted(weights):
        digest.update(name.encode() + b"\0" + hashlib.sha256(weights[name]).digest())
    return digest.hexdigest()[:32]


def canonical_json(value: Any) -> bytes:
    """One spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
