"""What each part of MixMIM is worth, in the small: the same pretraining with one thing changed, then judged.

    python benchmarks/ablation.py photos runs/ablation --epochs 5

The variants are those of the paper's ablation (arXiv 2205.13137, section 4.3): mask tokens instead of mixing, one
reconstruction instead of two, attention across the two images, and other mask ratios. Each keeps network size, images,
order, augmentation, steps and schedule of the first. A run that is finished is passed over, one that was cut goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from mixmim_serve.config import Architecture
from mixmim_serve.model import MixMIM
from mixmim_serve.model.mixmim import PretrainingOutput, to_units
from mixmim_serve.sources import open_source
from training.pretraining import Pretraining
from training.recipes import tiny_cpu
from training.trainer import train


class AttentionAcross(MixMIM):
    """Mixes as always; tokens also attend to the other image's."""

    def run_stages(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> list[Tensor]:
        """Every stage's tokens, with no attention blocked."""
        return super().run_stages(tokens_BHWD, None)


class SingleReconstruction(MixMIM):
    """Mixes as always; only the image's own hidden units are predicted, none of the partner's."""

    def pretrain(
        self, pixels_BCHW: Tensor, from_partner_MU: Tensor, partner_units: int | None = None
    ) -> PretrainingOutput:
        """As in `MixMIM`; the decoder sees one view an image."""
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
    """A learned token stands where the partner would, as in SimMIM (arXiv 2111.09886); all tokens attend to all."""

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


VARIANTS = (
    Variant("mixmim"),
    Variant("mask-tokens", MaskTokens),
    Variant("attention-across", AttentionAcross),
    Variant("single-reconstruction", SingleReconstruction),
    Variant("ratio-0.25", mask_ratio=0.25),
    Variant("ratio-0.75", mask_ratio=0.75),
)


def main() -> None:
    """Pretrain every variant, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="what to pretrain on")
    parser.add_argument("out", type=Path, help="a folder for the runs, one each")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    tiny, source = tiny_cpu().lasting(arguments.epochs), open_source(arguments.images)
    for variant in VARIANTS:
        config = dataclasses.replace(tiny, mask_ratio=variant.mask_ratio)
        run = arguments.out / variant.name
        train(Pretraining(config, source, model=variant.model), source, run, resume=run.exists())


if __name__ == "__main__":
    main()
