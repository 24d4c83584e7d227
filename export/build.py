"""Exports a checkpoint as a verified bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch
from safetensors.numpy import save_file
from torch import Tensor

from export.onnx import Graph, build_graphs, export_graph, prepare
from export.tensorrt import EngineOptions, OnStep, build_engine, capability_values
from export.verify import compare, photos, verify_precision
from mixmim_serve.bundle import (
    GOLDEN,
    PRECISIONS,
    WEIGHTS,
    Bundle,
    CompiledEngine,
    check_name,
    check_target,
    fingerprint,
    folder_name,
    graph_file,
)
from mixmim_serve.config import unknown
from mixmim_serve.description import Description
from mixmim_serve.engines import open_engine
from mixmim_serve.engines.base import Arrays
from mixmim_serve.engines.certificate import Agreement
from mixmim_serve.engines.tensorrt_library import MODULES, load
from mixmim_serve.errors import BundleError, ConfigError
from mixmim_serve.files import atomic_folder, atomic_path, sha256
from mixmim_serve.model import Encoder
from mixmim_serve.model.checkpoint import DTYPES, load_checkpoint, read_checkpoint, save_checkpoint
from mixmim_serve.version import __version__

TARGETS = ("onnx", "openvino", *MODULES)

# Rows of golden arrays stored in the bundle; the export itself compares all four photos.
GOLDEN_ROWS = {"encoder": 2, "reconstruct": 1}


@dataclass(frozen=True)
class Options:
    """What a bundle contains."""

    precisions: tuple[str, ...] = ("fp32",)
    targets: tuple[str, ...] = ("onnx",)  # runtimes to verify or compile for, besides ONNX Runtime
    half_weights: bool = False  # store the weights in fp16, half the size; fp32 graphs still compute in float32
    overwrite: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)  # for the targets tensorrt and tensorrt-rtx
    name: str = ""  # of the model; empty: that of the folder

    def __post_init__(self) -> None:
        for kind, names, choices in (("precision", self.precisions, PRECISIONS), ("target", self.targets, TARGETS)):
            for name in names:
                if name not in choices:
                    raise unknown(kind, name, choices)
        if self.name:
            check_name(self.name)
        object.__setattr__(self, "precisions", tuple(dict.fromkeys(self.precisions)))
        if "openvino" in self.targets and "fp32" not in self.precisions:
            raise ConfigError("OpenVINO takes the fp32 graphs and converts them itself: add --precision fp32.")


@dataclass(frozen=True)
class Exported:
    """A written bundle, and how closely its outputs agree with torch, by precision."""

    bundle: Bundle
    agreement: dict[str, dict[str, Agreement]]


def export_bundle(
    checkpoint: Path, target: Path, options: Options = Options(), progress: OnStep = lambda _: None
) -> Exported:
    """Export, compare with torch on real photos, and only then move the bundle to `target`.

    Raises:
        CheckpointError: when the checkpoint cannot be read.
        EngineError: when the runtime of a target is not installed.
        BundleError: when `target` exists, a weight does not fit into fp16, or a runtime disagrees with torch.
    """
    target = target.absolute()  # "." has no name
    check_target(target, options.overwrite)
    compilers = [replace(options.engine, runtime=name) for name in options.targets if name in MODULES]
    for engine in compilers:  # fail now, not after minutes of work
        capability_values(load(engine.runtime), engine)
    if "openvino" in options.targets:
        import mixmim_serve.engines.openvino  # noqa: F401 - raises when it is not installed
    model, description = load_checkpoint(checkpoint)
    if options.half_weights or "fp16" in options.precisions:
        _check_fits_half(checkpoint, model)
    with atomic_folder(target) as folder:
        dtype = torch.float16 if options.half_weights else torch.float32
        save_checkpoint(folder / WEIGHTS, model.state_dict(), description, dtype)
        images = torch.from_numpy(photos(description.preprocessing))
        model, _ = load_checkpoint(folder / WEIGHTS)  # as stored, since fp16 rounds
        graphs = build_graphs(model, description.preprocessing)
        golden = write_golden(folder, graphs, images)
        built: list[CompiledEngine] = []
        for precision in options.precisions:
            progress(f"{precision} graphs")
            weights = write_weights(folder, description, precision, options.half_weights)
            write_graphs(weights, description, images, precision)
            for engine in compilers:
                built += build_engines(weights, description, images, precision, engine, progress)
        bundle = seal(folder, description, graphs, options, built)
        agreement = {}
        for precision in options.precisions:
            progress(f"{precision} graphs in ONNX Runtime")
            agreement[precision] = verify_precision(bundle, precision, golden)
        if "openvino" in options.targets:
            progress("fp32 graphs in OpenVINO")
            agreement["fp32, OpenVINO"] = compare(golden, open_engine(bundle, "openvino", "fp32"), "fp32")
    return Exported(replace(bundle, path=target), agreement)


def write_golden(folder: Path, graphs: Mapping[str, Graph], images: Tensor) -> Arrays:
    """Golden arrays: real photos and torch's outputs for them. All are returned, the first rows are stored."""
    golden: Arrays = {}
    for name, graph in graphs.items():
        inputs = graph.examples(images)
        with torch.inference_mode():
            outputs = graph(*inputs)
        named = (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True))
        golden.update({f"{name}.{key}": tensor.contiguous().numpy() for key, tensor in named})
    with atomic_path(folder / GOLDEN) as path:
        stored = {name: array[: GOLDEN_ROWS[name.partition(".")[0]]].copy() for name, array in golden.items()}
        save_file(stored, path)
    return golden


