"""The stages of MixMIM's own network: windows as large as their grids allow, which never shift.

Written from arXiv 2205.13137 (section 3) and Swin (arXiv 2103.14030); verified against golden arrays of the official
implementation. Parameter names are the official ones, so a released checkpoint needs no renaming. As windows never
shift, tokens are cut into windows and merged once per stage, not in every block. Shape suffixes as in encoder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmim_serve.config import STAGES, Architecture
from mixmim_serve.model.attention import TokenSplit, WindowAttention
from mixmim_serve.model.blocks import BLOCKED, Block, Stage


class WindowStage(Stage):
    """Blocks of attention within windows; a window at least as large as the grid is the whole grid."""

    def __init__(self, arch: Architecture, stage: int) -> None:
        super().__init__()
        dim, heads = arch.dims[stage], arch.heads[stage]
        self.grid = arch.grids[stage]
        self.window = min(arch.windows[stage], self.grid)
        self.blocks = nn.ModuleList(self.block(dim, heads, number) for number in range(arch.depths[stage]))
        self.downsample = PatchMerging(dim) if stage < STAGES - 1 else nn.Identity()

    def block(self, dim: int, heads: int, number: int) -> Block:
        """The stage's block of this number, counted from 0."""
        return Block(dim, WindowAttention(dim, heads, self.window))

    def forward(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> Tensor:
        """See `Stage`; with `partner_units` a stage of one window runs two small attentions instead of a masked one."""
        x_BKND = to_windows(tokens_BHWD, self.window)
        separation: Tensor | TokenSplit | None = None
        if from_partner_MU is not None and partner_units is not None and self.window == self.grid:
            separation = self.token_split(from_partner_MU, partner_units)
            x_BKND = x_BKND[:, :, separation.order_N]
        elif from_partner_MU is not None:
            separation = self.blocked_scores(from_partner_MU, tokens_BHWD.dtype)
        for block in self.blocks:
            x_BKND = block(x_BKND, separation)
        if isinstance(separation, TokenSplit):
            x_BKND = x_BKND[:, :, separation.order_N.argsort()]
        return from_windows(x_BKND, self.grid, self.window)

    def each_block(self, tokens_BHWD: Tensor) -> list[Tensor]:
        """See `Stage`."""
        x_BKND, outputs = to_windows(tokens_BHWD, self.window), []
        for block in self.blocks:
            x_BKND = block(x_BKND)
            outputs.append(from_windows(x_BKND, self.grid, self.window))
        return outputs

    def blocked_scores(self, from_partner_MU: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, (M, K, N, N): 0 between tokens of one image, `BLOCKED` between the two."""
        owner_MKN = to_windows(self.owner(from_partner_MU).unsqueeze(-1), self.window).squeeze(-1)
        different = owner_MKN.unsqueeze(-1) != owner_MKN.unsqueeze(-2)
        return different.to(dtype) * BLOCKED

    def token_split(self, from_partner_MU: Tensor, partner_units: int) -> TokenSplit:
        """The split by image, for a stage of one window and a mask that all images share."""
        owner_N = self.owner(from_partner_MU).flatten()
        partner = partner_units * len(owner_N) // from_partner_MU.shape[-1]
        return TokenSplit(owner_N.to(torch.uint8).argsort(stable=True), [len(owner_N) - partner, partner])


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


def to_windows(tokens_BHWD: Tensor, window: int) -> Tensor:
    """(B, H, W, D) to (B, K, N, D), windows in reading order; a square grid that the window divides."""
    side, dim = tokens_BHWD.shape[1] // window, tokens_BHWD.shape[-1]
    if side == 1:
        return tokens_BHWD.reshape(-1, 1, window * window, dim)
    cells = tokens_BHWD.reshape(-1, side, window, side, window, dim)
    return cells.transpose(2, 3).reshape(-1, side * side, window * window, dim)


def from_windows(x_BKND: Tensor, grid: int, window: int) -> Tensor:
    """(B, K, N, D) back to (B, H, W, D)."""
    side, dim = grid // window, x_BKND.shape[-1]
    if side == 1:
        return x_BKND.reshape(-1, window, window, dim)
    cells = x_BKND.reshape(-1, side, side, window, window, dim)
    return cells.transpose(2, 3).reshape(-1, grid, grid, dim)
