"""MixMIM pretraining written directly from the paper: the baseline of benchmarks/train_step.py.

Written from arXiv 2205.13137 and Swin (arXiv 2103.14030) in the style of published research code: windows are cut and
merged in every block, attention scores are stored, the bias is gathered by an index of N * N numbers, and the mask is
repeated over images and windows. Weights are float32, to be run under autocast. Names and shapes are those of `MixMIM`,
so one state dict fits both; loss and gradients are equal (tests/test_benchmarks.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmim_serve.config import MLP_RATIO, PATCH_SIZE, STAGES, UNIT_SIZE, Architecture

BLOCKED = -1e30  # added to the score of a token of the other image


class PlainMixMIM(nn.Module):
    """Encoder, decoder and loss."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        decoder = arch.decoder
        assert decoder is not None
        self.grids, self.normalize_targets = arch.grids, decoder.normalize_targets
        # Values come from our state dict; the defaults below are only shapes.
        self.register_buffer("absolute_pos_embed", torch.zeros(1, arch.grids[0] ** 2, arch.embed_dim))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, arch.units, decoder.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
        self.patch_embed = PatchEmbed(arch.embed_dim)
        self.layers = nn.ModuleList(Stage(arch, stage) for stage in range(STAGES))
        self.norm = nn.LayerNorm(arch.embedding_size)
        self.decoder_embed = nn.Linear(arch.embedding_size, decoder.dim)
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder.dim, decoder.heads, decoder.norm_eps) for _ in range(decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder.dim, eps=decoder.norm_eps)
        self.decoder_pred = nn.Linear(decoder.dim, UNIT_SIZE * UNIT_SIZE * 3)

    def forward(self, pixels: Tensor, from_partner: Tensor) -> Tensor:
        """The loss for pixels (B, 3, size, size) and a mask (1, units), 1 where a unit comes from the partner."""
        mask = from_partner.float()
        encoded = self.encode(pixels, mask)
        predicted = self.decode(encoded, mask.unsqueeze(-1))
        return self.loss(pixels, predicted, mask.unsqueeze(-1))

    def encode(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Mix image i with image B - 1 - i and encode: (B, units, D)."""
        masks = [repeat_mask(mask, grid) for grid in self.grids]
        x = self.patch_embed(pixels)
        x = x * (1 - masks[0]) + x.flip(0) * masks[0]
        x = x + self.absolute_pos_embed
        for layer, stage_mask in zip(self.layers, masks, strict=True):
            x = layer(x, stage_mask)
        encoded: Tensor = self.norm(x)
        return encoded

    def decode(self, encoded: Tensor, mask: Tensor) -> Tensor:
        """Predicted units (2B, units, pixels): first with the partner's hidden, then with the own hidden."""
        x = self.decoder_embed(encoded)
        hidden = self.mask_token.expand(x.shape[0], x.shape[1], -1)
        own = x * (1 - mask) + hidden * mask
        partner = x * mask + hidden * (1 - mask)
        x = torch.cat([own, partner]) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(x))
        return predicted

    def loss(self, pixels: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error, each unit predicted from the view in which it was hidden."""
        target = patchify(pixels)
        if self.normalize_targets:
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        own, partner = predicted.chunk(2)
        merged = own * mask + partner.flip(0) * (1 - mask)
        return ((merged.float() - target) ** 2).mean()


class PatchEmbed(nn.Module):
    """4 x 4 patches to tokens (B, L, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Convolution, then norm."""
        tokens: Tensor = self.norm(self.proj(pixels).flatten(2).transpose(1, 2))
        return tokens


class Stage(nn.Module):
    """Blocks, then patch merging."""

    def __init__(self, arch: Architecture, stage: int) -> None:
        super().__init__()
        dim, grid = arch.dims[stage], arch.grids[stage]
        window = min(arch.windows[stage], grid)
        self.blocks = nn.ModuleList(SwinBlock(dim, arch.heads[stage], grid, window) for _ in range(arch.depths[stage]))
        self.downsample = PatchMerging(dim, grid) if stage < STAGES - 1 else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) to (B, L / 4, 2D); the last stage keeps its shape."""
        for block in self.blocks:
            x = block(x, mask)
        merged: Tensor = self.downsample(x)
        return merged


class SwinBlock(nn.Module):
    """Attention within windows, then MLP."""

    def __init__(self, dim: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.grid, self.window = grid, window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) to the same shape; `mask` (1, L, 1) is repeated for each image."""
        batch, length, dim = x.shape
        mask = mask.expand(batch, -1, -1).reshape(batch, self.grid, self.grid, 1)
        shortcut = x
        windows = window_partition(self.norm1(x).view(batch, self.grid, self.grid, dim), self.window)
        windows = self.attn(windows, window_partition(mask, self.window))
        x = shortcut + window_reverse(windows, self.window, self.grid).view(batch, length, dim)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class WindowAttention(nn.Module):
    """Attention with relative position bias and a mask."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(windows, N, D) to the same shape; a token attends to tokens whose mask (windows, N, 1) equals its own."""
        windows, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(windows, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + bias.view(tokens, tokens, self.heads).permute(2, 0, 1).unsqueeze(0)
        same = mask * mask.transpose(1, 2) + (1 - mask) * (1 - mask).transpose(1, 2)
        scores = scores + (1 - same).unsqueeze(1) * BLOCKED
        x = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, tokens, dim)
        out: Tensor = self.proj(x)
        return out


class PatchMerging(nn.Module):
    """2 x 2 neighbours into one token."""

    def __init__(self, dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L / 4, 2D)."""
        batch, _, dim = x.shape
        x = x.view(batch, self.grid, self.grid, dim)
        x = torch.cat([x[:, dy::2, dx::2] for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)
        reduced: Tensor = self.reduction(self.norm(x.view(batch, -1, 4 * dim)))
        return reduced


class DecoderBlock(nn.Module):
    """A ViT block over the units of one image."""

    def __init__(self, dim: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Attention(nn.Module):
    """Plain multi-head attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to the same shape."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        out: Tensor = self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, dim))
        return out


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def repeat_mask(mask: Tensor, grid: int) -> Tensor:
    """A mask over units (1, U) on a finer grid, (1, L, 1)."""
    units = math.isqrt(mask.shape[-1])
    return F.interpolate(mask.view(1, 1, units, units), size=(grid, grid), mode="nearest").view(1, -1, 1)


def window_partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, D) to (windows, N, D)."""
    batch, height, width, dim = x.shape
    x = x.view(batch, height // window, window, width // window, window, dim)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, dim)


def window_reverse(windows: Tensor, window: int, grid: int) -> Tensor:
    """The inverse of `window_partition`, (B, H, W, D)."""
    side = grid // window
    x = windows.view(-1, side, side, window, window, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, grid, grid, windows.shape[-1])


def relative_position_index(window: int) -> Tensor:
    """The row of the bias table for each pair of a window's tokens, (N, N)."""
    side = torch.arange(window)
    tokens = torch.stack(torch.meshgrid(side, side, indexing="ij")).flatten(1)
    difference = tokens[:, :, None] - tokens[:, None, :] + window - 1
    return difference[0] * (2 * window - 1) + difference[1]


def patchify(pixels: Tensor) -> Tensor:
    """(B, 3, size, size) to (B, units, 32 * 32 * 3), a unit's values ordered row, column, channel."""
    batch, units = pixels.shape[0], pixels.shape[-1] // UNIT_SIZE
    x = pixels.reshape(batch, 3, units, UNIT_SIZE, units, UNIT_SIZE)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, units * units, UNIT_SIZE * UNIT_SIZE * 3)
