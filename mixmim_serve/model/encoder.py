"""The MixMIM encoder, from pixels to embedding: a Swin transformer with large windows and no shifts.

Written from arXiv 2205.13137 (section 3) and Swin (arXiv 2103.14030); verified against golden arrays of the
official implementation. Parameter names are the official ones, so a released checkpoint needs no renaming.

Windows never shift, so tokens are cut into windows and merged once per stage, not in every block.

Shape suffixes:
    B images   C colour channels   H, W grid   L tokens (H * W)   D channels of a token
    K windows of an image   N tokens of a window   A attention heads   U units (32 x 32 pixels)
    M masks: 1 when the batch shares one, else B
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmim_serve.config import MLP_RATIO, PATCH_SIZE, STAGES, Architecture
from mixmim_serve.model.attention import Attention, TokenSplit, WindowAttention

# Added to the score of a token of the other image: exp underflows to exactly 0 in every precision, fp16 can hold it,
# and unlike -inf no runtime turns it into NaN. (The official code subtracts 1e30, 65500 in fp16.)
BLOCKED = -1e4


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder computes for a batch of images."""

    embedding_BD: Tensor  # after the final norm, mean over tokens
    stages_BDHW: tuple[Tensor, ...]  # feature maps at strides 4, 8, 16, 32, before patch merging and the final norm
    logits_BC: Tensor | None  # None without a classification head


