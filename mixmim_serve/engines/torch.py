"""Torch, rebuilt from the checkpoint inside the bundle: the reference that the other engines are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from mixmim_serve.bundle import STAGE_OUTPUTS, WEIGHTS, Bundle
from mixmim_serve.engines.base import Arrays, as_input, check_request, graph_inputs
from mixmim_serve.errors import EngineError

try:
    import torch
except ImportError as error:
    raise EngineError("torch is not installed: run pip install 'mixmim-serve[export]'.") from error

from mixmim_serve.model import MixMIM
from mixmim_serve.model.checkpoint import load_checkpoint


class TorchEngine:
    """The network in float32, on the CPU or a CUDA device."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self.bundle = bundle
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = f"torch-{self.device.type}"
        if threads:
            torch.set_num_threads(threads)  # torch has one setting for the whole process
        self.model = load_checkpoint(bundle.path / WEIGHTS)[0].to(self.device)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """See `Engine.run`."""
        check_request(self.bundle, graph, graph_inputs(self.bundle, graph), inputs, outputs)
        tensors = {name: torch.from_numpy(as_input(name, array)).to(self.device) for name, array in inputs.items()}
        with torch.inference_mode():
            results = self._encode(**tensors) if graph == "encoder" else self._reconstruct(**tensors)
        return {name: results[name].cpu().numpy() for name in outputs}

    def _encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.model(pixels)
        results = {"embedding": output.embedding_BD, **dict(zip(STAGE_OUTPUTS, output.stages_BDHW, strict=True))}
        if output.logits_BC is not None:
            results["logits"] = output.logits_BC
        return results

    def _reconstruct(
        self, image_a: torch.Tensor, image_b: torch.Tensor, from_partner: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        assert isinstance(self.model, MixMIM)  # noqa: S101 - bundles without a decoder have no such graph
        output = self.model.reconstruct(image_a, image_b, from_partner)
        return {"mixed": output.mixed, "reconstruction_a": output.image_a, "reconstruction_b": output.image_b}
