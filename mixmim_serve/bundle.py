"""The bundle: a folder with everything that serving needs, free of training code and torch.

config.json            name, description (architecture, preprocessing, labels, provenance), precisions, outputs,
                       compiled engines, versions, model fingerprint, and the sha256 of every other file
weights.safetensors    the checkpoint itself; the graphs refer to it, so weights are stored once
encoder.onnx           pixels -> embedding, stage1..stage4, and logits with a head
reconstruct.onnx       image_a, image_b, from_partner -> mixed, reconstruction_a, reconstruction_b; with a decoder
heads-SHA.safetensors  named classification heads, if there are any (heads.py)
golden.safetensors     real photos and torch's float32 outputs: `encoder.pixels`, `encoder.embedding`...

On request also:
encoder.fp16.onnx, reconstruct.fp16.onnx, weights.fp16.safetensors     the same in fp16 (or bf16)
encoder.fp16.tensorrt-rtx.engine...                                    compiled for one TensorRT version and GPU type
anomaly.ENGINE.CONTENT.safetensors     what normal photos look like to one engine (mixmim_serve/anomaly/calibration.py)

`certificates/` holds what `mixmim_serve.engines.certificate` measured when engines were opened, `cache/` what runtimes
compiled then. Both may be deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mixmim_serve.config import STAGES, Architecture
from mixmim_serve.description import Description
from mixmim_serve.errors import BundleError, ConfigError, quoted
from mixmim_serve.files import atomic_path, open_regular, sha256
from mixmim_serve.runs import MAX_CONFIG_BYTES, export_advice, is_run, is_run_config
from mixmim_serve.strict_json import read_json

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
HEADS = "heads-"  # begins the name of the file with named heads; see heads.py
CACHE = "cache"  # folder for what runtimes compile when they open the bundle
FORMAT = 2  # increased when an older reader would misread the folder
MAX_NAME = 100  # characters of a bundle's name
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")  # of a file in the folder, or of a graph

PRECISIONS = ("fp32", "fp16", "bf16")

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "tiny"

STAGE_OUTPUTS = tuple(f"stage{number}" for number in range(1, STAGES + 1))
POOLED = ("embedding", "logits")  # the encoder outputs that most requests need


def encoder_outputs(arch: Architecture) -> tuple[str, ...]:
    """Names of the encoder's outputs, in the graph's order."""
    return ("embedding", *STAGE_OUTPUTS, *(("logits",) if arch.num_classes else ()))


@dataclass(frozen=True)
class CompiledEngine:
    """An engine compiled ahead of time; it runs only on the same runtime version and hardware."""

    file: str
    graph: str
    precision: str
    runtime: str  # tensorrt or tensorrt-rtx
    version: str  # of the runtime
    hardware: str  # compute capabilities such as "sm89", or the GPU's name
    batches: tuple[int, int, int]  # smallest, tuned for, largest

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))


@dataclass(frozen=True)
class Bundle:
    """An opened bundle folder; `verify` compares its files with their checksums."""

    path: Path
    name: str  # of the model, in answers, messages and folders of features; it changes no number
    description: Description
    graphs: Mapping[str, tuple[str, ...]]  # outputs of each graph
    weights: str  # dtype of the stored weights: float32 or float16
    precisions: tuple[str, ...]  # of the graphs
    built: tuple[CompiledEngine, ...]
    fingerprint: str  # the model fingerprint
    versions: Mapping[str, str]
    checksums: Mapping[str, str]  # sha256 of each file

    @property
    def arch(self) -> Architecture:
        """The network's architecture."""
        return self.description.arch

    def require_graph(self, graph: str) -> None:
        """Check that the bundle has a graph.

        Raises:
            BundleError: when it does not.
        """
        if graph not in self.graphs:
            raise BundleError(f"{self.path} has no {graph} graph; it has {', '.join(self.graphs)}.")

    def graph_path(self, graph: str, precision: str = "fp32") -> Path:
        """The ONNX file of a graph.

        Raises:
            BundleError: when the bundle lacks the graph or precision.
        """
        self.require_graph(graph)
        if precision not in self.precisions:
            raise BundleError(
                f"{self.path} has no {precision} graphs, only {', '.join(self.precisions)}: "
                f"export it with --precision {precision}."
            )
        return self.path / graph_file(graph, precision)

    @property
    def content(self) -> str:
        """SHA-256 of the checksums of everything that an engine can load from the folder, which heads are not."""
        loaded = {name: digest for name, digest in self.checksums.items() if not name.startswith(HEADS)}
        return hashlib.sha256(canonical_json(loaded)).hexdigest()

    def verify(self) -> None:
        """Compare every file with its checksum, and the weights with the fingerprint.

        Raises:
            BundleError: naming the first file that is missing or altered.
        """
        self._check_files(follow=True)
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            actual = pool.submit(self._actual_fingerprint)
            digests = pool.map(lambda name: sha256(self.path / name), self.checksums)
            for (name, expected), digest in zip(self.checksums.items(), digests, strict=True):
                if digest != expected:
                    raise BundleError(
                        f"{self.path / name} was altered after the export (its sha256 differs): export the bundle "
                        "again."
                    )
        if actual.result() != self.fingerprint:
            raise BundleError(
                f"{self.path} was altered after the export (its fingerprint is not that of its weights and settings): "
                "export the bundle again."
            )

    def copy(self, folder: Path) -> Bundle:
        """Copy the bundle's files into an existing folder, config.json last, and verify the copy.

        Certificates are not copied: they belong to this machine.

        Raises:
            BundleError: when a file is missing, altered or a symbolic link.
        """
        self._check_files(follow=False)
        for name in (*self.checksums, CONFIG):
            copy_file(self.path / name, folder / name)
        copied = open_bundle(folder)
        copied.verify()
        return copied

    def check_links(self) -> None:
        """Check that no file of the bundle is a symbolic link, which could lead out of a folder from elsewhere.

        Raises:
            BundleError: naming the link.
        """
        self._check_files(follow=False)

    def _check_files(self, *, follow: bool) -> None:
        for name in (*self.checksums, CONFIG):
            if not follow and (self.path / name).is_symlink():
                raise BundleError(f"{self.path / name} is a symbolic link: replace it with the file itself.")
            if not (self.path / name).is_file():
                raise BundleError(f"{self.path} lacks {name}: export the bundle again.")

    def _actual_fingerprint(self) -> str:
        """The fingerprint, computed from the stored weights; of damaged ones, none."""
        digests = {}
        try:
            with safe_open(self.path / WEIGHTS, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    digests[name] = hashlib.sha256(file.get_tensor(name).reshape(-1).data).digest()
        except (SafetensorError, OSError, ValueError, TypeError):
            return ""
        return _fingerprint(self.description, digests)

    def save_config(self) -> None:
        """Write config.json. It comes last: without it a folder is not a bundle."""
        values = {
            "format": FORMAT,
            "name": self.name,
            "fingerprint": self.fingerprint,
            **self.description.to_dict(),
            "weights": self.weights,
            "precisions": list(self.precisions),
            "built": [dataclasses.asdict(engine) for engine in self.built],
            "graphs": {name: list(outputs) for name, outputs in self.graphs.items()},
            "versions": dict(self.versions),
            "sha256": dict(self.checksums),
        }
        with atomic_path(self.path / CONFIG) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")


def open_bundle(path: Path) -> Bundle:
    """Read a bundle's configuration, but none of its large files.

    Raises:
        BundleError: when the folder is not a bundle.
    """
    config = path / CONFIG
    if path.is_file() and path.suffix == ".safetensors":
        raise BundleError(export_advice(path, "checkpoint"))
    if not config.is_file():
        raise BundleError(f"{path} is not a bundle: expected a folder with {CONFIG}, as written by `mixmim export`.")
    try:
        values = read_json(config, MAX_CONFIG_BYTES)
        if is_run_config(values):
            raise BundleError(export_advice(path, "training run"))
        _check_format(path, values["format"])
        _check_names((*values["sha256"], *values["graphs"]))
        bundle = Bundle(
            path=path,
            name=_name(values, path),
            description=Description.from_dict(values),
            graphs={name: tuple(outputs) for name, outputs in values["graphs"].items()},
            weights=values["weights"],
            precisions=tuple(values["precisions"]),
            built=tuple(CompiledEngine(**engine) for engine in values["built"]),
            fingerprint=values["fingerprint"],
            versions=dict(values["versions"]),
            checksums=dict(values["sha256"]),
        )
        _check_files_named(bundle)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise BundleError(f"{config} is damaged ({error}): export the bundle again.") from error
    return bundle


def folder_name(folder: Path) -> str:
    """The name of a bundle that was given none: that of its folder, with `_` for what cannot be printed."""
    name = os.path.basename(os.path.abspath(folder))  # "." has no name, and a link keeps its own
    printable = "".join(character if character.isprintable() else "_" for character in name)
    return printable[:MAX_NAME].strip() or "model"


def check_name(name: str) -> str:
    """The name, if a bundle can have it.

    Raises:
        ConfigError: when it is empty, too long, or has line breaks, control characters or spaces around it.
    """
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        raise ConfigError(f"{quoted(name)} is not a name: give 1 to {MAX_NAME} printable characters, such as shoes-v2.")
    return name


def _name(values: Mapping[str, Any], path: Path) -> str:
    """The stored name; bundles of older versions have the name of their folder."""
    return check_name(values["name"]) if "name" in values else folder_name(path)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file that is not a symbolic link.

    Raises:
        BundleError: when it is not one, or cannot be read.
    """
    try:
        with open_regular(source, follow=False) as file, target.open("wb") as copied:
            shutil.copyfileobj(file, copied, 1 << 20)
    except OSError as error:
        raise BundleError(f"cannot copy {source}: {error.strerror or error}.") from error


def _check_format(path: Path, number: object) -> None:
    if number != FORMAT:
        advice = "update mixmim-serve" if isinstance(number, int) and number > FORMAT else "export it again"
        raise BundleError(f"{path} has format {number}, this version reads {FORMAT}: {advice}.")


def _check_names(names: Iterable[str]) -> None:
    """Refuse paths: a downloaded bundle must not reach files outside its folder."""
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{name[:200]!r} is not a file name")


def _check_files_named(bundle: Bundle) -> None:
    """Check that every file that an engine may load has a checksum, so that `verify` covers it."""
    for precision in bundle.precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {str(precision)[:200]!r}")
    graphs = [graph_file(graph, precision) for graph in bundle.graphs for precision in bundle.precisions]
    for name in (WEIGHTS, GOLDEN, *graphs, *(engine.file for engine in bundle.built)):
        if name not in bundle.checksums:
            raise ValueError(f"no sha256 of {str(name)[:200]}")


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a bundle may be written to `target`.

    Raises:
        BundleError: when `target` is not a bundle and not empty, or is a bundle and `overwrite` is not set.
    """
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and (not (target / CONFIG).is_file() or is_run(target))):
        raise BundleError(f"{target} exists and is not a bundle: choose another folder; nothing was overwritten.")
    if any(target.iterdir()) and not overwrite:
        raise BundleError(f"{target} is already a bundle: choose another folder, or pass --overwrite.")


def graph_file(graph: str, precision: str) -> str:
    """File name of a graph."""
    return f"{graph}.onnx" if precision == "fp32" else f"{graph}.{precision}.onnx"


def fingerprint(description: Description, weights: Mapping[str, bytes | memoryview]) -> str:
    """The model fingerprint: 128 bits, in hex, of stored weights, architecture and preprocessing.

    Name, labels, provenance and the order of the weights do not count. `engines.base.engine_fingerprint` adds the
    engine and its precision.
    """
    return _fingerprint(description, {name: hashlib.sha256(data).digest() for name, data in weights.items()})


def _fingerprint(description: Description, digests: Mapping[str, bytes]) -> str:
    settings = {
        "architecture": description.arch.identity(),
        "preprocessing": dataclasses.asdict(description.preprocessing),
    }
    digest = hashlib.sha256(canonical_json(settings))
    for name in sorted(digests):
        digest.update(name.encode() + b"\0" + digests[name])
    return digest.hexdigest()[:32]


def canonical_json(value: Any) -> bytes:
    """A JSON value in its one canonical spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
