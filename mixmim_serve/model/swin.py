"""The stages of Swin (arXiv 2103.14030): attention within windows that shift in every second block.

Written from section 3 of the paper; verified against the implementation in Hugging Face transformers. Parameter names
are those of the official repository, so its checkpoints need no renaming. Shape suffixes as in encoder.py; here the
grid H, W of a window's cut may be padded on the right and at the bottom.

In pretraining a token attends only to tokens of its own image. Windows shift by rolling the grid, so the mask that
says whose a token is rolls with it, and what it blocks adds to what a shifted window blocks by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_serve.model.attention import TokenSplit, WindowAttention
from mixmim_serve.model.blocks import BLOCKED, Block
from mixmim_serve.model.windows import WindowStage, from_windows, to_windows


class SwinStage(WindowStage):
    """Regular and shifted windows in turn (section 3.2); a grid of one window has nothing to shift."""

    @property
    def shifts(self) -> tuple[int, int]:
        """How far the windows of even and of odd blocks move, in tokens."""
        return 0, self.window // 2

    def block(self, dim: int, heads: int, number: int) -> Block:
        """The stage's block of this number, counted from 0."""
        if self.window == self.grid:
            return super().block(dim, heads, number)
        return SwinBlock(dim, heads, self.grid, self.window, self.shifts[number % 2])

    def forward(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> Tensor:
        """See `Stage`."""
        if self.window == self.grid:
            return super().forward(tokens_BHWD, from_partner_MU, partner_units)
        blocked = [self.blocked_in_windows(from_partner_MU, shift, tokens_BHWD) for shift in self.shifts]
        for number, block in enumerate(self.blocks):
            tokens_BHWD = block(tokens_BHWD, blocked[number % 2])
        return tokens_BHWD

    def each_block(self, tokens_BHWD: Tensor) -> list[Tensor]:
        """See `Stage`."""
        if self.window == self.grid:
            return super().each_block(tokens_BHWD)
        blocked, outputs = [self.blocked_in_windows(None, shift, tokens_BHWD) for shift in self.shifts], []
        for number, block in enumerate(self.blocks):
            tokens_BHWD = block(tokens_BHWD, blocked[number % 2])
            outputs.append(tokens_BHWD)
        return outputs

    def blocked_in_windows(self, from_partner_MU: Tensor | None, shift: int, tokens: Tensor) -> Tensor | None:
        """What is added to the scores of windows at this shift, (M, K, N, N), or None: 0 or `BLOCKED`.

        Blocked are tokens that only the roll made neighbours, and in pretraining those of the other image. Padding
        belongs to no image: both see it, and it shows nothing. Type and device are those of `tokens`.
        """
        blocked_MKNN = None
        if shift:
            region_HW = regions(padded(self.grid, self.window), self.window, shift, tokens.device)
            region_1KN1 = to_windows(region_HW[None, :, :, None], self.window)
            blocked_MKNN = region_1KN1 != region_1KN1.transpose(2, 3)
        if from_partner_MU is not None:
            owner_MHW1 = self.owner(from_partner_MU).unsqueeze(-1).to(tokens.dtype) + 1  # 0 will be padding
            owner_MKN1 = cut(owner_MHW1, self.window, shift)
            owner_MK1N = owner_MKN1.transpose(2, 3)
            of_other = (owner_MKN1 != owner_MK1N) & (owner_MK1N != 0)
            blocked_MKNN = of_other if blocked_MKNN is None else blocked_MKNN | of_other
        return None if blocked_MKNN is None else blocked_MKNN.to(tokens.dtype) * BLOCKED


class SwinBlock(Block):
    """Attention within windows, regular or shifted, then the MLP (equation 3)."""

    def __init__(self, dim: int, heads: int, grid: int, window: int, shift: int) -> None:
        super().__init__(dim, WindowAttention(dim, heads, window))
        self.grid, self.window, self.shift = grid, window, shift

    def forward(self, tokens_BHWD: Tensor, separation: Tensor | TokenSplit | None = None) -> Tensor:
        """(B, H, W, D) to the same shape; `separation` is what `SwinStage.blocked_in_windows` returned."""
        x_BKND = cut(self.norm1(tokens_BHWD), self.window, self.shift)
        attended_BHWD = paste(self.attn(x_BKND, separation), self.grid, self.window, self.shift)
        tokens_BHWD = tokens_BHWD + self.drop(attended_BHWD)
        return tokens_BHWD + self.drop(self.mlp(self.norm2(tokens_BHWD)))


def cut(x_BHWD: Tensor, window: int, shift: int) -> Tensor:
    """A grid, padded with zeros to whole windows and rolled up and left by `shift`, in windows (B, K, N, D)."""
    missing = padded(x_BHWD.shape[1], window) - x_BHWD.shape[1]
    if missing:
        x_BHWD = F.pad(x_BHWD, (0, 0, 0, missing, 0, missing))
    if shift:
        x_BHWD = x_BHWD.roll((-shift, -shift), dims=(1, 2))
    return to_windows(x_BHWD, window)


def paste(x_BKND: Tensor, grid: int, window: int, shift: int) -> Tensor:
    """The inverse of `cut`: back to (B, H, W, D) without the padding."""
    x_BHWD = from_windows(x_BKND, padded(grid, window), window)
    if shift:
        x_BHWD = x_BHWD.roll((shift, shift), dims=(1, 2))
    return x_BHWD[:, :grid, :grid]


def padded(grid: int, window: int) -> int:
    """The side of a grid that is padded to whole windows."""
    return -(-grid // window) * window


def regions(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which parts of a rolled grid were neighbours before, (H, W): equal numbers in one window may meet (figure 4)."""
    place = torch.arange(side, device=device)
    stripe = (place >= side - window).long() + (place >= side - shift).long()
    return 3 * stripe[:, None] + stripe
