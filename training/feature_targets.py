"""Beyond the paper: the network also predicts features of whole photos, and recognises a photo by its other half.

Two losses beside the reconstruction, each with a weight of its own. Input, masked attention and the two
reconstructions stay MixMIM's.

features     the decoder predicts each hidden unit's features. Targets are data2vec's (arXiv 2202.03555, section 3.3):
             outputs of the top blocks, each normalised per token, averaged, and normalised, of an exponential moving
             average of the network's weights on the whole photo.
embeddings   a photo is visible in two mixtures, its own and its partner's. These two halves, of two crops, are to be
             told from all others of the batch: SimCLR's loss (arXiv 2002.05709) without another pass of the network.

Shape suffixes as in `mixmim_serve/model/mixmim.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmim_serve.config import units_from_partner
from mixmim_serve.errors import ConfigError
from mixmim_serve.model import Encoder, MixMIM
from mixmim_serve.model.blocks import Stage, initialize
from mixmim_serve.model.mixmim import where_hidden
from training.config import PretrainConfig
from training.task import MeanReadings

EPS = 1e-5  # added to a channel's variance
PROJECTED = 128  # channels in which embeddings are compared
TEMPERATURE = 0.2  # of their cosine similarities


class FeatureObjective(MeanReadings):
    """The weighted sum of the losses.

    Raises:
        ConfigError: when the network has no decoder.
    """

    def __init__(self, model: MixMIM, config: PretrainConfig) -> None:
        super().__init__()
        if model.arch.decoder is None:
            raise ConfigError("features are predicted by a decoder: this architecture has none.")
        self.model: MixMIM = model
        self.config = config
        self.partner_units = units_from_partner(model.arch.units, config.mask_ratio)
        self.average = copy.deepcopy(model).requires_grad_(False)
        names = ["pixel_loss"]
        if config.feature_weight:
            names += ["feature_loss", "target_std"]
            self.feature_pred = nn.Linear(model.arch.decoder.dim, model.arch.embedding_size)
            self.feature_pred.apply(initialize)
        if config.embedding_weight:
            names += ["embedding_loss"]
            self.projector = two_layers(model.arch.embedding_size, model.arch.embedding_size, PROJECTED)
            self.crops = config.embedding_crops
        self.log_means_of(names)

    @property
    def kept(self) -> Encoder:
        """See `Objective`."""
        return self.average if self.config.final_weights == "average" else self.model

    def train(self, mode: bool = True) -> FeatureObjective:
        """As of any module; the average stays in evaluation mode."""
        super().train(mode)
        self.average.eval()
        return self

    def forward(self, pixels_BCHW: Tensor, from_partner_MU: Tensor) -> Tensor:
        """The loss, a scalar; two crops of a photo are one below the other, the second for its place as partner."""
        own_BCHW, *others = pixels_BCHW.chunk(self.crops, dim=2)
        output = self.model.pretrain(own_BCHW, from_partner_MU, self.partner_units, *others)
        loss, read = self.config.pixel_weight * output.loss, [output.loss]
        if self.config.feature_weight:
            targets_BUD, target_std = self.targets(own_BCHW, from_partner_MU, *others)
            predicted_BUD = where_hidden(self.feature_pred(output.decoded_2BUD).float(), from_partner_MU)
            feature_loss = F.smooth_l1_loss(predicted_BUD, targets_BUD)
            loss, read = loss + self.config.feature_weight * feature_loss, [*read, feature_loss, target_std]
        if self.config.embedding_weight:
            embedding_loss = same_photo(self.projector(embeddings_of_halves(output.encoded_BUD, from_partner_MU)))
            loss, read = loss + self.config.embedding_weight * embedding_loss, [*read, embedding_loss]
        self.note(read)
        return loss

    @torch.no_grad()
    def targets(
        self, own_BCHW: Tensor, from_partner_MU: Tensor, others_BCHW: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What to predict for each unit of the whole photos, float32 (B, U, D), and its spread before the last norm."""
        mean_BUD = self.features(own_BCHW)
        if others_BCHW is not None:
            mean_BUD = torch.where(from_partner_MU.unsqueeze(-1), mean_BUD, self.features(others_BCHW))
        return normalised(mean_BUD, self.config.feature_norm), spread(mean_BUD)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """The average's features of whole photos, float32 (B, U, D)."""
        return mean_of_blocks(last_blocks(self.average, pixels_BCHW, self.config.feature_blocks))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the average towards the weights."""
        share = 1 - momentum(progress, self.config)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), share)

    def resume_state(self) -> dict[str, Any]:
        """See `Objective`."""
        heads = {name: module.state_dict() for name, module in self.named_children() if name != "model"}
        return heads | {"sums": self.sums}

    def load_resume_state(self, state: Mapping[str, Any]) -> None:
        """See `Objective`."""
        for name, module in self.named_children():
            if name != "model":
                module.load_state_dict(state[name])
        self.sums.copy_(state["sums"])


def two_layers(size: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, ReLU, linear."""
    layers = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, out))
    layers.apply(initialize)
    return layers


