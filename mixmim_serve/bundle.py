"""The bundle: a folder that the server runs, with no training code and no torch.

config.json            the description (architecture, preprocessing, labels, provenance), precisions, outputs,
                       built engines, versions, fingerprint, and the sha256 of every other file
weights.safetensors    the checkpoint itself; the graphs point into it, so nothing is stored twice
encoder.onnx           pixels -> embedding, stage1..stage4, logits if there is a head
reconstruct.onnx       image_a, image_b, from_partner -> mixed, reconstruction_a, reconstruction_b (if a decoder)
golden.safetensors     real photos and torch's answers in float32: `encoder.pixels`, `encoder.embedding`...

Where asked for, also:
encoder.fp16.onnx, reconstruct.fp16.onnx, weights.fp16.safetensors     the same in half precision (or bf16)
encoder.fp16.tensorrt-rtx.engine...                                    built for one TensorRT version and kind of GPU

`certificates/` holds what `mixmim_serve.engines.certificate` found when engines were opened, `cache/` what runtimes
compiled then; both may be deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
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
CACHE = "cache"  # what runtimes compiled on machines that opened the bundle
FORMAT = 2  # raised when an older reader would misread the folder

PRECISIONS = ("fp32", "fp16", "bf16")

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "tiny"

STAGE_OUTPUTS = tuple(f"stage{number}" for number in range(1, STAGES + 1))


POOLED = ("embedding", "logits")  # the encoder's outputs that most callers are content with


def encoder_outputs(arch: Architecture) -> tuple[str, ...]:
    """Names of the encoder's outputs, in the graph's order."""
    return ("embedding", *STAGE_OUTPUTS, *(("logits",) if arch.num_classes else ()))


@dataclass(frozen=True)
class CompiledEngine:
    """An engine that a compiler made ahead of time; of use only to the same compiler and hardware."""

    file: str
    graph: str
    precision: str
    runtime: str  # tensorrt or tensorrt-rtx
    version: str  # of the runtime
    hardware: str  # compute capabilities such as "sm89", or the GPU's name
    batches: tuple[int, int, int]  # smallest, the one it is tuned for, largest

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))


@dataclass(frozen=True)
class Bundle:
    """A bundle folder that has been read; `verify` compares its files with their checksums."""

    path: Path
    description: Description
    graphs: Mapping[str, tuple[str, ...]]  # outputs of each graph
    weights: str  # type of the stored weights, float32 or float16
    precisions: tuple[str, ...]  # that there are graphs for
    built: tuple[CompiledEngine, ...]
    fingerprint: str
    versions: Mapping[str, str]
    checksums: Mapping[str, str]  # sha256 of each file

    @property
    def arch(self) -> Architecture:
        """The network."""
        return self.description.arch

    def require_graph(self, graph: str) -> None:
        """Check that the bundle can do what a graph does.

        Raises:
            BundleError: when it does not have it.
        """
        if graph not in self.graphs:
            raise BundleError(f"{self.path} has no {graph} graph; it has {', '.join(self.graphs)}.")

    def graph_path(self, graph: str, precision: str = "fp32") -> Path:
        """The ONNX file of a graph.

        Raises:
            BundleError: when the bundle does not have it.
        """
        self.require_graph(graph)
        if precision not in self.precisions:
            raise BundleError(
                f"{self.path} has no {precision} graphs, only {', '.join(self.precisions)}: "
                f"export it with --precision {precision}."
            )
        return self.path / graph_file(graph, precision)

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

    def copy(self, folder: Path) -> Bundle:
        """Copy the bundle's own files into an existing folder, config.json last, and verify the copy.

        Certificates stay: they are of this machine.

        Raises:
            BundleError: when a file is missing or altered.
        """
        for name in (*self.checksums, CONFIG):
            if not (self.path / name).is_file():
                raise BundleError(f"{self.path} lacks {name}: export it again.")
            shutil.copyfile(self.path / name, folder / name)
        copied = open_bundle(folder)
        copied.verify()
        return copied

    def save_config(self) -> None:
        """Write config.json, last of all: a folder without it is no bundle."""
        values = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            **self.description.to_dict(),
            "weights": self.weights,
            "precisions": list(self.precisions),
            "built": [dataclasses.asdict(each) for each in self.built],
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
        _check_format(path, values["format"])
        _check_names(values["sha256"])
        return Bundle(
            path=path,
            description=Description.from_dict(values),
            graphs={name: tuple(outputs) for name, outputs in values["graphs"].items()},
            weights=values["weights"],
            precisions=tuple(values["precisions"]),
            built=tuple(CompiledEngine(**each) for each in values["built"]),
            fingerprint=values["fingerprint"],
            versions=dict(values["versions"]),
            checksums=dict(values["sha256"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise BundleError(f"{config} is damaged ({error}): export the bundle again.") from error


def _check_format(path: Path, found: object) -> None:
    if found != FORMAT:
        advice = "update mixmim-serve" if isinstance(found, int) and found > FORMAT else "export it again"
        raise BundleError(f"{path} is of format {found}, this version reads {FORMAT}: {advice}.")


def _check_names(names: Iterable[str]) -> None:
    """A bundle's files lie in its folder: what came from elsewhere must not reach others."""
    for name in names:
        if Path(name).name != name or name == "..":
            raise ValueError(f"{name!r} is no name of a file")


def check_target(target: Path, overwrite: bool) -> None:
    """Whether a bundle may be written here.

    Raises:
        BundleError: when something is in the way that is no bundle, or a bundle and `overwrite` is not set.
    """
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file()):
        raise BundleError(f"{target} exists and is no bundle: choose another folder, nothing was overwritten.")
    if any(target.iterdir()) and not overwrite:
        raise BundleError(f"{target} is a bundle already: choose another folder, or give --overwrite.")


def graph_file(graph: str, precision: str) -> str:
    """Name of a graph's file."""
    return f"{graph}.onnx" if precision == "fp32" else f"{graph}.{precision}.onnx"


def fingerprint(description: Description, weights: Mapping[str, bytes | memoryview]) -> str:
    """128 bits that change with anything that changes the numbers: weights as stored, network, preprocessing.

    Labels and provenance are left out, and so is the order of the weights. An engine adds how it computes:
    `mixmim_serve.engines.base.engine_fingerprint`.
    """
    about = {
        "architecture": dataclasses.asdict(description.arch),
        "preprocessing": dataclasses.asdict(description.preprocessing),
    }
    digest = hashlib.sha256(canonical_json(about))
    for name in sorted(weights):
        digest.update(name.encode() + b"\0" + hashlib.sha256(weights[name]).digest())
    return digest.hexdigest()[:32]


def canonical_json(value: Any) -> bytes:
    """One spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
