"""A small ablation of MixMIM: the same pretraining with one thing changed, then evaluated on frozen features.

    python -m benchmarks.ablation photos data --out runs/ablation --epochs 5

The variants are those of the paper's ablation (arXiv 2205.13137, section 4.3): mask tokens instead of mixing, one
reconstruction instead of two, attention across the two images, and other mask ratios. Each keeps network size, images,
order, augmentation, steps and schedule of the first, which is also run with a second seed: differences smaller than
between these two are noise. Frozen features are evaluated on the sets of `benchmarks/learning.py` under DATA. Finished
runs are skipped, interrupted ones resume; the table is written to OUT/results.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.learning import ALONE, SETS, record
from mixmim_serve.config import Architecture
from mixmim_serve.files import atomic_path
from mixmim_serve.model import Encoder, MixMIM
from mixmim_serve.model.mixmim import PretrainingOutput, to_units
from mixmim_serve.sources import open_source
from training.evaluation.probe import probe
from training.pretraining import Pretraining
from training.recipes import tiny_cpu
from training.start import read_start
from training.trainer import train

NEAREST = 10  # the k of k-NN


class AttentionAcross(MixMIM):
    """Standard mixing; tokens also attend to the other image's."""

    def run_stages(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> list[Tensor]:
        """Every stage's tokens, without blocked scores."""
        return super().run_stages(tokens_BHWD, None)


class SingleReconstruction(MixMIM):
    """Standard mixing; only the image's own hidden units are predicted, not the partner's."""

    def pretrain(
        self, pixels_BCHW: Tensor, from_partner_MU: Tensor, partner_units: int | None = None
    ) -> PretrainingOutput:
        """As in `MixMIM`; the decoder sees one view per image."""
        tokens_BHWD = self.patch_embed(pixels_BCHW)
        encoded_BUD = self.encode_mixed(tokens_BHWD, tokens_BHWD.flip(0), from_partner_MU, partner_units)
        predicted_BUP = self.decode_one(encoded_BUD, from_partner_MU)
        return PretrainingOutput(
            self.loss_of_hidden(predicted_BUP, pixels_BCHW, from_partner_MU), encoded_BUD, predicted_BUP
        )

    def decode_one(self, encoded_BUD: Tensor, hidden_MU: Tensor) -> Tensor:
        """Predicted units (B, U, P) from the view in which the hidden ones are mask tokens."""
        x_BUD = self.decoder_embed(encoded_BUD)
        return self.predict(torch.where(hidden_MU.unsqueeze(-1), self.mask_token.to(x_BUD.dtype), x_BUD))

    def loss_of_hidden(self, predicted_BUP: Tensor, pixels_BCHW: Tensor, hidden_MU: Tensor) -> Tensor:
        """Mean squared error over the hidden units."""
        error_BU = (predicted_BUP.float() - self.targets(to_units(pixels_BCHW))).square().mean(dim=-1)
        return (error_BU * hidden_MU).sum() / (len(error_BU) * hidden_MU.sum())


class MaskTokens(AttentionAcross, SingleReconstruction):
    """A learned token replaces the partner's, as in SimMIM (arXiv 2111.09886); all tokens attend to all."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch)
        self.encoder_mask_token = nn.Parameter(torch.empty(1, 1, 1, arch.embed_dim))
        nn.init.trunc_normal_(self.encoder_mask_token, std=0.02)

    def encode_mixed(
        self, own_BHWD: Tensor, partner_BHWD: Tensor, from_partner_MU: Tensor, partner_units: int | None = None
    ) -> Tensor:
        """Patch tokens with the chosen units masked, to encoded tokens (B, U, D)."""
        token = self.encoder_mask_token.to(own_BHWD.dtype).expand_as(own_BHWD)
        return super().encode_mixed(own_BHWD, token, from_partner_MU)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    model: type[MixMIM] = MixMIM
    mask_ratio: float = 0.5
    seed: int = 0


VARIANTS = (
    Variant("mixmim"),
    Variant("mixmim, another seed", seed=1),
    Variant("mask tokens for mixing", MaskTokens),
    Variant("attention across both images", AttentionAcross),
    Variant("one reconstruction", SingleReconstruction),
    Variant("mask ratio 0.25", mask_ratio=0.25),
    Variant("mask ratio 0.75", mask_ratio=0.75),
)


def main() -> None:
    """Pretrain and evaluate every variant, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="images to pretrain on")
    parser.add_argument("data", type=Path, help="folder of the labelled sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    tiny, source = tiny_cpu().with_epochs(arguments.epochs), open_source(arguments.images)
    for variant in VARIANTS:
        config = dataclasses.replace(tiny, mask_ratio=variant.mask_ratio, seed=variant.seed)
        run = folder_of(variant, arguments.out)
        if train(Pretraining(config, source, model=variant.model), source, run, resume=run.exists()) is None:
            raise SystemExit("stopped; the same command resumes")
        record(run / "judged.json", evaluate, run / "final.safetensors", arguments.data)
    table = "\n".join(rows(arguments.out)) + "\n"
    with atomic_path(arguments.out / "results.md") as path:
        path.write_text(table)
    print(table)


def folder_of(variant: Variant, out: Path) -> Path:
    """The run folder of a variant."""
    return out / variant.name.replace(",", "").replace(" ", "-")


def evaluate(checkpoint: Path, data: Path) -> dict[str, float]:
    """Top-1 of frozen features, in percent, by the plain encoder on unmixed images."""
    start = read_start(checkpoint)
    arch = dataclasses.replace(start.description.arch, decoder=None)
    model = Encoder(arch)
    model.load_state_dict({name: start.weights[name] for name in model.state_dict()})
    description = dataclasses.replace(start.description, arch=arch)
    measured = {}
    for photos in SETS:
        result = probe(model, description, *photos.open(data), ALONE)
        measured[f"{photos.name}, k-NN"] = result.neighbours[NEAREST].top1
        measured[f"{photos.name}, linear"] = result.linear.top1
    return measured


def rows(out: Path) -> Iterator[str]:
    """The lines of a Markdown table."""
    results = {v.name: json.loads((folder_of(v, out) / "judged.json").read_text()) for v in VARIANTS}
    measures = list(results[VARIANTS[0].name])
    yield f"| variant | {' | '.join(measures)} |"
    yield "|---" * (len(measures) + 1) + "|"
    for name, values in results.items():
        yield f"| {name} | {' | '.join(f'{values[measure]:.1f}' for measure in measures)} |"


if __name__ == "__main__":
    main()
