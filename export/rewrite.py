"""Rewrites a model for export: attention, norms, and how Swin moves tokens between its windows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from export.attention import ExportedAttention, ExportedNorm, ExportedReducedAttention
from mixmim_serve.model.attention import Attention
from mixmim_serve.model.blocks import Block, Stage
from mixmim_serve.model.pvt import ReducedAttention
from mixmim_serve.model.swin import SwinStage, cut, padded, paste
from mixmim_serve.model.windows import from_windows, to_windows


class ExportedSwinStage(nn.Module):
    """A `SwinStage` as a graph computes it; it takes over the layers of the original.

    Rolling a grid and cutting it into windows takes ten operators a block. Here tokens stay cut, and one Gather takes
    them from regular to shifted windows and back; shifted windows lie turned, as `ExportedAttention.turned` wants them.
    The places to gather from are computed from a range, which runtimes fold when they load the graph.
    """

    def __init__(self, stage: SwinStage) -> None:
        super().__init__()
        self.blocks, self.downsample = stage.blocks, stage.downsample
        self.blocked_in_windows = stage.blocked_in_windows
        self.grid, self.window, self.shift = stage.grid, stage.window, stage.shifts[1]
        self.padded = padded(stage.grid, stage.window)
        self.windows = (self.padded // self.window) ** 2

    def forward(
        self, tokens_BHWD: Tensor, from_partner_MU: Tensor | None = None, partner_units: int | None = None
    ) -> Tensor:
        """See `Stage`."""
        tokens, dim = self.padded**2, tokens_BHWD.shape[-1]
        regular = self.blocked_in_windows(from_partner_MU, 0, tokens_BHWD)
        shifted = self.blocked_in_windows(from_partner_MU, self.shift, tokens_BHWD)
        x_BLD = cut(tokens_BHWD, self.window, 0).reshape(-1, tokens, dim)
        is_turned = False
        for number, block in enumerate(cast(Iterable[Block], self.blocks)):
            if number:
                x_BLD = x_BLD.index_select(1, self.to_regular() if is_turned else self.to_turned())
            is_turned = number % 2 == 1
            attention, normed_BLD = cast(ExportedAttention, block.attn), block.norm1(x_BLD)
            if self.padded > self.grid:
                normed_BLD = normed_BLD * self.real(is_turned, normed_BLD)
            if is_turned:
                attended_BLD = attention.turned(normed_BLD, self.windows, shifted)
            else:
                x_GND = normed_BLD.reshape(-1, self.window**2, dim)
                attended_BLD = attention(x_GND, regular).reshape(-1, tokens, dim)
            x_BLD = x_BLD + attended_BLD
            x_BLD = x_BLD + block.mlp(block.norm2(x_BLD))
        if is_turned:
            return x_BLD.index_select(1, self.to_rows()).reshape(-1, self.grid, self.grid, dim)
        return paste(x_BLD.reshape(-1, self.windows, self.window**2, dim), self.grid, self.window, 0)

    def to_turned(self) -> Tensor:
        """For each token of turned shifted windows, its place in regular windows."""
        grid = from_windows(self.places(self.windows, self.window**2), self.padded, self.window)
        return cut(grid, self.window, self.shift).transpose(1, 2).flatten()

    def to_regular(self) -> Tensor:
        """For each token of regular windows, its place in turned shifted windows."""
        return to_windows(self.turned_grid(), self.window).flatten()

    def to_rows(self) -> Tensor:
        """For each token of the grid, without padding, its place in turned shifted windows."""
        return self.turned_grid()[:, : self.grid, : self.grid].flatten()

    def turned_grid(self) -> Tensor:
        """The place of each token of the padded grid in turned shifted windows, (1, H, W, 1)."""
        turned = self.places(self.window**2, self.windows).transpose(1, 2)
        return paste(turned, self.padded, self.window, self.shift)

    def places(self, rows: int, columns: int) -> Tensor:
        """0, 1, 2... as (1, rows, columns, 1)."""
        return torch.arange(rows * columns).reshape(1, rows, columns, 1)

    def real(self, is_turned: bool, like: Tensor) -> Tensor:
        """1 for tokens of the grid and 0 for padding, (N * K, 1) in the order of `is_turned`."""
        real_1KN1 = cut(like.new_ones(1, self.grid, self.grid, 1), self.window, self.shift if is_turned else 0)
        return (real_1KN1.transpose(1, 2) if is_turned else real_1KN1).reshape(-1, 1)


def rewrite_for_export(model: nn.Module, *, written_out: bool = False) -> None:
    """Replace attention, norms and shifting stages of a model, in place, and give blocks (G, N, D) tokens."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, exported(child, written_out=written_out))
    for stage in model.modules():
        if isinstance(stage, Stage):  # one reshape per stage instead of four per block
            stage.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1), *args[1:]))


def exported(layer: nn.Module, *, written_out: bool) -> nn.Module:
    """What a graph has in place of a layer; most stay as they are."""
    if isinstance(layer, Attention):
        return ExportedAttention(layer, written_out=written_out)
    if isinstance(layer, ReducedAttention):
        return ExportedReducedAttention(layer, written_out=written_out)
    if isinstance(layer, SwinStage) and layer.window < layer.grid:
        return ExportedSwinStage(layer)
    return ExportedNorm(layer) if isinstance(layer, nn.LayerNorm) else layer
