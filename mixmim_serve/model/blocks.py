"""The parts that families share: patch embedding, transformer block, and what the encoder asks of a stage.

Shape suffixes as in encoder.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmim_serve.config import MLP_RATIO, PATCH_SIZE
from mixmim_serve.model.attention import TokenSplit

# Added to the score of a token of the other image: exp underflows to exactly 0 in every precision, fp16 can hold it,
# and unlike -inf no runtime turns it into NaN. (The official code subtracts 1e30, 65500 in fp16.)
BLOCKED = -1e4


class Stage(nn.Module):
    """One of the four stages: blocks over a grid of tokens; `downsample` leads to the next stage's grid.

    What it must keep: as long as `from_partner_MU` is given, nothing of one image reaches the tokens of the other. And
    `downsample`, which the last stage's does nothing, makes each token of 2 x 2 that lie in one unit.
    """

    grid: int
    blocks: nn.ModuleList
    downsample: nn.Module

    def forward(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> Tensor:
        """(B, H, W, D) to the same shape; the arguments are those of `Encoder.run_stages`.

        Raises:
            NotImplementedError: always, here.
        """
        raise NotImplementedError

    def each_block(self, tokens_BHWD: Tensor) -> list[Tensor]:
        """The output of every block for whole, unmixed images, each (B, H, W, D); only without a class token.

        Raises:
            NotImplementedError: always, here.
        """
        raise NotImplementedError

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


class Block(nn.Module):
    """Pre-norm transformer block; `drop_path` is the share of images that skip a branch while training."""

    def __init__(self, dim: int, attention: nn.Module, norm_eps: float = 1e-5, mlp_ratio: int = MLP_RATIO) -> None:
        super().__init__()
        self.drop_path = 0.0
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x_BKND: Tensor, separation: Tensor | TokenSplit | None = None) -> Tensor:
        """(B, K, N, D) to the same shape; `separation` is what the attention takes."""
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

    def __init__(self, dim: int, ratio: int = MLP_RATIO) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

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
    """MixMIM's initialisation: Xavier-uniform linear weights, zero biases; convolution and norms as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialize_narrow(module: nn.Module) -> None:
    """Swin's and PVT's initialisation: linear weights from a normal distribution of deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
