"""Swin's stages against a plain transcription: each token by itself, with no windows cut and nothing rolled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixmim_serve.config import Architecture
from mixmim_serve.model.attention import WindowAttention
from mixmim_serve.model.swin import SwinBlock, SwinStage, cut, paste

ARCH = Architecture(8, (2, 2, 2, 2), (2, 2, 2, 2), 96, (5, 5, 5, 5), family="swin")  # grids of 24, 12, 6 and 3


def a_stage(stage: int, window: int) -> SwinStage:
    torch.manual_seed(stage)
    built = SwinStage(ARCH.at(96, (window,) * 4), stage).double().eval()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return built


def plain_block(block: SwinBlock, tokens_BHWD: Tensor, owner_MHW: Tensor | None) -> Tensor:
    """Section 3.2: tokens meet when dividing their shifted rows and columns by the window gives the same two numbers.

    The grid continues to the right and below with zeros, up to whole windows, which every token may look at.
    """
    batch, grid, _, dim = tokens_BHWD.shape
    side = math.ceil(grid / block.window) * block.window
    normed = block.norm1(tokens_BHWD)
    x = tokens_BHWD.new_zeros(batch, side, side, dim)
    x[:, :grid, :grid] = normed
    attended = torch.empty_like(tokens_BHWD)
    for row in range(grid):
        for column in range(grid):
            seen = [
                (y, z)
                for y in range(side)
                for z in range(side)
                if (y - block.shift) // block.window == (row - block.shift) // block.window
                and (z - block.shift) // block.window == (column - block.shift) // block.window
            ]
            attended[:, row, column] = attend(block, x, (row, column), seen, owner_MHW)
    tokens_BHWD = tokens_BHWD + attended
    return tokens_BHWD + block.mlp(block.norm2(tokens_BHWD))


def attend(
    block: SwinBlock, x: Tensor, at: tuple[int, int], seen: list[tuple[int, int]], owner_MHW: Tensor | None
) -> Tensor:
    """What one token gets from those that it sees, (B, D)."""
    attention, dim = block.attn, x.shape[-1]
    assert isinstance(attention, WindowAttention)
    rows, columns = (torch.tensor(list(places)) for places in zip(*seen, strict=True))
    query = attention.qkv(x[:, at[0], at[1]])[:, :dim]
    keys, values = attention.qkv(x[:, rows, columns])[..., dim:].chunk(2, -1)
    span = 2 * block.window - 1
    place = (at[0] - rows + block.window - 1) * span + at[1] - columns + block.window - 1
    hidden = torch.zeros(len(x), len(seen), dtype=torch.bool)
    if owner_MHW is not None:
        grid = owner_MHW.shape[1]
        for number, (y, z) in enumerate(seen):
            if y < grid and z < grid:
                hidden[:, number] = owner_MHW[:, y, z] != owner_MHW[:, at[0], at[1]]
    parts = []
    for head in range(attention.heads):
        part = slice(head * dim // attention.heads, (head + 1) * dim // attention.heads)
        scores = (keys[..., part] @ query[:, part, None]).squeeze(-1) / math.sqrt(dim // attention.heads)
        scores = (scores + attention.relative_position_bias_table[place, head]).masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1)[:, None] @ values[..., part]).squeeze(1))
    return attention.proj(torch.cat(parts, -1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize(("stage", "window"), [(1, 3), (1, 5), (2, 4), (2, 6), (3, 2)])  # even, padded, one window, odd
def test_a_stage_is_the_plain_one(stage: int, window: int, masks: int, training: bool) -> None:
    built = a_stage(stage, window).train(training)
    tokens = torch.randn(2, ARCH.grids[stage], ARCH.grids[stage], ARCH.dims[stage], dtype=torch.float64)
    mask_MU = torch.rand(masks, 9, generator=torch.Generator().manual_seed(masks)) < 0.5 if masks else None
    owner = None if mask_MU is None else built.owner(mask_MU)
    with torch.set_grad_enabled(training):
        actual = built(tokens, mask_MU)
        expected = tokens
        for number, block in enumerate(built.blocks):
            shift = 0 if number == 0 or built.window == built.grid else built.window // 2
            plain = SwinBlock(ARCH.dims[stage], 2, built.grid, built.window, shift).double()
            plain.load_state_dict(block.state_dict())
            expected = plain_block(plain, expected, owner)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)


def test_odd_blocks_shift_by_half_a_window() -> None:
    shifts = [block.shift for block in a_stage(0, 7).blocks if isinstance(block, SwinBlock)]
    assert shifts == [0, 3]
    assert not any(isinstance(block, SwinBlock) for block in a_stage(3, 7).blocks)  # nothing to shift


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("grid", [8, 12, 10])
def test_windows_are_cut_and_pasted(grid: int, shift: int) -> None:
    tokens = torch.randn(2, grid, grid, 3)
    windows = cut(tokens, 4, shift)
    assert windows.shape == (2, (-(-grid // 4)) ** 2, 16, 3)
    torch.testing.assert_close(windows[:, 0], tokens[:, shift : shift + 4, shift : shift + 4].flatten(1, 2))
    torch.testing.assert_close(paste(windows, grid, 4, shift), tokens)
