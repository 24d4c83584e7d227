"""Attention and norms for exported graphs, written so that runtimes run each as one kernel (docs/engines.md)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmim_serve.model.attention import Attention
from mixmim_serve.model.encoder import Stage

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
        weights, biases = attention.qkv.weight.detach().chunk(3), attention.qkv.bias.detach().chunk(3)
        self.q, self.k, self.v = (linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
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
        attend = self.attend_written_out if self.written_out else self.attend
        projected: Tensor = self.proj(attend(self.q(x_GND), self.k(x_GND), self.v(x_GND), bias))
        return projected if x.dim() == 3 else projected.reshape(-1, *x.shape[1:])

    def attend(self, q_GND: Tensor, k_GND: Tensor, v_GND: Tensor, bias: Tensor | None) -> Tensor:
        """Attention as one ONNX operator, its softmax in float32."""
        attended, *_ = torch.onnx.ops.attention(
            q_GND, k_GND, v_GND, bias, q_num_heads=self.heads, kv_num_heads=self.heads, softmax_precision=FLOAT
        )
        return attended

    def attend_written_out(self, q_GND: Tensor, k_GND: Tensor, v_GND: Tensor, bias: Tensor | None) -> Tensor:
        """Attention in basic operators, its softmax in float32."""
        tokens, dim = q_GND.shape[1:]
        split = (-1, tokens, self.heads, dim // self.heads)
        q_GAND, k_GAND, v_GAND = (x.reshape(split).transpose(1, 2) for x in (q_GND, k_GND, v_GND))
        scores = (q_GAND * split[-1] ** -0.5) @ k_GAND.transpose(2, 3)
        if bias is not None:
            scores = scores + bias
        attended: Tensor = scores.float().softmax(dim=-1).to(v_GAND.dtype) @ v_GAND
        return attended.transpose(1, 2).reshape(-1, tokens, dim)


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


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer that shares these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def rewrite_for_export(model: nn.Module, *, written_out: bool = False) -> None:
    """Replace every attention and norm of a model, in place, and give blocks (G, N, D) tokens."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, ExportedAttention(child, written_out=written_out))
            elif isinstance(child, nn.LayerNorm):
                setattr(parent, name, ExportedNorm(child))
        if isinstance(parent, Stage):  # one reshape per stage instead of four per block
            parent.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1), *args[1:]))
