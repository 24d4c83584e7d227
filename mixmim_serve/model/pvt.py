"""The stages of the Pyramid Vision Transformer (arXiv 2102.12122): every token attends to the whole image, in units.

Written from section 3 of the paper; verified against the implementation in Hugging Face transformers. Layers have the
names and constants of the official repository within a stage; `mixmim_serve.model.layouts` maps its checkpoints. Shape
suffixes as in encoder.py, and R cells of r x r tokens, which are reduced to one key and value each.

The reductions 8, 4, 2, 1 at strides 4, 8, 16, 32 make each cell one unit of 32 x 32 pixels (R = U). In pretraining a
token may therefore attend to the cells of its own image, and nothing has to be known but which units those are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmim_serve.config import STAGES, Architecture
from mixmim_serve.model.blocks import BLOCKED, Block, Stage

REDUCTIONS = (8, 4, 2, 1)  # tokens on one side of a cell, by stage (Table 1)
NORM_EPS = 1e-6  # of the norms of blocks and of the last one; those after convolutions have torch's 1e-5


class PvtStage(Stage):
    """Position embedding, then blocks (figure 3); a class token joins before the last stage, if there is one."""

    def __init__(self, arch: Architecture, stage: int) -> None:
        super().__init__()
        dim, heads, ratio = arch.dims[stage], arch.heads[stage], arch.facts.mlp_ratios[stage]
        self.grid = arch.grids[stage]
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.cls_token: nn.Parameter | None = None  # its position is part of it
        if arch.class_token and stage == STAGES - 1:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(
            Block(dim, ReducedAttention(dim, heads, self.grid, REDUCTIONS[stage]), NORM_EPS, ratio)
            for _ in range(arch.depths[stage])
        )
        self.downsample = PatchReembedding(dim, arch.dims[stage + 1]) if stage < STAGES - 1 else nn.Identity()

    def forward(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> Tensor:
        """See `Stage`; with a class token (B, 1 + H * W, D), the class token first."""
        x_BND = tokens_BHWD.reshape(-1, self.grid**2, tokens_BHWD.shape[-1]) + self.pos_embed
        if self.cls_token is not None:
            x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        blocked = None
        if from_partner_MU is not None:
            blocked = self.blocked_cells(from_partner_MU, tokens_BHWD.dtype)
        x_BKND = x_BND.unsqueeze(1)  # all tokens in one group
        for block in self.blocks:
            x_BKND = block(x_BKND, blocked)
        if self.cls_token is not None:
            return x_BKND.reshape(-1, 1 + self.grid**2, x_BKND.shape[-1])
        return x_BKND.reshape(-1, self.grid, self.grid, x_BKND.shape[-1])

    def each_block(self, tokens_BHWD: Tensor) -> list[Tensor]:
        """See `Stage`."""
        x_BKND = (tokens_BHWD.flatten(1, 2) + self.pos_embed).unsqueeze(1)
        outputs = []
        for block in self.blocks:
            x_BKND = block(x_BKND)
            outputs.append(x_BKND.reshape(-1, self.grid, self.grid, x_BKND.shape[-1]))
        return outputs

    def blocked_cells(self, from_partner_MU: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, (M, 1, N, R): 0 for cells of a token's own image, `BLOCKED` for the other's."""
        owner_MN1 = self.owner(from_partner_MU).flatten(1).unsqueeze(2)
        return (owner_MN1 != from_partner_MU.unsqueeze(1)).unsqueeze(1).to(dtype) * BLOCKED


class ReducedAttention(nn.Module):
    """Spatial-reduction attention (section 3.3): queries of all tokens, keys and values of cells."""

    def __init__(self, dim: int, heads: int, grid: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.grid, self.reduction = heads, grid, reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BKND: Tensor, blocked_M1NR: Tensor | None = None) -> Tensor:
        """(B, 1, N, D) to the same shape."""
        x_BND = x_BKND.squeeze(1)
        k_BRD, v_BRD = self.kv(self.reduce(x_BND)).chunk(2, dim=-1)
        q_BAND, k_BARD, v_BARD = (self.split(each) for each in (self.q(x_BND), k_BRD, v_BRD))
        blocked_M1NR = None if blocked_M1NR is None else blocked_M1NR.to(q_BAND.dtype)
        attended_BAND = F.scaled_dot_product_attention(q_BAND, k_BARD, v_BARD, attn_mask=blocked_M1NR)
        projected: Tensor = self.proj(attended_BAND.transpose(1, 2).reshape(x_BND.shape))
        return projected.unsqueeze(1)

    def reduce(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) to the cells (B, R, D); in the last stage a cell is a token."""
        if self.reduction == 1:
            return x_BND
        grid_BHWD = x_BND.reshape(-1, self.grid, self.grid, x_BND.shape[-1])
        cells_BRD = join_cells(grid_BHWD, self.sr).reshape(-1, (self.grid // self.reduction) ** 2, x_BND.shape[-1])
        reduced: Tensor = self.norm(cells_BRD)
        return reduced

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, A, N, D / A)."""
        return x.reshape(-1, x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class PatchReembedding(nn.Module):
    """2 x 2 neighbours into one token of the next stage: linear, layer norm."""

    def __init__(self, dim: int, following: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, following, 2, stride=2)
        self.norm = nn.LayerNorm(following)

    def forward(self, tokens_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H/2, W/2, the next stage's channels)."""
        tokens: Tensor = self.norm(join_cells(tokens_BHWD, self.proj))
        return tokens


def join_cells(tokens_BHWD: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A convolution whose stride is its size, as a matrix product: channels stay last, and no two cells meet."""
    side, (height, width, dim) = convolution.stride[0], tokens_BHWD.shape[1:]
    cells = tokens_BHWD.reshape(-1, height // side, side, width // side, side, dim).transpose(2, 3)
    values = cells.reshape(-1, height // side, width // side, side * side * dim)  # in the order row, column, channel
    return F.linear(values, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)