class Encoder(nn.Module):
    """Pixels to feature maps, embedding and, with a head, logits."""

    absolute_pos_embed: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.patch_embed = PatchEmbed(arch.embed_dim)
        self.register_buffer("absolute_pos_embed", position_embedding(arch.grids[0], arch.embed_dim))
        self.layers = nn.ModuleList(Stage(arch, stage) for stage in range(STAGES))
        self.norm = nn.LayerNorm(arch.embedding_size)
        if arch.num_classes:
            self.head = nn.Linear(arch.embedding_size, arch.num_classes)
        self.apply(initialize)

    def forward(self, pixels_BCHW: Tensor) -> EncoderOutput:
        """Normalised pixels (B, 3, size, size) to embedding, feature maps and logits."""
        tokens_BHWD = self.add_position(self.patch_embed(pixels_BCHW))
        stages = self.run_stages(tokens_BHWD)
        embedding_BD = self.norm(stages[-1]).mean(dim=(1, 2))
        logits_BC = self.head(embedding_BD) if self.arch.num_classes else None
        return EncoderOutput(embedding_BD, tuple(stage.permute(0, 3, 1, 2) for stage in stages), logits_BC)

    def add_position(self, tokens_BHWD: Tensor) -> Tensor:
        """Add the frozen position embedding."""
        return tokens_BHWD + self.absolute_pos_embed.view(1, *tokens_BHWD.shape[1:])

    def run_stages(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> list[Tensor]:
        """Every stage's tokens (B, H, W, D), before its patch merging.

        `from_partner_MU` is True for the units taken from the partner image: tokens then attend only within their own
        image. `partner_units` is their number, if the caller knows it and all images share the mask: stages of one
        window then run two small attentions instead of a masked one.
        """
        stages = []
        for layer in cast(Iterable[Stage], self.layers):
            separation: Tensor | TokenSplit | None = None
            if from_partner_MU is not None and partner_units is not None and layer.window == layer.grid:
                separation = layer.token_split(from_partner_MU, partner_units)
            elif from_partner_MU is not None:
                separation = layer.blocked_scores(from_partner_MU, tokens_BHWD.dtype)
            tokens_BHWD = layer(tokens_BHWD, separation)
            stages.append(tokens_BHWD)
            tokens_BHWD = layer.downsample(tokens_BHWD)
        return stages


class PatchEmbed(nn.Module):
    """Pixels to tokens: 4 x 4 patches, linear, layer norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, 3, 4H, 4W) to (B, H, W, D)."""
        tokens: Tensor = self.norm(self.project(pixels_BCHW))
        return tokens

    def project(self, pixels_BCHW: Tensor) -> Tensor:
        """The convolution; in training as the same matrix product, whose backward pass is several times faster."""
        if not self.training:
            convolved: Tensor = self.proj(pixels_BCHW)
            return convolved.permute(0, 2, 3, 1)
        height, width = (side // PATCH_SIZE for side in pixels_BCHW.shape[2:])
        cells = pixels_BCHW.reshape(-1, 3, height, PATCH_SIZE, width, PATCH_SIZE).permute(0, 2, 4, 1, 3, 5)
        return F.linear(cells.flatten(3), self.proj.weight.flatten(1), self.proj.bias)


class Stage(nn.Module):
    """Blocks over one grid; `downsample` then halves it (the last stage's does nothing)."""

    def __init__(self, arch: Architecture, stage: int) -> None:
        super().__init__()
        dim, heads = arch.dims[stage], arch.heads[stage]
        self.grid = arch.grids[stage]
        self.window = min(arch.windows[stage], self.grid)
        self.blocks = nn.ModuleList(
            Block(dim, WindowAttention(dim, heads, self.window)) for _ in range(arch.depths[stage])
        )
        self.downsample = PatchMerging(dim) if stage < STAGES - 1 else nn.Identity()

    def forward(self, tokens_BHWD: Tensor, separation: Tensor | TokenSplit | None = None) -> Tensor:
        """(B, H, W, D) to the same shape; `separation` is what `blocked_scores` or `token_split` returned."""
        x_BKND = self.to_windows(tokens_BHWD)
        if isinstance(separation, TokenSplit):
            x_BKND = x_BKND[:, :, separation.order_N]
        for block in self.blocks:
            x_BKND = block(x_BKND, separation)
        if isinstance(separation, TokenSplit):
            x_BKND = x_BKND[:, :, separation.order_N.argsort()]
        return self.from_windows(x_BKND)

    def to_windows(self, tokens_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, K, N, D), windows in reading order."""
        side, window, dim = self.grid // self.window, self.window, tokens_BHWD.shape[-1]
        if side == 1:
            return tokens_BHWD.reshape(-1, 1, window * window, dim)
        cells = tokens_BHWD.reshape(-1, side, window, side, window, dim)
        return cells.transpose(2, 3).reshape(-1, side * side, window * window, dim)

    def from_windows(self, x_BKND: Tensor) -> Tensor:
        """(B, K, N, D) back to (B, H, W, D)."""
        side, window, dim = self.grid // self.window, self.window, x_BKND.shape[-1]
        if side == 1:
            return x_BKND.reshape(-1, window, window, dim)
        cells = x_BKND.reshape(-1, side, side, window, window, dim)
        return cells.transpose(2, 3).reshape(-1, self.grid, self.grid, dim)

    def blocked_scores(self, from_partner_MU: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, (M, K, N, N): 0 between tokens of one image, `BLOCKED` between the two."""
        owner_MKN = self.to_windows(self.owner(from_partner_MU).unsqueeze(-1)).squeeze(-1)
        different = owner_MKN.unsqueeze(-1) != owner_MKN.unsqueeze(-2)
        return different.to(dtype) * BLOCKED

    def token_split(self, from_partner_MU: Tensor, partner_units: int) -> TokenSplit:
        """The split by image, for a stage of one window and a mask that all images share."""
        owner_N = self.owner(from_partner_MU).flatten()
        partner = partner_units * len(owner_N) // from_partner_MU.shape[-1]
        return TokenSplit(owner_N.to(torch.uint8).argsort(stable=True), [len(owner_N) - partner, partner])

    def owner(self, from_partner_MU: Tensor) -> Tensor:
        """The mask over units repeated to this stage's grid of tokens, (M, H, W)."""
        units = math.isqrt(from_partner_MU.shape[-1])
        owner_MHW = from_partner_MU.reshape(-1, units, units)
        repeat = self.grid // units
        if repeat > 1:
            # Expand, not repeat_interleave: the latter becomes a slow scatter of ops in an exported graph.
            cells = owner_MHW[:, :, None, :, None].expand(-1, -1, repeat, -1, repeat)
            owner_MHW = cells.reshape(-1, self.grid, self.grid)
        return owner_MHW


class PatchMerging(nn.Module):
    """2 x 2 neighbours into one token of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H/2, W/2, 2D); neighbours in the order (dy, dx) = (0,0), (1,0), (0,1), (1,1)."""
        height, width, dim = tokens_BHWD.shape[1:]
        pairs = tokens_BHWD.reshape(-1, height // 2, 2, width // 2, 2, dim)
        merged = pairs.permute(0, 1, 3, 4, 2, 5).reshape(-1, height // 2, width // 2, 4 * dim)
        reduced: Tensor = self.reduction(self.norm(merged))
        return reduced


class Block(nn.Module):
    """Pre-norm transformer block; `drop_path` is the share of images that skip a branch while training."""

    def __init__(self, dim: int, attention: Attention, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.drop_path = 0.0
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim)

    def forward(self, x_BKND: Tensor, separation: Tensor | TokenSplit | None = None) -> Tensor:
        """(B, K, N, D) to the same shape."""
        x_BKND = x_BKND + self.drop(self.attn(self.norm1(x_BKND), separation))
        return x_BKND + self.drop(self.mlp(self.norm2(x_BKND)))

    def drop(self, branch_BKND: Tensor) -> Tensor:
        """Zero the branch for some images and scale it for the others (stochastic depth, arXiv 1603.09382)."""
        if not self.training or self.drop_path == 0:
            return branch_BKND
        kept_B111 = branch_BKND.new_empty(len(branch_BKND), 1, 1, 1).bernoulli_(1 - self.drop_path)
        return branch_BKND * (kept_B111 / (1 - self.drop_path))


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def position_embedding(grid: int, dim: int) -> Tensor:
    """The frozen 2-D sine-cosine embedding, (1, grid * grid, dim): first half of the channels for the column.

    As in MAE's `util/pos_embed.py`, computed in float64. mmpretrain puts the row first, which is why checkpoints
    carry these values.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles_GD = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis_GD = torch.cat([angles_GD.sin(), angles_GD.cos()], dim=1)
    columns = axis_GD[None, :, :].expand(grid, -1, -1)
    rows = axis_GD[:, None, :].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, dim).float()


def initialize(module: nn.Module) -> None:
    """Official initialisation: Xavier-uniform linear weights, zero biases; convolution and norms as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
