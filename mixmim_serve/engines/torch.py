"""Torch, rebuilt from the checkpoint in the bundle: the reference for all other engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import STAGE_OUTPUTS, WEIGHTS, Bundle
from mixmim_serve.engines.base import Arrays, check_request, graph_inputs
from mixmim_serve.engines.hardware import processor
from mixmim_serve.errors import EngineError

try:
    import torch
except ImportError as error:
    raise EngineError("torch is not installed: run pip install 'mixmim-serve[export]'.") from error

from mixmim_serve.model import MixMIM
from mixmim_serve.model.checkpoint import DTYPES, load_checkpoint
from mixmim_serve.model.normalize import Normalize


class TorchEngine:
    """The network on the CPU (float32 by default) or on a CUDA device (compiled, bf16 by default)."""

    version: str = torch.__version__
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, precision: str = "", threads: int = 0) -> None:
        self.bundle = bundle
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuda = self.device.type == "cuda"
        self.name = f"torch-{self.device.type}"
        self.hardware = torch.cuda.get_device_name(self.device) if cuda else processor()
        self.precision = precision or ("bf16" if cuda else "fp32")
        if threads:
            torch.set_num_threads(threads)  # a process-wide setting of torch
        self.model = load_checkpoint(bundle.path / WEIGHTS)[0].to(self.device)
        self.normalize = Normalize(bundle.description.preprocessing).to(self.device)
        if cuda and self.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # the patch embedding's convolution would round to 10 bits
        if cuda:  # on a CPU compiling takes longer than most uses of this engine
            self.model.compile(dynamic=True)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """See `Engine.run`."""
        check_request(self.bundle, graph, graph_inputs(self.bundle, graph), inputs, outputs)
        half = torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")
        with torch.inference_mode(), half:
            tensors = {name: self._as_input(name, array) for name, array in inputs.items()}
            results = self._encode(**tensors) if graph == "encoder" else self._reconstruct(**tensors)
        return {name: results[name].float().cpu().numpy() for name in outputs}

    def _as_input(self, name: str, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return tensor if name == "from_partner" else self.normalize(tensor)

    def _encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.model(pixels)
        results = {"embedding": output.embedding_BD, **dict(zip(STAGE_OUTPUTS, output.stages_BDHW, strict=True))}
        if self.bundle.arch.num_classes:
            # In float32: rounding a head of few classes flips close decisions and saves nothing.
            with torch.autocast(self.device.type, enabled=False):
                results["logits"] = self.model.head(output.embedding_BD.float())
        return results

    def _reconstruct(
        self, image_a: torch.Tensor, image_b: torch.Tensor, from_partner: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        assert isinstance(self.model, MixMIM)  # noqa: S101 - bundles without a decoder have no such graph
        output = self.model.reconstruct(image_a, image_b, from_partner)
        return {"mixed": output.mixed, "reconstruction_a": output.image_a, "reconstruction_b": output.image_b}
