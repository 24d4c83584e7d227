"""The encoder, from pixels to embedding: four stages of one family at strides 4, 8, 16 and 32.

Here stands what every family shares. `windows.py` has the stages of MixMIM, `swin.py` those of Swin, `pvt.py` those of
PVT; `BACKBONES` says which is whose. Parameter names of MixMIM and Swin are the official ones.

Shape suffixes:
    B images   C colour channels   H, W grid   L tokens (H * W)   D channels of a token
    K windows of an image   N tokens of a window   A attention heads   U units (32 x 32 pixels)
    M masks: 1 when the batch shares one, else B
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from mixmim_serve.config import STAGES, Architecture
from mixmim_serve.model.blocks import PatchEmbed, Stage, initialize, initialize_narrow, position_embedding
from mixmim_serve.model.pvt import NORM_EPS, PvtStage
from mixmim_serve.model.swin import SwinStage
from mixmim_serve.model.windows import WindowStage


@dataclass(frozen=True)
class Backbone:
    """How a family is built; `mixmim_serve.families` has what is known of it without torch."""

    stage: Callable[[Architecture, int], Stage]  # the stage of this number, counted from 0
    initialize: Callable[[nn.Module], None]
    norm_eps: float = 1e-5  # of the last norm


BACKBONES = {
    "mixmim": Backbone(WindowStage, initialize),
    "swin": Backbone(SwinStage, initialize_narrow),
    "pvt": Backbone(PvtStage, initialize_narrow, NORM_EPS),
}


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder computes for a batch of images."""

    embedding_BD: Tensor  # after the final norm: mean over tokens, or the class token
    stages_BDHW: tuple[Tensor, ...]  # feature maps at strides 4, 8, 16, 32, before downsampling and the final norm
    logits_BC: Tensor | None  # None without a classification head


class Encoder(nn.Module):
    """Pixels to feature maps, embedding and, with a head, logits."""

    absolute_pos_embed: Tensor | None

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        backbone = BACKBONES[arch.family]
        self.patch_embed = PatchEmbed(arch.embed_dim)
        frozen = position_embedding(arch.grids[0], arch.embed_dim) if arch.facts.frozen_positions else None
        self.register_buffer("absolute_pos_embed", frozen)
        self.layers = nn.ModuleList(backbone.stage(arch, stage) for stage in range(STAGES))
        self.norm = nn.LayerNorm(arch.embedding_size, eps=backbone.norm_eps)
        if arch.num_classes:
            self.head = nn.Linear(arch.embedding_size, arch.num_classes)
        self.apply(backbone.initialize)

    def forward(self, pixels_BCHW: Tensor) -> EncoderOutput:
        """Normalised pixels (B, 3, size, size) to embedding, feature maps and logits."""
        stages = self.run_stages(self.add_position(self.patch_embed(pixels_BCHW)))
        normed = self.norm(stages[-1])
        if self.arch.class_token:
            embedding_BD = normed[:, 0]
            stages[-1] = stages[-1][:, 1:].reshape(-1, *[self.arch.grids[-1]] * 2, self.arch.embedding_size)
        else:
            embedding_BD = normed.mean(dim=(1, 2))
        logits_BC = self.head(embedding_BD) if self.arch.num_classes else None
        return EncoderOutput(embedding_BD, tuple(stage.permute(0, 3, 1, 2) for stage in stages), logits_BC)

    def add_position(self, tokens_BHWD: Tensor) -> Tensor:
        """Add the frozen position embedding, if the family has one."""
        if self.absolute_pos_embed is None:
            return tokens_BHWD
        return tokens_BHWD + self.absolute_pos_embed.view(1, *tokens_BHWD.shape[1:])

    def run_stages(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> list[Tensor]:
        """Every stage's tokens (B, H, W, D), before its downsampling; the last may have a class token (`PvtStage`).

        `from_partner_MU` is True for the units taken from the partner image: tokens then attend only within their own
        image. `partner_units` is their number, if the caller knows it and all images share the mask: a stage can then
        do with less work.
        """
        stages = []
        for layer in cast(Iterable[Stage], self.layers):
            tokens_BHWD = layer(tokens_BHWD, from_partner_MU, partner_units)
            stages.append(tokens_BHWD)
            tokens_BHWD = layer.downsample(tokens_BHWD)
        return stages
