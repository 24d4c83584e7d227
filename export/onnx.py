"""Two ONNX graphs over one weights file.

The weights stay in the checkpoint's safetensors file: each large initializer of a graph is an external tensor that
points at its bytes there. Encoder and reconstruction share them, nothing is stored twice, and graphs stay far below
protobuf's limit of 2 GB.
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

from export.rewrite import rewrite_for_export
from mixmim_serve.bundle import encoder_outputs
from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import BundleError
from mixmim_serve.model import Encoder, MixMIM
from mixmim_serve.model.checkpoint import DTYPES
from mixmim_serve.model.normalize import Normalize

OPSET = 23  # LayerNormalization is one operator from 17 on (fp16 stays safe: Triton issue 4105), Attention from 23
MAX_BATCH = 65536

# Constants with at most this many elements are folded, and no weights: index arithmetic goes, weights stay in the file.
# Runtimes fold the rest (transposed weights, gathered bias tables) when they load the graph.
FOLD_LIMIT = 1024

_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


class EncoderGraph(nn.Module):
    """`encoder.onnx`: pixels to embedding, four stages and, with a head, logits."""

    inputs = ("pixels",)

    def __init__(self, model: Encoder, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(preprocessing)
        self.outputs = encoder_outputs(model.arch)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """uint8 (B, size, size, 3) to float32 outputs, whatever the precision inside."""
        output = self.model(self.normalize(pixels))
        outputs = (output.embedding_BD, *output.stages_BDHW, output.logits_BC)
        return tuple(tensor.float() for tensor in outputs if tensor is not None)

    def examples(self, images: Tensor) -> tuple[Tensor, ...]:
        """Inputs for tracing and verification: the images."""
        return (images,)


class ReconstructGraph(nn.Module):
    """`reconstruct.onnx`: two images and a mask to their mixture and both reconstructions."""

    inputs = ("image_a", "image_b", "from_partner")
    outputs = ("mixed", "reconstruction_a", "reconstruction_b")

    def __init__(self, model: MixMIM, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.normalize = Normalize(preprocessing)

    def forward(self, image_a: Tensor, image_b: Tensor, from_partner: Tensor) -> tuple[Tensor, ...]:
        """uint8 (B, size, size, 3) twice and bool (B, U) to three normalised images, float32 (B, 3, size, size)."""
        output = self.model.reconstruct(self.normalize(image_a), self.normalize(image_b), from_partner)
        return output.mixed.float(), output.image_a.float(), output.image_b.float()

    def examples(self, images: Tensor) -> tuple[Tensor, ...]:
        """Inputs for tracing and verification: each image paired with the next, masks of half the units."""
        units = self.model.arch.units
        generator = torch.Generator().manual_seed(0)
        masks = torch.stack([torch.randperm(units, generator=generator) < units // 2 for _ in images])
        return images, images.roll(-1, 0), masks


Graph = EncoderGraph | ReconstructGraph


def build_graphs(model: Encoder, preprocessing: Preprocessing) -> dict[str, Graph]:
    """A model's graphs by name: encoder, and reconstruct if it has a decoder."""
    graphs: dict[str, Graph] = {"encoder": EncoderGraph(model, preprocessing)}
    if isinstance(model, MixMIM) and model.arch.units > 1:  # a single unit cannot be mixed
        graphs["reconstruct"] = ReconstructGraph(model, preprocessing)
    return graphs


def prepare(model: Encoder, precision: str, *, written_out: bool = False) -> Encoder:
    """Convert a model, in place, to the precision and attention of an exported graph.

    Norms and softmax compute in float32 in every precision: by default for LayerNormalization (`stash_type`), by an
    attribute for Attention.
    """
    dtype = DTYPES[precision]
    model.to(dtype)
    rewrite_for_export(model, written_out=written_out)
    if dtype != torch.float32:  # pixels arrive in float32: reconstruction needs their exact statistics
        model.patch_embed.register_forward_pre_hook(lambda _, pixels: (pixels[0].to(dtype),))
    return model


def export_graph(graph: Graph, images: Tensor, weights: Path, target: Path) -> None:
    """Write `target`, an ONNX graph with a dynamic batch that refers to `weights` in the same folder.

    The graph's model comes from `prepare`.

    Raises:
        BundleError: when torch exports no graph.
    """
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)  # one object, so all inputs share the batch size
    with _quiet():
        # Not left to torch.onnx, which silently falls back to other exporters, even with a fixed batch.
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
        raise BundleError("torch exported no graph: this is a bug, please report it.")
    model = program.model
    stored = {f"model.{name}": entry for name, entry in graph_names(stored_tensors(weights)).items()}
    optimize_ir(
        model,
        input_size_limit=FOLD_LIMIT,
        output_size_limit=FOLD_LIMIT,
        should_fold=lambda node: False if any(v is not None and v.name in stored for v in node.inputs) else None,
    )
    _point_at_weights(model, weights, stored)
    ClearMetadataAndDocStringPass()(model)  # torch records each node's source line, with local paths
    model.producer_name = "mixmim-serve"
    ir.save(model, target)


@dataclass(frozen=True)
class Stored:
    """The location of one tensor in a safetensors file."""

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


def graph_names(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Stored tensors under the names that `prepare` gives them; queries, keys and values are parts of one tensor."""
    tensors = {}
    for name, entry in stored.items():
        module, _, parameter = name.rpartition(".")
        attention, _, parts = module.rpartition("attn.")
        if parts in ("qkv", "kv"):
            length = entry.length // len(parts)
            shape = (entry.shape[0] // len(parts), *entry.shape[1:])
            for number, part in enumerate(parts):
                renamed = f"{attention}attn.{part}.{parameter}"
                tensors[renamed] = Stored(entry.dtype, shape, entry.offset + number * length, length)
        elif parameter == "relative_position_bias_table":
            tensors[f"{module}.position.{parameter}"] = entry
        else:
            tensors[name] = entry
    return tensors


def _point_at_weights(model: ir.Model, weights: Path, stored: Mapping[str, Stored]) -> None:
    """Replace the initializers that are weights with references into the file."""
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
        if external.dtype == value.dtype:
            value.const_value = external
        else:
            _insert_cast(model, value, external)


def _insert_cast(model: ir.Model, value: ir.Value, external: ir.ExternalTensor) -> None:
    """Refer to a weight stored in half precision and cast it to float32: runtimes fold the cast at load time."""
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
def _quiet() -> Iterator[None]:
    """Silence warnings about torch's internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
