"""A small ablation of MixMIM: the same pretraining with one thing changed, then evaluated frozen and fine-tuned.

    python -m benchmarks.ablation photos data --out runs/ablation --epochs 25

The variants are those of the paper's ablation (arXiv 2205.13137, section 4.3): mask tokens instead of mixing, one
reconstruction instead of two, attention across the two images, and other mask ratios. Each keeps network size, images,
order, augmentation, steps and schedule of the first. The first, third and fourth have two seeds, unless `--seeds`
gives others: differences smaller than between two seeds are noise. Frozen features (k-NN, k = 10; linear; 5-shot) and
fine-tuning (`--tune` epochs of `tiny-finetune-cpu`, 0 for none) are evaluated on the sets of `benchmarks/learning.py`
under DATA. Finished runs are skipped, interrupted ones resume; OUT/results.md and OUT/results.json are rewritten after
each.
"""

from __future__ import annotations

import benchmarks.sleeping  # noqa: F401

# isort: split
import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.learning import SETS, record
from benchmarks.runs import figures, folder_of, frozen, parser, trained, tuned_all, write_table
from mixmim_serve.config import Architecture
from mixmim_serve.model import MixMIM
from mixmim_serve.model.mixmim import PretrainingOutput, to_units
from mixmim_serve.sources import Source, open_source
from training.config import PretrainConfig
from training.pretraining import Pretraining
from training.recipes import tiny_cpu


class SingleReconstruction(MixMIM):
    """Standard mixing; only the image's own hidden units are predicted, not the partner's."""

    def pretrain(
        self, pixels_BCHW: Tensor, from_partner_MU: Tensor, partner_units: int | None = None
    ) -> PretrainingOutput:
        """As in `MixMIM`; the decoder sees one view per image."""
        tokens_BHWD = self.patch_embed(pixels_BCHW)
        encoded_BUD = self.encode_mixed(tokens_BHWD, tokens_BHWD.flip(0), from_partner_MU, partner_units)
        x_BUD = self.decoder_embed(encoded_BUD)
        decoded_BUD = self.complete(torch.where(from_partner_MU.unsqueeze(-1), self.mask_token.to(x_BUD.dtype), x_BUD))
        predicted_BUP = self.decoder_pred(decoded_BUD)
        loss = self.loss_of_hidden(predicted_BUP, pixels_BCHW, from_partner_MU)
        return PretrainingOutput(loss, encoded_BUD, predicted_BUP, decoded_BUD)

    def loss_of_hidden(self, predicted_BUP: Tensor, pixels_BCHW: Tensor, hidden_MU: Tensor) -> Tensor:
        """Mean squared error over the hidden units."""
        error_BU = (predicted_BUP.float() - self.targets(to_units(pixels_BCHW))).square().mean(dim=-1)
        return (error_BU * hidden_MU).sum() / (len(error_BU) * hidden_MU.sum())


class MaskTokens(SingleReconstruction):
    """A learned token replaces the partner's, as in SimMIM (arXiv 2111.09886); needs `attention=across`, as there."""

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

    model: type[MixMIM] = MixMIM
    mask_ratio: float = 0.5
    attention: str = "masked"
    seeds: tuple[int, ...] = (0,)

    def config(self, epochs: int, seed: int) -> PretrainConfig:
        """The recipe as this variant changes it."""
        recipe = dataclasses.replace(tiny_cpu().with_epochs(epochs), seed=seed, keep_every=1000)
        return dataclasses.replace(recipe, mask_ratio=self.mask_ratio, attention=self.attention)

    def task(self, config: PretrainConfig, source: Source | None) -> Pretraining:
        """What to train."""
        return Pretraining(config, source if self.model is MixMIM else None, model=self.model)


VARIANTS = {
    "mixmim": Variant(seeds=(0, 1)),
    "mask tokens for mixing": Variant(MaskTokens, attention="across"),
    "attention across both images": Variant(attention="across", seeds=(0, 1)),
    "one reconstruction": Variant(SingleReconstruction, seeds=(0, 1)),
    "mask ratio 0.25": Variant(mask_ratio=0.25),
    "mask ratio 0.75": Variant(mask_ratio=0.75),
}


def main() -> None:
    """Run what is missing, then write the table: the first seed of every variant comes first."""
    options = parser(__doc__, VARIANTS, epochs=25)
    options.add_argument("--tune", type=int, default=10, help="epochs of fine-tuning; 0 for none")
    arguments = options.parse_args()
    source = open_source(arguments.images)
    for name, seed in planned(arguments):
        variant, run = VARIANTS[name], folder_of(arguments.out, name, seed)
        trained(variant.task(variant.config(arguments.epochs, seed), source), source, run)
        record(run / "judged.json", judge, run, arguments.data, arguments.tune, seed)
        write_table(arguments.out, VARIANTS)


def planned(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Variants with seeds, ordered by the place of the seed among its variant's."""
    rounds = [
        (place, name, seed)
        for name in arguments.only
        for place, seed in enumerate(arguments.seeds or VARIANTS[name].seeds)
    ]
    return [(name, seed) for _, name, seed in sorted(rounds, key=lambda each: each[0])]


def judge(run: Path, data: Path, epochs: int, seed: int) -> dict[str, float]:
    """Top-1 in percent of frozen features, by the plain encoder on unmixed images, and after fine-tuning."""
    final = run / "final.safetensors"
    return frozen(final, data, SETS, knn_only=False) | tuned_all(final, data, SETS, run, epochs, seed) | figures(run)


if __name__ == "__main__":
    main()
