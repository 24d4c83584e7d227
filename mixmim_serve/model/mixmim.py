"""MixMIM pretraining: mix two images, encode, decode both, compare (arXiv 2205.13137, section 3).

The pretraining model is the plain encoder plus mixing and a decoder. Shape suffixes as in `encoder.py`, and
P for the 32 * 32 * 3 pixel values of a unit. `from_partner_MU` is True where a unit was taken from the partner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixmim_serve.config import TARGET_EPS, UNIT_SIZE, Architecture, units_from_partner
from mixmim_serve.errors import ConfigError
from mixmim_serve.model.attention import Attention
from mixmim_serve.model.blocks import Block, initialize, position_embedding
from mixmim_serve.model.encoder import Encoder


@dataclass(frozen=True)
class PretrainingOutput:
    """One pretraining forward pass."""

    loss: Tensor  # scalar
    encoded_BUD: Tensor  # tokens of the mixed images after the final norm
    predicted_2BUP: Tensor  # per mixed image: the view of its own tokens (first B), that of the partner's (last B)
    decoded_2BUD: Tensor  # the decoder's tokens that gave them, after its norm


@dataclass(frozen=True)
class Reconstruction:
    """Pairs of images, mixed and reconstructed; all (B, 3, size, size), normalised pixels."""

    mixed: Tensor  # image a with the chosen units of image b
    image_a: Tensor  # image a where it was visible, predicted where b covered it
    image_b: Tensor  # image b where it was visible, predicted elsewhere


class MixMIM(Encoder):
    """The encoder with mixing and a decoder; `arch.decoder` must be set.

    Raises:
        ConfigError: when the architecture has no decoder.
    """

    decoder_pos_embed: Tensor
    attends_across = False  # whether tokens of a mixed image attend to both images: an ablation, not the paper

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch)
        decoder = arch.decoder
        if decoder is None:
            raise ConfigError("this architecture has no decoder: use Encoder, or give it a DecoderConfig.")
        self.normalize_targets = decoder.normalize_targets
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_buffer("decoder_pos_embed", position_embedding(arch.grids[-1], decoder.dim))
        self.decoder_embed = nn.Linear(arch.embedding_size, decoder.dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder.dim, Attention(decoder.dim, decoder.heads), decoder.norm_eps) for _ in range(decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder.dim, eps=decoder.norm_eps)
        self.decoder_pred = nn.Linear(decoder.dim, UNIT_SIZE * UNIT_SIZE * 3)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(initialize)

    def pretrain(
        self,
        pixels_BCHW: Tensor,
        from_partner_MU: Tensor,
        partner_units: int | None = None,
        others_BCHW: Tensor | None = None,
    ) -> PretrainingOutput:
        """Mix image i with image B - 1 - i, reconstruct both, and measure how well.

        `partner_units`: how many units of a shared mask are True, if known; it makes the step faster (`run_stages`).
        `others_BCHW`: other crops of the same images, for their places as partners; by default the same.
        """
        tokens_BHWD = partner_BHWD = self.patch_embed(pixels_BCHW)
        if others_BCHW is not None:
            partner_BHWD = self.patch_embed(others_BCHW)
            pixels_BCHW = hidden_parts(pixels_BCHW, others_BCHW, from_partner_MU)
        encoded_BUD = self.encode_mixed(tokens_BHWD, partner_BHWD.flip(0), from_partner_MU, partner_units)
        decoded_2BUD = self.complete(self.views(encoded_BUD, from_partner_MU))
        predicted_2BUP = self.decoder_pred(decoded_2BUD)
        loss = self.reconstruction_loss(predicted_2BUP, pixels_BCHW, from_partner_MU)
        return PretrainingOutput(loss, encoded_BUD, predicted_2BUP, decoded_2BUD)

    def reconstruct(self, a_BCHW: Tensor, b_BCHW: Tensor, from_partner_MU: Tensor) -> Reconstruction:
        """Mix pairs of images and predict what each hides of the other.

        Predictions of a model with normalised targets are scaled back with the hidden unit's own mean and deviation,
        so brightness and contrast of a predicted unit come from the original (reference: MAE's visualisation).
        """
        a_tokens, b_tokens = halves(self.patch_embed(torch.cat([a_BCHW, b_BCHW])))
        predicted_2BUP = self.decode(self.encode_mixed(a_tokens, b_tokens, from_partner_MU), from_partner_MU)
        a_predicted, b_predicted = halves(predicted_2BUP)
        from_b = from_partner_MU.unsqueeze(-1)
        a_BUP, b_BUP = to_units(a_BCHW), to_units(b_BCHW)
        return Reconstruction(
            mixed=from_units(torch.where(from_b, b_BUP, a_BUP)),
            image_a=from_units(torch.where(from_b, self.to_pixels(a_predicted, a_BUP), a_BUP)),
            image_b=from_units(torch.where(from_b, b_BUP, self.to_pixels(b_predicted, b_BUP))),
        )

    def encode_mixed(
        self, own_BHWD: Tensor, partner_BHWD: Tensor, from_partner_MU: Tensor, partner_units: int | None = None
    ) -> Tensor:
        """Patch tokens of two images to encoded tokens (B, U, D) of their mixture."""
        mixed_BHWD = mix(own_BHWD, partner_BHWD, from_partner_MU)
        separated_MU = None if self.attends_across else from_partner_MU
        last_BHWD = self.run_stages(self.add_position(mixed_BHWD), separated_MU, partner_units)[-1]
        encoded: Tensor = self.norm(last_BHWD).flatten(1, 2)
        return encoded

    def decode(self, encoded_BUD: Tensor, from_partner_MU: Tensor) -> Tensor:
        """Encoded tokens to predicted units (2B, U, P)."""
        return self.predict(self.views(encoded_BUD, from_partner_MU))

    def views(self, encoded_BUD: Tensor, from_partner_MU: Tensor) -> Tensor:
        """Decoder input (2B, U, D): mask tokens stand first for the partner's tokens, then for the own."""
        x_BUD = self.decoder_embed(encoded_BUD)
        mask_token = self.mask_token.to(x_BUD.dtype)
        from_partner = from_partner_MU.unsqueeze(-1)
        return torch.cat([torch.where(from_partner, mask_token, x_BUD), torch.where(from_partner, x_BUD, mask_token)])

    def predict(self, x_BUD: Tensor) -> Tensor:
        """Decoder tokens of views, hidden ones already mask tokens, to predicted units (B, U, P)."""
        predicted: Tensor = self.decoder_pred(self.complete(x_BUD))
        return predicted

    def complete(self, x_BUD: Tensor) -> Tensor:
        """The decoder's blocks and norm, (B, U, D) to the same shape."""
        x_BKUD = (x_BUD + self.decoder_pos_embed).unsqueeze(1)
        for block in self.decoder_blocks:
            x_BKUD = block(x_BKUD)
        completed: Tensor = self.decoder_norm(x_BKUD).squeeze(1)
        return completed

    def reconstruction_loss(self, predicted_2BUP: Tensor, pixels_BCHW: Tensor, from_partner_MU: Tensor) -> Tensor:
        """Mean squared error over all units, each predicted from the view in which it was hidden."""
        predicted_BUP = where_hidden(predicted_2BUP.float(), from_partner_MU)
        return (predicted_BUP - self.targets(to_units(pixels_BCHW))).square().mean()

    def targets(self, units_BUP: Tensor) -> Tensor:
        """What the decoder should predict for these units, (B, U, P)."""
        if not self.normalize_targets:
            return units_BUP
        mean, deviation = unit_statistics(units_BUP)
        return (units_BUP - mean) / deviation

    def to_pixels(self, predicted_BUP: Tensor, original_BUP: Tensor) -> Tensor:
        """The inverse of `targets`, with the original units' statistics."""
        if not self.normalize_targets:
            return predicted_BUP
        mean, deviation = unit_statistics(original_BUP)
        return predicted_BUP * deviation + mean


def halves(x_2B: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last B of 2B items; `chunk` would fix B when the graph is traced for export."""
    first, last = x_2B.reshape(2, -1, *x_2B.shape[1:]).unbind(0)
    return first, last


def where_hidden(predicted_2BUX: Tensor, from_partner_MU: Tensor) -> Tensor:
    """Each image's units, (B, U, X), each from the view in which it was hidden; undoes the pairing."""
    own_BUX, partner_BUX = halves(predicted_2BUX)
    return torch.where(from_partner_MU.unsqueeze(-1), own_BUX, partner_BUX.flip(0))


def hidden_parts(own_BCHW: Tensor, others_BCHW: Tensor, from_partner_MU: Tensor) -> Tensor:
    """For two crops of each image, the units that are to be predicted: hidden in its own mixture, in its partner's."""
    return from_units(torch.where(from_partner_MU.unsqueeze(-1), to_units(own_BCHW), to_units(others_BCHW)))


def mix(own_BHWD: Tensor, partner_BHWD: Tensor, from_partner_MU: Tensor) -> Tensor:
    """Replace the chosen units' tokens by the partner's, at the same places."""
    units = math.isqrt(from_partner_MU.shape[-1])
    repeat = own_BHWD.shape[1] // units
    cells = from_partner_MU.reshape(-1, units, 1, units, 1).expand(-1, -1, repeat, -1, repeat)
    return torch.where(cells.reshape(-1, units * repeat, units * repeat, 1), partner_BHWD, own_BHWD)


def random_units(units: int, ratio: float, generator: torch.Generator) -> Tensor:
    """A mask (1, U), True for `int(units * ratio)` units drawn at random on the CPU.

    Raises:
        ConfigError: when the ratio takes no unit, or all of them.
    """
    count = units_from_partner(units, ratio)
    from_partner_MU = torch.zeros(1, units, dtype=torch.bool)
    from_partner_MU[0, torch.randperm(units, generator=generator)[:count]] = True
    return from_partner_MU


def to_units(pixels_BCHW: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, U, P), a unit's values ordered row, column, channel."""
    units = pixels_BCHW.shape[-1] // UNIT_SIZE
    cells = pixels_BCHW.reshape(-1, 3, units, UNIT_SIZE, units, UNIT_SIZE)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(-1, units * units, UNIT_SIZE * UNIT_SIZE * 3)


def from_units(units_BUP: Tensor) -> Tensor:
    """The inverse of `to_units`."""
    units = math.isqrt(units_BUP.shape[1])
    cells = units_BUP.reshape(-1, units, units, UNIT_SIZE, UNIT_SIZE, 3)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, units * UNIT_SIZE, units * UNIT_SIZE)


def unit_statistics(units_BUP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) deviation of each unit over its pixels and channels, (B, U, 1) each."""
    variance, mean = torch.var_mean(units_BUP, dim=-1, keepdim=True)
    return mean, (variance + TARGET_EPS).sqrt()
