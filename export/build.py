"""A checkpoint becomes a verified bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch
from safetensors.numpy import save_file
from torch import Tensor

from export.onnx import Graph, export_graph, graphs_of
from export.verify import compare, photos
from mixmim_serve.bundle import CONFIG, GOLDEN, WEIGHTS, Bundle, fingerprint
from mixmim_serve.description import Description
from mixmim_serve.engines.base import Arrays, open_engine
from mixmim_serve.errors import BundleError
from mixmim_serve.files import atomic_path, sha256
from mixmim_serve.model import Encoder
from mixmim_serve.model.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from mixmim_serve.version import __version__

# Rows kept inside the bundle; the export itself compares all four photos.
GOLDEN_ROWS = {"encoder": 2, "reconstruct": 1}


@dataclass(frozen=True)
class Exported:
    """A bundle that was written, and how far ONNX Runtime is from torch in each output."""

    bundle: Bundle
    differences: dict[str, float]


def export_bundle(checkpoint: Path, target: Path, *, half_weights: bool = False, overwrite: bool = False) -> Exported:
    """Export, compare with torch on real photos, and only then put the bundle in its place.

    `half_weights` stores the weights in fp16, at half the size; the graphs still compute in float32.

    Raises:
        CheckpointError: when the checkpoint cannot be read.
        BundleError: when `target` is in the way, a weight does not fit in fp16, or ONNX Runtime disagrees with torch.
    """
    target = target.absolute()  # "." has no name
    _check_target(target, overwrite)
    model, description = load_checkpoint(checkpoint)
    if half_weights:
        _check_fits_half(checkpoint, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        dtype = torch.float16 if half_weights else torch.float32
        save_checkpoint(folder / WEIGHTS, model.state_dict(), description, dtype)
        model, _ = load_checkpoint(folder / WEIGHTS)  # as stored: fp16 rounds
        graphs = graphs_of(model)
        golden = write_graphs(folder, graphs, torch.from_numpy(photos(description.preprocessing)))
        bundle = seal(folder, description, graphs, half_weights)
        differences = compare(bundle, golden, open_engine(bundle))
        _move(folder, target)
    return Exported(replace(bundle, path=target), differences)


def write_graphs(folder: Path, graphs: Mapping[str, Graph], images: Tensor) -> Arrays:
    """Each graph, and golden arrays: real photos and what torch makes of them."""
    golden: Arrays = {}
    for name, graph in graphs.items():
        export_graph(graph, images, folder / WEIGHTS, folder / f"{name}.onnx")
        inputs = graph.examples(images)
        with torch.inference_mode():
            outputs = graph(*inputs)
        named = (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True))
        golden.update({f"{name}.{key}": tensor.contiguous().numpy() for key, tensor in named})
    with atomic_path(folder / GOLDEN) as path:
        kept = {name: array[: GOLDEN_ROWS[name.partition(".")[0]]].copy() for name, array in golden.items()}
        save_file(kept, path)
    return golden


def seal(folder: Path, description: Description, graphs: Mapping[str, Graph], half_weights: bool) -> Bundle:
    """Fingerprint, checksums and config.json: from here on the folder is a bundle."""
    _, stored = read_checkpoint(folder / WEIGHTS)
    precision = {"weights": "float16" if half_weights else "float32", "compute": "float32"}
    bundle = Bundle(
        path=folder,
        description=description,
        graphs={name: graph.outputs for name, graph in graphs.items()},
        precision=precision,
        fingerprint=fingerprint(description, precision, {key: t.numpy().reshape(-1).data for key, t in stored.items()}),
        versions={
            "mixmim-serve": __version__,
            **{name: version(name) for name in ("torch", "onnx", "onnxscript")},
            "onnxruntime": onnxruntime.__version__,  # what the graphs were compared with; either package brings it
        },
        checksums={path.name: sha256(path) for path in sorted(folder.iterdir())},
    )
    bundle.save_config()
    return bundle


def _check_fits_half(checkpoint: Path, model: Encoder) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.abs().max() > torch.finfo(torch.float16).max:
            raise BundleError(f"{checkpoint}: {name} holds numbers that fp16 cannot: export without --half-weights.")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file()):
        raise BundleError(f"{target} exists and is no bundle: choose another folder, nothing was overwritten.")
    if any(target.iterdir()) and not overwrite:
        raise BundleError(f"{target} is a bundle already: choose another folder, or give --overwrite.")


def _move(folder: Path, target: Path) -> None:
    """Put the finished folder in place; an old bundle is moved aside first, so that one of the two is always whole."""
    old = folder.parent / f"{target.name}.old"
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