def write_weights(folder: Path, description: Description, precision: str, half_weights: bool) -> Path:
    """The weights file that graphs of a precision refer to; written if the weights are not stored in that precision."""
    if precision == "fp32" or (precision == "fp16" and half_weights):
        return folder / WEIGHTS
    weights = folder / f"weights.{precision}.safetensors"
    save_checkpoint(weights, read_checkpoint(folder / WEIGHTS)[1], description, DTYPES[precision])
    return weights


def write_graphs(weights: Path, description: Description, images: Tensor, precision: str) -> None:
    """Write the ONNX graphs of one precision next to their weights."""
    model = prepare(load_checkpoint(weights)[0], precision)
    for name, graph in build_graphs(model, description.preprocessing).items():
        export_graph(graph, images, weights, weights.parent / graph_file(name, precision))


def build_engines(
    weights: Path, description: Description, images: Tensor, precision: str, options: EngineOptions, progress: OnStep
) -> list[CompiledEngine]:
    """Write TensorRT engines of all graphs next to the weights, of which they contain a copy.

    Raises:
        BundleError: when TensorRT cannot compile a graph.
    """
    model = prepare(load_checkpoint(weights)[0], precision, written_out=True)
    built = []
    for name, graph in build_graphs(model, description.preprocessing).items():
        source = weights.parent / f".{name}.{precision}.onnx"  # in the folder of the weights, which it refers to
        export_graph(graph, images, weights, source)
        progress(f"{precision} {name} engine for {options.runtime}")
        engine = build_engine(source, options, progress)
        source.unlink()
        file = f"{name}.{precision}.{options.runtime}.engine"
        (weights.parent / file).write_bytes(engine.plan)
        built.append(
            CompiledEngine(file, name, precision, options.runtime, engine.version, engine.hardware, options.batches)
        )
    return built


def seal(
    folder: Path,
    description: Description,
    graphs: Mapping[str, Graph],
    options: Options,
    built: Sequence[CompiledEngine] = (),
) -> Bundle:
    """Write name, fingerprint, checksums and config.json, which make the folder a bundle."""
    _, stored = read_checkpoint(folder / WEIGHTS)
    bundle = Bundle(
        path=folder,
        name=options.name or folder_name(folder),
        description=description,
        graphs={name: graph.outputs for name, graph in graphs.items()},
        weights="float16" if options.half_weights else "float32",
        precisions=options.precisions,
        built=tuple(built),
        fingerprint=fingerprint(description, {key: t.numpy().reshape(-1).data for key, t in stored.items()}),
        versions={
            "mixmim-serve": __version__,
            **{name: version(name) for name in ("torch", "onnx", "onnxscript")},
            "onnxruntime": onnxruntime.__version__,  # the runtime compared with; several packages provide it
        },
        checksums={path.name: sha256(path) for path in sorted(folder.iterdir())},
    )
    bundle.save_config()
    return bundle


def _check_fits_half(checkpoint: Path, model: Encoder) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.abs().max() > torch.finfo(torch.float16).max:
            raise BundleError(f"{checkpoint}: {name} has values too large for fp16: export without --half-weights.")
