"""The network against plain transcriptions of the paper in float64, and properties of the method."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixmim_serve.config import Architecture, DecoderConfig, architecture
from mixmim_serve.errors import ConfigError
from mixmim_serve.model import Encoder, MixMIM, build_model
from mixmim_serve.model.attention import TokenSplit, WindowAttention
from mixmim_serve.model.blocks import BLOCKED, PatchEmbed
from mixmim_serve.model.mixmim import from_units, random_units, to_units
from mixmim_serve.model.windows import from_windows, to_windows

SMALL = Architecture(16, (1, 1, 2, 1), (1, 2, 4, 8), 64, (8, 8, 4, 2), decoder=DecoderConfig(32, 1, 4))


def small_model(**changes: object) -> MixMIM:
    torch.manual_seed(0)
    model = build_model(SMALL).eval()
    for parameter in model.parameters():  # biases too, so that a missing one shows
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    assert isinstance(model, MixMIM)
    return model


def plain_attention(attention: WindowAttention, x_BKND: Tensor, blocked_MKNN: Tensor | None) -> Tensor:
    """Scores, bias, mask and softmax, one window and one head at a time."""
    groups, tokens, dim = x_BKND.shape[1:]
    size = dim // attention.heads
    window = math.isqrt(tokens)
    q, k, v = attention.qkv(x_BKND).split(dim, dim=-1)
    out = torch.empty_like(x_BKND)
    for group in range(groups):
        for head in range(attention.heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, group, :, part] @ k[:, group, :, part].transpose(1, 2) / math.sqrt(size)
            for i in range(tokens):
                for j in range(tokens):
                    row = i // window - j // window + window - 1
                    column = i % window - j % window + window - 1
                    scores[:, i, j] += attention.relative_position_bias_table[row * (2 * window - 1) + column, head]
            if blocked_MKNN is not None:
                scores = scores + blocked_MKNN[:, group]
            out[:, group, :, part] = scores.softmax(-1) @ v[:, group, :, part]
    return attention.proj(out)


@pytest.mark.parametrize("training", [False, True])  # the fused kernel, and stored scores with gradients
@pytest.mark.parametrize("masks", [0, 1, 3])
def test_attention_equals_plain(masks: int, training: bool) -> None:
    torch.manual_seed(1)
    attention = WindowAttention(dim=16, heads=2, window=3).double()
    x = torch.randn(3, 4, 9, 16, dtype=torch.float64)
    owner = torch.rand(masks, 4, 9) < 0.5
    blocked = (owner.unsqueeze(-1) != owner.unsqueeze(-2)).double() * BLOCKED if masks else None
    with torch.set_grad_enabled(training):
        attended = attention(x, blocked)
    torch.testing.assert_close(attended, plain_attention(attention, x, blocked), atol=1e-12, rtol=0)


def test_sorted_tokens_attend_as_masked_ones_do() -> None:
    torch.manual_seed(1)
    attention = WindowAttention(dim=16, heads=2, window=3).double()
    x = torch.randn(3, 1, 9, 16, dtype=torch.float64)
    partner = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    blocked = (partner[:, None] != partner[None, :]).double()[None, None] * BLOCKED
    order = partner.to(torch.uint8).argsort(stable=True)
    attended = attention(x[:, :, order], TokenSplit(order, [5, 4]))[:, :, order.argsort()]
    torch.testing.assert_close(attended, plain_attention(attention, x, blocked), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_that_knows_the_masks_size_gives_the_same_loss_and_gradients(seed: int) -> None:
    """With it, stages of one window run two attentions without a mask."""
    pixels = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = random_units(4, 0.5, torch.Generator().manual_seed(seed))
    results = []
    for partner_units in (None, 2):
        model = small_model().double().train()
        output = model.pretrain(pixels, mask, partner_units)
        output.loss.backward()
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1][0].encoded_BUD, results[0][0].encoded_BUD, atol=1e-10, rtol=0)
    torch.testing.assert_close(results[1][0].loss, results[0][0].loss, atol=1e-12, rtol=0)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-10, rtol=0, msg=name)


def test_patches_in_training_are_the_convolutions() -> None:
    torch.manual_seed(0)
    patches = PatchEmbed(16).double()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    trained = patches.train()(pixels)
    torch.testing.assert_close(trained, patches.eval()(pixels), atol=1e-12, rtol=0)


def test_windows_are_cut_and_put_back() -> None:
    tokens = torch.randn(2, 16, 16, 5)
    windows = to_windows(tokens, 8)
    assert windows.shape == (2, 4, 64, 5)
    torch.testing.assert_close(windows[:, 1], tokens[:, :8, 8:].flatten(1, 2))
    torch.testing.assert_close(from_windows(windows, 16, 8), tokens)


def test_the_partner_never_reaches_the_first_image() -> None:
    model = small_model().double()
    own, partner, other = torch.randn(3, 2, 3, 64, 64, dtype=torch.float64)
    from_partner = random_units(4, 0.5, torch.Generator().manual_seed(3))
    one, two = (
        model.encode_mixed(model.patch_embed(own), model.patch_embed(image), from_partner) for image in (partner, other)
    )
    kept = ~from_partner[0]
    assert torch.equal(one[:, kept], two[:, kept])
    assert not torch.allclose(one[:, ~kept], two[:, ~kept])


def test_masks_may_differ_from_image_to_image() -> None:
    model = small_model()
    a, b = torch.randn(2, 2, 3, 64, 64)
    masks = torch.tensor([[True, False, False, True], [False, True, True, False]])
    together = model.reconstruct(a, b, masks)
    for item in range(2):
        alone = model.reconstruct(a[item : item + 1], b[item : item + 1], masks[item : item + 1])
        torch.testing.assert_close(together.image_a[item], alone.image_a[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.image_b[item], alone.image_b[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_reconstruction_agrees_with_the_loss(normalize: bool) -> None:
    """Normalising a reconstruction again gives exactly what the loss compared."""
    model = small_model()
    model.normalize_targets = normalize
    pixels = torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[True, False, False, True]])
    expected = model.pretrain(pixels, mask).loss
    parts = model.reconstruct(pixels, pixels.flip(0), mask)
    flipped = model.reconstruct(pixels.flip(0), pixels, mask)
    # Image i is predicted at the partner's units in its own mixture, elsewhere in its partner's mixture.
    hidden = torch.where(mask.unsqueeze(-1), to_units(parts.image_a), to_units(flipped.image_b))
    units = to_units(pixels)
    deviation = (units.var(-1, keepdim=True) + 1e-6).sqrt() if normalize else 1.0
    torch.testing.assert_close((((hidden - units) / deviation) ** 2).mean(), expected, rtol=1e-4, atol=0)


def test_mixed_view_takes_the_chosen_units() -> None:
    model = small_model()
    a, b = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    mixed = model.reconstruct(a, b, torch.tensor([[False, True, False, False]])).mixed
    assert mixed[..., :32, 32:].eq(1).all()
    assert mixed.sum() == 3 * 32 * 32


def test_units_are_a_round_trip() -> None:
    pixels = torch.randn(2, 3, 96, 96)
    assert torch.equal(from_units(to_units(pixels)), pixels)


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_outputs_have_the_documented_shapes(name: str) -> None:
    arch = architecture(name, num_classes=7, with_decoder=False).at(64)
    model = Encoder(arch).eval()
    output = model(torch.randn(2, 3, 64, 64))
    assert output.embedding_BD.shape == (2, arch.embedding_size)
    assert [tuple(stage.shape) for stage in output.stages_BDHW] == [
        (2, dim, grid, grid) for dim, grid in zip(arch.dims, arch.grids, strict=True)
    ]
    assert output.logits_BC is not None
    assert output.logits_BC.shape == (2, 7)


@pytest.mark.parametrize("size", [32, 96, 160, 352])
def test_any_multiple_of_32_runs(size: int) -> None:
    model = build_model(SMALL.at(size))
    assert isinstance(model, MixMIM)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert model(pixels).embedding_BD.isfinite().all()
        if size > 32:  # a single unit cannot be mixed
            mask = random_units(model.arch.units, 0.5, torch.Generator().manual_seed(0))
            assert model.pretrain(pixels, mask).loss.isfinite()


def test_random_units_take_the_share_rounded_down() -> None:
    generator = torch.Generator().manual_seed(0)
    assert random_units(49, 0.5, generator).sum() == 24
    assert random_units(16, 0.75, generator).sum() == 12
    with pytest.raises(ConfigError, match="takes 0 of 4 units"):
        random_units(4, 0.1, generator)
