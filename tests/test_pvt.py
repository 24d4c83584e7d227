"""PVT's stages against a plain transcription, and its class token."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_serve.config import Architecture
from mixmim_serve.model import Encoder, build_model
from mixmim_serve.model.pvt import PatchReembedding, PvtStage, ReducedAttention

ARCH = Architecture(8, (1, 1, 1, 2), (1, 2, 5, 8), 96, family="pvt")


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return module.double().eval()


def plain_attention(attention: ReducedAttention, x_BND: Tensor, hidden_MNR: Tensor | None) -> Tensor:
    """Equations 1 to 4, one head at a time; the reduction as the convolution that it is."""
    dim = x_BND.shape[-1]
    reduced = x_BND
    if attention.reduction > 1:
        grid = x_BND.transpose(1, 2).unflatten(2, (attention.grid, attention.grid))
        reduced = attention.norm(attention.sr(grid).flatten(2).transpose(1, 2))
    query = attention.q(x_BND)
    key, value = attention.kv(reduced)[..., :dim], attention.kv(reduced)[..., dim:]
    parts = []
    for head in range(attention.heads):
        part = slice(head * dim // attention.heads, (head + 1) * dim // attention.heads)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(dim // attention.heads)
        if hidden_MNR is not None:
            scores = scores.masked_fill(hidden_MNR, -torch.inf)
        parts.append(scores.softmax(-1) @ value[..., part])
    return attention.proj(torch.cat(parts, -1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize("number", range(4))
def test_a_stage_is_the_plain_one(number: int, masks: int, training: bool) -> None:
    torch.manual_seed(number)
    stage = noisy(PvtStage(ARCH, number)).train(training)
    assert isinstance(stage, PvtStage)
    tokens = torch.randn(2, stage.grid, stage.grid, ARCH.dims[number], dtype=torch.float64)
    mask_MU = torch.rand(masks, 9) < 0.5 if masks else None
    hidden = None
    if mask_MU is not None:
        repeat = stage.grid // 3
        owner = mask_MU.view(-1, 3, 3).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2).flatten(1)
        hidden = owner[:, :, None] != mask_MU[:, None, :]
    x = tokens.flatten(1, 2) + stage.pos_embed
    for block in stage.blocks:
        x = x + plain_attention(block.attn, block.norm1(x), hidden)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(stage(tokens, mask_MU).flatten(1, 2), x, atol=1e-11, rtol=0)


def test_between_stages_stands_the_convolution() -> None:
    joined = noisy(PatchReembedding(6, 10))
    tokens = torch.randn(2, 8, 8, 6, dtype=torch.float64)
    convolved = F.conv2d(tokens.permute(0, 3, 1, 2), joined.proj.weight, joined.proj.bias, stride=2)
    torch.testing.assert_close(joined(tokens), joined.norm(convolved.permute(0, 2, 3, 1)), atol=1e-12, rtol=0)


def test_reduced_keys_are_units() -> None:
    """One key per 32 x 32 pixels in every stage: this is why nothing leaks."""
    for stage in range(4):
        attention = PvtStage(ARCH, stage).blocks[0].attn
        assert attention.reduce(torch.zeros(1, ARCH.grids[stage] ** 2, ARCH.dims[stage])).shape[1] == ARCH.units


def test_the_class_token_is_the_embedding_and_no_part_of_the_map() -> None:
    torch.manual_seed(0)
    model = noisy(build_model(dataclasses.replace(ARCH, class_token=True, num_classes=3)))
    assert isinstance(model, Encoder)
    pixels = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    output = model(pixels)
    last = model.layers[3]
    assert isinstance(last, PvtStage)
    x = model.layers[2].downsample(output.stages_BDHW[2].permute(0, 2, 3, 1)).flatten(1, 2) + last.pos_embed
    x = torch.cat([last.cls_token.expand(2, 1, -1), x], 1)
    for block in last.blocks:
        x = x + plain_attention(block.attn, block.norm1(x), None)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(output.embedding_BD, model.norm(x)[:, 0], atol=1e-11, rtol=0)
    torch.testing.assert_close(output.logits_BC, model.head(model.norm(x)[:, 0]), atol=1e-11, rtol=0)
    torch.testing.assert_close(output.stages_BDHW[3].flatten(2).transpose(1, 2), x[:, 1:], atol=1e-11, rtol=0)
