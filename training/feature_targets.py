"""Beyond the paper: the network also predicts features, those of an average of itself on whole, unmixed photos.

Two losses beside the reconstruction, each with a weight of its own. Both take their targets from an exponential moving
average of the network's weights; input, masked attention and the two reconstructions stay MixMIM's.

features     the decoder predicts each hidden unit's features. Targets are data2vec's (arXiv 2202.03555, section 3.3):
             outputs of the top blocks, each normalised per token, averaged, and normalised.
embeddings   what is visible of a photo in a mixture is to be told from the batch's other photos by the embedding of
             another crop, whole: MoCo v3's loss and heads (arXiv 2104.02057), where iBOT (2111.07832) matches its
             [CLS] tokens.

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
from mixmim_serve.model import Encoder, EncoderOutput, MixMIM
from mixmim_serve.model.encoder import Stage, initialize
from mixmim_serve.model.mixmim import where_hidden
from training.config import PretrainConfig
from training.distributed import World
from training.task import Objective

EPS = 1e-5  # added to a channel's variance
PROJECTED = 128  # channels in which embeddings are compared
TEMPERATURE = 0.2  # of their cosine similarities


class FeatureObjective(Objective):
    """The weighted sum of the losses.

    Raises:
        ConfigError: when the network has no decoder.
    """

    sums: Tensor

    def __init__(self, model: MixMIM, config: PretrainConfig) -> None:
        super().__init__()
        if model.arch.decoder is None:
            raise ConfigError("features are predicted by a decoder: this architecture has none.")
        self.model: MixMIM = model
        self.config = config
        self.partner_units = units_from_partner(model.arch.units, config.mask_ratio)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.names = ["pixel_loss"]
        if config.feature_weight:
            self.names += ["feature_loss", "target_std"]
            self.feature_pred = nn.Linear(model.arch.decoder.dim, model.arch.embedding_size)
            self.feature_pred.apply(initialize)
        if config.embedding_weight:
            self.names += ["embedding_loss"]
            self.matching = PhotoMatching(model.arch.embedding_size)
            self.crops = 2
        # Of what the log reads since its last line, and of the steps. One tensor, so that a compiled step can add.
        self.register_buffer("sums", torch.zeros(len(self.names) + 1), persistent=False)

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
        """The loss, a scalar; of two crops, one below the other, the first is mixed."""
        mixed_BCHW, *others = pixels_BCHW.chunk(self.crops, dim=2)
        output = self.model.pretrain(mixed_BCHW, from_partner_MU, self.partner_units)
        loss, read = self.config.pixel_weight * output.loss, [output.loss]
        if self.config.feature_weight:
            targets_BUD, target_std = self.targets(mixed_BCHW)
            predicted_BUD = where_hidden(self.feature_pred(output.decoded_2BUD).float(), from_partner_MU)
            feature_loss = F.smooth_l1_loss(predicted_BUD, targets_BUD)
            loss, read = loss + self.config.feature_weight * feature_loss, [*read, feature_loss, target_std]
        if self.config.embedding_weight:
            embedding_loss = self.matching(output.encoded_BUD, from_partner_MU, self.embeddings(others[0]))
            loss, read = loss + self.config.embedding_weight * embedding_loss, [*read, embedding_loss]
        self.sums += torch.stack([*(each.detach().float() for each in read), torch.ones_like(self.sums[0])])
        return loss

    @torch.no_grad()
    def targets(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """What to predict for each unit of the whole photos, float32 (B, U, D), and its spread before the last norm."""
        mean_BUD = mean_of_blocks(last_blocks(self.average, pixels_BCHW, self.config.feature_blocks))
        return normalised(mean_BUD, self.config.feature_norm), spread(mean_BUD)

    @torch.no_grad()
    def embeddings(self, pixels_BCHW: Tensor) -> Tensor:
        """The average's embeddings of whole photos (B, D)."""
        output: EncoderOutput = self.average(pixels_BCHW)
        return output.embedding_BD

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the average towards the weights."""
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.average, self.model)]
        if self.config.embedding_weight:
            pairs.append((self.matching.average, self.matching.projector))
        for average, module in pairs:
            share = 1 - momentum(progress, self.config)
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), share)

    def readings(self, world: World) -> dict[str, float]:
        """See `Objective`."""
        *means, _ = world.mean(self.sums / self.sums[-1]).tolist()
        self.sums.zero_()
        return {name: round(value, 6) for name, value in zip(self.names, means, strict=True)}

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


class PhotoMatching(nn.Module):
    """Which photo of the batch is this the visible half of? Cross-entropy over cosine similarities, as in MoCo v3.

    Its heads are those of MoCo v3 without batch norm: a projector, of which the targets take the moving average, and a
    predictor on top for the mixtures only.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.projector = two_layers(size, size, PROJECTED)
        self.predictor = two_layers(PROJECTED, size, PROJECTED)
        self.average = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, encoded_BUD: Tensor, from_partner_MU: Tensor, whole_BD: Tensor) -> Tensor:
        """The loss, a scalar, for encoded mixtures and the embeddings of the whole photos; float32."""
        seen_2BD = embeddings_of_halves(encoded_BUD, from_partner_MU)
        asked_2BP = F.normalize(self.predictor(self.projector(seen_2BD)).float())
        with torch.no_grad():
            photos_BP = F.normalize(self.average(whole_BD).float())
        photo_2B = torch.arange(len(whole_BD), device=whole_BD.device).repeat(2)
        return F.cross_entropy(asked_2BP @ photos_BP.T / TEMPERATURE, photo_2B)


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


def last_blocks(encoder: Encoder, pixels_BCHW: Tensor, count: int) -> list[Tensor]:
    """Outputs of the last `count` blocks of the last stage (all of them if it has fewer), each (B, U, D)."""
    tokens_BHWD = encoder.add_position(encoder.patch_embed(pixels_BCHW))
    *earlier, last = cast(Iterable[Stage], encoder.layers)
    for stage in earlier:
        tokens_BHWD = stage.downsample(stage(tokens_BHWD))
    x_BKND, outputs = last.to_windows(tokens_BHWD), []
    for block in last.blocks:
        x_BKND = block(x_BKND)
        outputs.append(last.from_windows(x_BKND).flatten(1, 2))
    return outputs[-count:]


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
