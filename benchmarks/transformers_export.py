"""Our exported Swin against the same network exported from Hugging Face transformers, beside MixMIM's `base`.

    python -m benchmarks.transformers_export --output benchmarks/results/transformers_export_epyc_202611.md

Both have the weights of one random `SwinModel`, ours by `mixmim import`. Theirs is exported in the usual way:
torch.onnx.export, dynamic batch, normalised float32 pixels in, the pooled embedding out; with its attention written out
(`eager`), because torch 2.13 cannot convert the other form (`sdpa`) of transformers 5.24. Graphs of `base` are those of
benchmarks/plain_export.py, which also takes the turns: see there for how they are timed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks import plain_export
from benchmarks.plain_export import GRAPHS, as_input, ask, environment, export_plain, markdown, take_turns
from benchmarks.provenance import command
from export.build import export_bundle
from export.verify import photos
from mixmim_serve.bench import encoder_flops
from mixmim_serve.bundle import WEIGHTS
from mixmim_serve.config import architecture
from mixmim_serve.engines.certificate import agreement
from mixmim_serve.model.checkpoint import load_checkpoint
from mixmim_serve.model.released import import_checkpoint

SIZES = ("base", "swin-tiny", "swin-base")


class Pooled(nn.Module):
    """A `SwinModel` that returns its pooled output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, size, size) to (B, D)."""
        embedding: Tensor = self.model(pixels).pooler_output
        return embedding


def main(arguments: Sequence[str] | None = None) -> None:
    """Export both, take turns, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of a turn per batch size")
    parser.add_argument("--folder", type=Path, help="keep the graphs here, and reuse existing ones")
    parser.add_argument("--output", type=Path, help="a Markdown file; the numbers go into a .json next to it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        models = {size: prepare(size, folder / size) for size in options.sizes}
        report = environment() | {"command": command("transformers_export", arguments), "rounds": options.rounds}
        report["versions"]["transformers"] = transformers.__version__
        report["rates"], report["rows"] = take_turns(models, options)
        report["sizes"] = {size: measured(about, options) for size, about in models.items()}
    text = markdown(report).replace("against a plain export", "against an export from transformers", 1)
    print(text)
    if options.output:
        options.output.write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


def prepare(size: str, folder: Path) -> dict[str, Any]:
    """Both graphs of a size, and how closely the two networks agree in torch."""
    if not size.startswith("swin-"):
        return plain_export.prepare(size, folder)
    folder.mkdir(parents=True, exist_ok=True)
    theirs, bundle = random_swin(size), folder / "bundle"
    if not bundle.exists():
        torch.save(theirs.state_dict(), folder / "theirs.bin")
        import_checkpoint(folder / "theirs.bin", folder / "ours.safetensors")
        export_bundle(folder / "ours.safetensors", bundle)
    model, description = load_checkpoint(bundle / WEIGHTS)
    pixels = torch.from_numpy(as_input("plain", photos(description.preprocessing), description.preprocessing))
    with torch.inference_mode():
        expected = model(pixels).embedding_BD.numpy()
        torch_agreement = agreement(Pooled(theirs)(pixels).numpy(), expected)
    np.save(folder / "expected.npy", expected)
    if not (folder / "plain.onnx").exists():
        export_plain(Pooled(theirs), pixels, folder / "plain.onnx")
    return {
        "ours": str(bundle),
        "plain": str(folder / "plain.onnx"),
        "gflop_an_image": round(encoder_flops(description.arch) / 1e9, 2),
        "plain_and_ours_in_torch": {"cosine": torch_agreement.cosine, "error": torch_agreement.error},
    }


def random_swin(size: str) -> nn.Module:
    """The network of this size in transformers, with weights of which every bias, norm and table matters."""
    arch = architecture(size)
    config = transformers.SwinConfig(
        embed_dim=arch.embed_dim, depths=list(arch.depths), num_heads=list(arch.heads), image_size=arch.image_size,
        window_size=arch.windows[0], attn_implementation="eager",
    )  # fmt: skip
    model: nn.Module = transformers.SwinModel(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        if parameter.dim() > 1 and "position" not in name:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = is_norm + 0.1 * noise
    return model.eval()


def measured(about: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """How both graphs are executed, without local paths."""
    facts = {name: value for name, value in about.items() if name not in GRAPHS}
    return facts | {
        "nodes": {graph: ask("nodes", about, graph) for graph in GRAPHS},
        "profile": {graph: ask("profile", about, graph, "bf16", max(options.batches)) for graph in GRAPHS},
    }


if __name__ == "__main__":
    main()
