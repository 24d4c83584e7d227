"""Multi-head self-attention within windows; shape suffixes as in encoder.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenSplit:
    """One window's tokens in an order that groups them by image: each group attends alone, without blocked scores."""

    order_N: Tensor  # positions of the tokens, the own image's first
    counts: list[int]  # tokens of the own image, and of the partner


class Attention(nn.Module):
    """Multi-head self-attention within each of K groups of N tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BKND: Tensor, separation: Tensor | TokenSplit | None = None) -> Tensor:
        """(B, K, N, D) to the same shape; `separation` keeps attention within each of two mixed images."""
        qkv = self.qkv(x_BKND)
        if isinstance(separation, TokenSplit):
            counts = separation.counts
            parts = zip(torch.split(qkv, counts, dim=2), torch.split(separation.order_N, counts), strict=True)
            attended = torch.cat([self.attend(part, self.bias_among(order_N)) for part, order_N in parts], dim=2)
        else:
            attended = self.attend(qkv, self.bias(separation))
        projected: Tensor = self.proj(attended)
        return projected

    def attend(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """(B, K, N, 3D) to (B, K, N, D); `bias` is (A, N, N), or (M, K * A, N, N) with a mask.

        Windows are folded into the batch, or into the heads when there is a mask (which is shared by the batch,
        not by the windows): five-dimensional inputs would fall back to the unfused kernel.
        """
        groups, tokens, dim = qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
        bias = None if bias is None else bias.to(qkv.dtype)
        if qkv.device.type == "cpu" and (qkv.requires_grad or qkv.dtype == torch.bfloat16):
            return self.attend_unfused(qkv, bias)
        if bias is not None and bias.dim() == 4:
            qkv = qkv.reshape(-1, groups, tokens, 3, self.heads, dim // self.heads).permute(3, 0, 1, 4, 2, 5)
            q, k, v = qkv.flatten(2, 3).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            out = out.view(-1, groups, self.heads, tokens, dim // self.heads).transpose(2, 3)
        else:
            qkv = qkv.reshape(-1, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        return out.reshape(-1, groups, tokens, dim)

    def attend_unfused(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """As `attend`, storing the scores: on a CPU no fused kernel has a gradient for the bias, or is fast in bf16."""
        groups, tokens, dim = qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
        qkv = qkv.reshape(-1, groups, tokens, 3, self.heads, dim // self.heads).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.unbind(0)
        scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + (bias if bias.dim() == 3 else bias.view(-1, groups, self.heads, tokens, tokens))
        out: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
        return out.transpose(2, 3).reshape(-1, groups, tokens, dim)

    def bias(self, blocked_MKNN: Tensor | None) -> Tensor | None:
        """What is added to the scores: (M, K * A, N, N) with a mask, (A, N, N) or None without."""
        if blocked_MKNN is None:
            return None
        return blocked_MKNN.repeat_interleave(self.heads, dim=1)

    def bias_among(self, order_N: Tensor) -> Tensor | None:
        """What is added to the scores between the tokens at these positions of a window, (A, N, N) or None."""
        return None


class WindowAttention(Attention):
    """Attention with Swin's learned bias per relative position (arXiv 2103.14030, equation 4)."""

    position_rank: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        side = torch.arange(window)
        self.register_buffer("position_rank", (side[:, None] * (2 * window - 1) + side).flatten(), persistent=False)
        self.center = 2 * window * (window - 1)  # row of the table for a token and itself

    def bias(self, blocked_MKNN: Tensor | None) -> Tensor:
        """The learned bias (A, N, N), or with a mask (M, K * A, N, N)."""
        bias_ANN = self.bias_of_ranks(self.position_rank)
        if blocked_MKNN is None:
            return bias_ANN
        bias_MKANN = bias_ANN + blocked_MKNN.unsqueeze(2)
        return bias_MKANN.flatten(1, 2)

    def bias_among(self, order_N: Tensor) -> Tensor:
        """The learned bias between the tokens at these positions of a window, (A, N, N)."""
        return self.bias_of_ranks(self.position_rank[order_N])

    def bias_of_ranks(self, rank_N: Tensor) -> Tensor:
        """Rows of the table for each pair of tokens, (A, N, N)."""
        # The table's row for a pair is a difference of two ranks. Made here from N numbers: an index of N * N int64
        # for every block would outweigh the tables themselves in an exported graph.
        index_NN = rank_N[:, None] - rank_N[None, :] + self.center
        rows = self.relative_position_bias_table.index_select(0, index_NN.flatten())
        bias_ANN: Tensor = rows.view(*index_NN.shape, -1).permute(2, 0, 1)
        return bias_ANN
