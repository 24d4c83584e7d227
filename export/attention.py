"""Attention and norms for exported graphs, written so that runtimes run each as one kernel (docs/engines.md)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmim_serve.model.attention import Attention
from mixmim_serve.model.pvt import ReducedAttention

FLOAT = 1  # ONNX's number for float32


class ExportedAttention(nn.Module):
    """An `Attention` as a graph computes it; it takes over the layers of the original. Shape suffixes as in encoder.py.

    Queries, keys and values are three products with rows of one stored matrix: slicing, squeezing and transposing a
    single product costs more than it saves. `written_out` chooses plain products and a softmax, which TensorRT fuses by
    itself, instead of ONNX's Attention operator, which it supports for few shapes only.
    """

    def __init__(self, attention: Attention, *, written_out: bool) -> None:
        super().__init__()
        self.heads, self.written_out = attention.heads, written_out
        self.q, self.k, self.v = rows(attention.qkv, 3)
        self.proj = attention.proj
        del attention.qkv, attention.proj
        self.position = attention  # now without its layers: it computes the learned bias

    def forward(self, x: Tensor, blocked_MKNN: Tensor | None = None) -> Tensor:
        """As `Attention.forward`, also for (G, N, D): all images' windows in one dimension. A mask needs M = B."""
        tokens = x.shape[-2]
        x_GND = grouped(x)
        bias = self.position.bias(blocked_MKNN)
        if bias is not None and bias.dim() == 4:
            bias = bias.reshape(-1, self.heads, tokens, tokens)
        attended = attend(self.q(x_GND), self.k(x_GND), self.v(x_GND), bias, self.heads, written_out=self.written_out)
        projected: Tensor = self.proj(attended)
        return projected if x.dim() == 3 else projected.reshape(-1, *x.shape[1:])

    def turned(self, x_BND: Tensor, windows: int, blocked_MKNN: Tensor | None) -> Tensor:
        """Attention within windows whose tokens alternate: (B, N * K, D), the first token of every window first.

        Windows then are heads, without a transpose, and a mask over windows serves all images (M = 1).
        """
        tokens, dim = x_BND.shape[1] // windows, x_BND.shape[2]
        q, k, v = (part(x_BND).reshape(-1, tokens, windows * dim) for part in (self.q, self.k, self.v))
        bias = self.position.bias(blocked_MKNN)
        attended = attend(q, k, v, bias, windows * self.heads, written_out=self.written_out)
        projected: Tensor = self.proj(attended.reshape(-1, tokens * windows, dim))
        return projected


class ExportedReducedAttention(ReducedAttention):
    """PVT's `ReducedAttention` as a graph computes it; it takes over the layers of the original."""

    def __init__(self, attention: ReducedAttention, *, written_out: bool) -> None:
        nn.Module.__init__(self)
        self.heads, self.grid, self.reduction = attention.heads, attention.grid, attention.reduction
        self.written_out = written_out
        self.q, self.proj = attention.q, attention.proj
        self.k, self.v = rows(attention.kv, 2)
        if self.reduction > 1:
            self.sr, self.norm = attention.sr, attention.norm

    def forward(self, x_BND: Tensor, blocked_M1NR: Tensor | None = None) -> Tensor:
        """(B, N, D) to the same shape. A mask may be one for all images."""
        cells_BRD = self.reduce(x_BND)
        q, k, v = self.q(x_BND), self.k(cells_BRD), self.v(cells_BRD)
        projected: Tensor = self.proj(attend(q, k, v, blocked_M1NR, self.heads, written_out=self.written_out))
        return projected


def attend(
    q_GND: Tensor, k_GRD: Tensor, v_GRD: Tensor, bias: Tensor | None, heads: int, *, written_out: bool
) -> Tensor:
    """Attention of N queries to R keys, (G, N, D), its softmax in float32: as one ONNX operator, or in basic ones."""
    if not written_out:
        attended, *_ = torch.onnx.ops.attention(
            q_GND, k_GRD, v_GRD, bias, q_num_heads=heads, kv_num_heads=heads, softmax_precision=FLOAT
        )
        return attended
    tokens, dim = q_GND.shape[1:]
    q_GAND, k_GARD, v_GARD = (
        x.reshape(-1, x.shape[1], heads, dim // heads).transpose(1, 2) for x in (q_GND, k_GRD, v_GRD)
    )
    scores = (q_GAND * (dim // heads) ** -0.5) @ k_GARD.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    out: Tensor = scores.float().softmax(dim=-1).to(v_GARD.dtype) @ v_GARD
    return out.transpose(1, 2).reshape(-1, tokens, dim)


class ExportedNorm(nn.LayerNorm):
    """A norm over three-dimensional tokens: with four dimensions OpenVINO decomposes it into five operators."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., N, D) to the same shape."""
        normed: Tensor = super().forward(grouped(x))
        return normed if x.dim() == 3 else normed.reshape(-1, *x.shape[1:])


def grouped(x: Tensor) -> Tensor:
    """(..., N, D) to (G, N, D), without a reshape where none is needed: each would be a node."""
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def rows(layer: nn.Linear, parts: int) -> list[nn.Linear]:
    """A linear layer as several that share its values, each with an equal part of its outputs."""
    weights, biases = layer.weight.detach().chunk(parts), layer.bias.detach().chunk(parts)
    return [linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer that shares these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer
