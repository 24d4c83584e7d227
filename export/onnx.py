"""Two ONNX graphs over one weights file.

The weights stay in the checkpoint's own safetensors file: each large initializer of a graph is an external tensor
that points at its bytes there. So encoder and reconstruction share them, nothing is stored twice, and no protobuf
limit (2 GB) is near.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixmim_serve.bundle import encoder_outputs
from mixmim_serve.errors import BundleError
from mixmim_serve.model import Encoder, MixMIM

OPSET = 18  # LayerNormalization is one operator from 17 on: fp16 stays safe (Triton issue 4105)
MAX_BATCH = 65536

# Folding stops at this many elements, and never touches a weight: index arithmetic goes, weights stay where they are.
# Runtimes fold the rest (transposed weights, gathered bias tables) when they load the graph.
FOLD_LIMIT = 1024

_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16}


class EncoderGraph(nn.Module):
    """`encoder.onnx`: pixels to embedding, four stages and, with a head, logits."""

    inputs = ("pixels",)

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model
        self.outputs = encoder_outputs(model.arch)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, size, size) normalised."""
        output = self.model(pixels)
        found = (output.embedding_BD, *output.stages_BDHW, output.logits_BC)
        return tuple(tensor for tensor in found if tensor is not None)

    def examples(self, images: Tensor) -> tuple[Tensor, ...]:
        """Inputs for tracing and for checks, from real images."""
        return (images,)


class ReconstructGraph(nn.Module):
    """`reconstruct.onnx`: two images and a mask to their mixture and both reconstructions."""

    inputs = ("image_a", "image_b", "from_partner")
    outputs = ("mixed", "reconstruction_a", "reconstruction_b")

    def __init__(self, model: MixMIM) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_a: Tensor, image_b: Tensor, from_partner: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, size, size) twice, (B, U) bool."""
        output = self.model.reconstruct(image_a, image_b, from_partner)
        return output.mixed, output.image_a, output.image_b

    def examples(self, images: Tensor) -> tuple[Tensor, ...]:
        """Inputs for tracing and for checks: each image paired with the next, masks of half the units."""
        units = self.model.arch.units
        generator = torch.Generator().manual_seed(0)
        masks = torch.stack([torch.randperm(units, generator=generator) < units // 2 for _ in images])
        return images, images.roll(-1, 0), masks


Graph = EncoderGraph | ReconstructGraph


def graphs_of(model: Encoder) -> dict[str, Graph]:
    """The graphs that a model has, by name."""
    graphs: dict[str, Graph] = {"encoder": EncoderGraph(model)}
    if isinstance(model, MixMIM) and model.arch.units > 1:  # a single unit cannot be mixed
        graphs["reconstruct"] = ReconstructGraph(model)
    return graphs


def export_graph(graph: Graph, images: Tensor, weights: Path, target: Path) -> None:
    """Write `target`, an ONNX graph with a dynamic batch whose weights lie in `weights` beside it."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)  # one object: every input has the same batch
    with _tracing():
        # Exported here and not inside torch.onnx, which falls back to other ways, fixed batch included, without a word.
        traced = torch.export.export(
            graph.eval(), graph.examples(images), dynamic_shapes=tuple({0: batch} for _ in graph.inputs)
        )
        program = torch.onnx.export(
            traced,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise BundleError("torch gave no graph: this is a bug, please report it.")
    model = program.model
    stored = {f"model.{name}": entry for name, entry in stored_tensors(weights).items()}
    optimize_ir(
        model,
        input_size_limit=FOLD_LIMIT,
        output_size_limit=FOLD_LIMIT,
        should_fold=lambda node: False if any(v is not None and v.name in stored for v in node.inputs) else None,
    )
    _point_at_weights(model, weights, stored)
    ClearMetadataAndDocStringPass()(model)  # torch notes the source line of each node, with paths of this machine
    model.producer_name = "mixmim-serve"
    ir.save(model, target)


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    length: int  # bytes


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The index of a safetensors file: an 8-byte length, that much JSON, then the tensors' bytes."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        index: dict[str, dict[str, Any]] = json.loads(file.read(header))
    tensors = {}
    for name, entry in index.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[name] = Stored(str(entry["dtype"]), shape, 8 + header + begin, end - begin)
    return tensors


def _point_at_weights(model: ir.Model, weights: Path, stored: Mapping[str, Stored]) -> None:
    """Replace the initializers that are weights by references into the file."""
    for name, value in list(model.graph.initializers.items()):
        entry = stored.get(name)
        if entry is None:
            continue
        external = ir.ExternalTensor(
            location=weights.name,
            offset=entry.offset,
            length=entry.length,
            dtype=_DTYPES[entry.dtype],
            shape=ir.Shape(entry.shape),
            name=name,
            base_dir=str(weights.parent),
        )
        if external.dtype == ir.DataType.FLOAT:
            value.const_value = external
        else:
            _insert_cast(model, value, external)


def _insert_cast(model: ir.Model, value: ir.Value, external: ir.ExternalTensor) -> None:
    """Store a weight in half precision and compute with it in single: runtimes fold the cast when they load."""
    name = str(value.name)
    del model.graph.initializers[name]
    half = ir.Value(name=name, shape=value.shape, type=ir.TensorType(external.dtype), const_value=external)
    model.graph.initializers[name] = half
    cast = ir.node("Cast", [half], attributes={"to": int(ir.DataType.FLOAT)})
    full = cast.outputs[0]
    full.name, full.shape, full.type = f"{name}.float32", value.shape, ir.TensorType(ir.DataType.FLOAT)
    ir.convenience.replace_all_uses_with(value, full)
    model.graph.insert_before(model.graph[0], cast)


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """No warnings about torch's own internals, and the math kernel, whose strides every reshape can follow."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
