"""The encoder in the style of the released code: the baseline of benchmarks/plain_export.py.

Windows are cut and merged in every block, q, k and v are sliced out of one product, attention is written in basic
operators, the bias is gathered by an index of N * N numbers. As benchmarks/plain.py, but for inference: without a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.plain import MLP, PatchEmbed, PatchMerging, relative_position_index, window_partition, window_reverse
from mixmim_serve.config import STAGES, Architecture


class PlainEncoder(nn.Module):
    """Normalised pixels to the embedding; parameters have the names of `Encoder`, so one state dict fits both."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.register_buffer("absolute_pos_embed", torch.zeros(1, arch.grids[0] ** 2, arch.embed_dim))
        self.patch_embed = PatchEmbed(arch.embed_dim)
        self.layers = nn.ModuleList(PlainStage(arch, stage) for stage in range(STAGES))
        self.norm = nn.LayerNorm(arch.embedding_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) to (B, D)."""
        x = self.patch_embed(pixels) + self.absolute_pos_embed
        for layer in self.layers:
            x = layer(x)
        pooled: Tensor = self.norm(x).transpose(1, 2).mean(dim=2)
        return pooled


class PlainStage(nn.Module):
    """Blocks, then patch merging."""

    def __init__(self, arch: Architecture, stage: int) -> None:
        super().__init__()
        dim, grid = arch.dims[stage], arch.grids[stage]
        window = min(arch.windows[stage], grid)
        self.blocks = nn.ModuleList(PlainBlock(dim, arch.heads[stage], grid, window) for _ in range(arch.depths[stage]))
        self.downsample = PatchMerging(dim, grid) if stage < STAGES - 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L / 4, 2D); the last stage keeps its shape."""
        for block in self.blocks:
            x = block(x)
        merged: Tensor = self.downsample(x)
        return merged


class PlainBlock(nn.Module):
    """Attention within windows, which it cuts and merges, then MLP."""

    def __init__(self, dim: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.grid, self.window = grid, window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PlainAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to the same shape."""
        batch, length, dim = x.shape
        windows = window_partition(self.norm1(x).view(batch, self.grid, self.grid, dim), self.window)
        x = x + window_reverse(self.attn(windows), self.window, self.grid).view(batch, length, dim)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PlainAttention(nn.Module):
    """Attention with relative position bias, in basic operators."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, N, D) to the same shape."""
        windows, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + bias.view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        x = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, tokens, dim)
        out: Tensor = self.proj(x)
        return out