def embeddings_of_halves(encoded_BUD: Tensor, from_partner_MU: Tensor) -> Tensor:
    """Mean over the visible units of each photo, (2B, D): in its own mixture (first B), and in its partner's."""
    partner_MU1 = from_partner_MU.unsqueeze(-1).to(encoded_BUD.dtype)
    own_BD = (encoded_BUD * (1 - partner_MU1)).sum(dim=1) / (1 - partner_MU1).sum(dim=1)
    partner_BD = (encoded_BUD * partner_MU1).sum(dim=1) / partner_MU1.sum(dim=1)
    return torch.cat([own_BD, partner_BD.flip(0)])


def same_photo(projected_2BP: Tensor) -> Tensor:
    """Which other view of the batch is of the same photo? Cross-entropy over cosine similarities, float32.

    Row i and row B + i are of one photo.
    """
    with torch.autocast(projected_2BP.device.type, enabled=False):  # a similarity needs more digits than bf16 has
        unit_2BP = F.normalize(projected_2BP.float())
        rows = torch.arange(len(unit_2BP), device=unit_2BP.device)
        itself = rows[:, None] == rows
        similarity = (unit_2BP @ unit_2BP.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        return F.cross_entropy(similarity, rows.roll(len(rows) // 2))


def last_blocks(encoder: Encoder, pixels_BCHW: Tensor, count: int) -> list[Tensor]:
    """Outputs of the last `count` blocks of the last stage (all of them if it has fewer), each (B, U, D)."""
    tokens_BHWD = encoder.add_position(encoder.patch_embed(pixels_BCHW))
    *earlier, last = cast(Iterable[Stage], encoder.layers)
    for stage in earlier:
        tokens_BHWD = stage.downsample(stage(tokens_BHWD))
    return [output_BHWD.flatten(1, 2) for output_BHWD in last.each_block(tokens_BHWD)[-count:]]


def mean_of_blocks(blocks_BUD: list[Tensor]) -> Tensor:
    """The mean of the blocks' outputs, each normalised over the channels of a token, float32 (B, U, D)."""
    return torch.stack([F.layer_norm(block_BUD.float(), block_BUD.shape[-1:]) for block_BUD in blocks_BUD]).mean(dim=0)


def normalised(features_BUD: Tensor, norm: str) -> Tensor:
    """`token`: mean 0 and deviation 1 over a token's channels. `batch`: over all tokens of a batch, in each channel.

    So features that shrink towards zero are no solution; nor, with `batch`, are equal tokens.
    """
    if norm == "token":
        return F.layer_norm(features_BUD, features_BUD.shape[-1:])
    variance_D, mean_D = torch.var_mean(features_BUD, dim=(0, 1), correction=0)
    return (features_BUD - mean_D) * (variance_D + EPS).rsqrt()


def spread(features_BUD: Tensor) -> Tensor:
    """Mean over the channels of the deviation over all tokens of a batch: 1 at most, 0 when all tokens are equal."""
    return features_BUD.flatten(0, 1).std(dim=0, correction=0).mean()


def momentum(progress: float, config: PretrainConfig) -> float:
    """The average's share of its old value: rises along half a cosine from the first to the last (BYOL's schedule).

    `progress` is the share of the run's steps before this one. Source: arXiv 2006.07733, section 3.3.
    """
    start, end = config.ema_momentum, config.ema_final_momentum
    return end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * progress))
