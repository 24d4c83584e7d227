"""Families of backbones: one table, earlier descriptions, and the proof that no image leaks into another."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor

from mixmim_serve.bundle import DEFAULT_BUNDLE, canonical_json, fingerprint, open_bundle
from mixmim_serve.config import (
    Architecture,
    DecoderConfig,
    Preprocessing,
    architecture,
    architecture_from_dict,
    size_name,
    size_names,
)
from mixmim_serve.description import Description
from mixmim_serve.errors import ConfigError
from mixmim_serve.families import FAMILIES
from mixmim_serve.model import Encoder, MixMIM, build_model, pvt, swin, windows
from mixmim_serve.model.blocks import Stage
from mixmim_serve.model.encoder import BACKBONES
from mixmim_serve.model.mixmim import mix, random_units

DECODER = DecoderConfig(16, 1, 2)
MIXMIM = Architecture(8, (1, 1, 2, 1), (1, 2, 2, 4), 64, decoder=DECODER)
SWIN = Architecture(8, (2, 2, 2, 2), (1, 2, 2, 4), 128, decoder=DECODER, family="swin")  # windows of 4
PVT = Architecture(8, (1, 2, 1, 2), (1, 2, 5, 8), 96, decoder=DECODER, family="pvt")
SMALL = {"mixmim": MIXMIM, "swin": SWIN, "pvt": PVT}


def noisy(arch: Architecture) -> Encoder:
    """A random network in float64 whose biases, norms and tables matter."""
    torch.manual_seed(0)
    model = build_model(arch).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def test_one_table_knows_the_families() -> None:
    assert BACKBONES.keys() == FAMILIES.keys() == SMALL.keys()


def test_no_other_code_asks_which_family_it_has() -> None:
    """No comparison with a family's name, such as `arch.family == "swin"`, stands anywhere."""
    for package in ("mixmim_serve", "export", "training", "benchmarks"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare):
                    words = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                    assert not words & FAMILIES.keys(), f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", size_names())
def test_published_proportions(name: str) -> None:
    arch = architecture(name)
    assert arch.dims == tuple(arch.embed_dim * width for width in FAMILIES[arch.family].widths)
    assert len({arch.dims[i] // arch.heads[i] for i in range(4)}) == 1  # one size of head in all stages
    assert size_name(arch) == name


def test_windows_of_swin_are_the_published_ones_and_may_be_any() -> None:
    assert architecture("swin-tiny").windows == (7, 7, 7, 7)
    assert architecture("swin-large-384").windows == (12, 12, 12, 12)
    assert architecture("swin-tiny").at(256).windows == (8, 8, 8, 8)
    assert architecture("swin-tiny").at(224, (12,) * 4).windows == (12, 12, 12, 7)  # a grid of one window
    assert architecture("swin-tiny").at(256, (7,) * 4).windows == (7, 7, 7, 7)  # padded
    assert architecture("pvt-small").at(384).windows == ()


@pytest.mark.parametrize("name", SMALL)
def test_each_block_of_whole_images(name: str) -> None:
    """The last block's output is the stage's."""
    stage = noisy(SMALL[name]).layers[1]
    assert isinstance(stage, Stage)
    tokens_BHWD = torch.randn(2, stage.grid, stage.grid, SMALL[name].dims[1], dtype=torch.float64)
    outputs = stage.each_block(tokens_BHWD)
    assert len(outputs) == len(stage.blocks)
    assert torch.equal(outputs[-1], stage(tokens_BHWD))
    assert all(not torch.equal(output, tokens_BHWD) for output in outputs)


# Earlier checkpoints and bundles


def test_a_description_without_a_family_is_mixmim() -> None:
    old = {"embed_dim": 8, "depths": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "image_size": 64,
           "windows": [16, 8, 4, 2], "decoder": None, "num_classes": 0}  # fmt: skip
    arch = architecture_from_dict(old)
    assert (arch.family, arch.class_token) == ("mixmim", False)
    assert json.loads(json.dumps(arch.identity())) == old


def test_fingerprints_of_earlier_bundles_are_the_same() -> None:
    """By the formula of earlier versions, and by the shipped bundle, which one of them wrote."""
    arch = dataclasses.replace(MIXMIM, num_classes=3)
    values = dataclasses.asdict(arch)
    del values["family"], values["class_token"]
    preprocessing = Preprocessing.evaluation(arch.image_size)
    old = hashlib.sha256(
        canonical_json({"architecture": values, "preprocessing": dataclasses.asdict(preprocessing)})
        + b"norm.weight\0" + hashlib.sha256(b"1234").digest()
    )  # fmt: skip
    assert fingerprint(Description(arch, preprocessing), {"norm.weight": b"1234"}) == old.hexdigest()[:32]
    assert "family" not in json.loads((DEFAULT_BUNDLE / "config.json").read_text())["architecture"]
    open_bundle(DEFAULT_BUNDLE).verify()


def test_fingerprints_tell_families_and_class_tokens_apart() -> None:
    archs = [
        Architecture(8, (1, 1, 1, 1), (1, 2, 4, 8), 64, (2, 2, 2, 2)),
        Architecture(8, (1, 1, 1, 1), (1, 2, 4, 8), 64, (2, 2, 2, 2), family="swin"),
        Architecture(8, (1, 1, 1, 1), (1, 2, 1, 8), 64, family="pvt"),
        Architecture(8, (1, 1, 1, 1), (1, 2, 1, 8), 64, family="pvt", class_token=True),
    ]
    prints = {fingerprint(Description(arch, Preprocessing.evaluation(64)), {}) for arch in archs}
    assert len(prints) == 4
    for arch in archs:
        assert architecture_from_dict(json.loads(json.dumps(dataclasses.asdict(arch)))) == arch


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("base", {"family": "convnext"}, "unknown family 'convnext': choose one of mixmim, swin, pvt"),
        ("swin-tiny", {"windows": (60, 60, 60, 60)}, "a window of 60 tokens is larger than the 56 x 56 tokens"),
        ("swin-tiny", {"windows": (7, 7)}, "windows must be 4 positive numbers"),
        ("swin-tiny", {"class_token": True}, "a swin network has no class token"),
        ("base", {"class_token": True}, "a mixmim network has no class token"),
        ("pvt-tiny", {"windows": (7, 7, 7, 7)}, r"has no windows, got \[7, 7, 7, 7\]"),
        ("pvt-tiny", {"class_token": True}, "pretraining leaves the class token out"),
        ("pvt-tiny", {"heads": (1, 2, 6, 8)}, "stage 3: 320 channels cannot be split over 6 heads"),
    ],
)
def test_what_fits_no_family_is_refused(name: str, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(architecture(name), **changes)


# Nothing leaks

PROOFS = [
    pytest.param(MIXMIM, id="mixmim"),
    pytest.param(MIXMIM.at(96), id="mixmim-96"),
    pytest.param(SWIN, id="swin"),
    pytest.param(SWIN.at(96), id="swin-96-windows-of-3"),
    pytest.param(SWIN.at(96, (5, 5, 5, 5)), id="swin-96-padded"),
    pytest.param(SWIN.at(128, (7, 7, 7, 7)), id="swin-128-padded"),
    pytest.param(SWIN.at(64, (4, 4, 4, 4)), id="swin-64-two-stages-of-one-window"),
    pytest.param(PVT, id="pvt"),
    pytest.param(PVT.at(64), id="pvt-64"),
    pytest.param(PVT.at(160), id="pvt-160"),
]


def stages_of(model: Encoder, own: Tensor, partner: Tensor, mask_MU: Tensor, known: int | None) -> list[Tensor]:
    """Every stage's tokens (B, H, W, D) of the mixture."""
    mixed = mix(model.patch_embed(own), model.patch_embed(partner), mask_MU)
    with torch.no_grad():
        return model.run_stages(model.add_position(mixed), mask_MU, known)


def whose(mask_MU: Tensor, grid: int) -> Tensor:
    """The mask over a stage's tokens, written out, (M, H, W)."""
    side = int(mask_MU.shape[1] ** 0.5)
    return mask_MU.view(-1, side, side).repeat_interleave(grid // side, 1).repeat_interleave(grid // side, 2)


@pytest.mark.parametrize("shared", ["shared mask", "shared mask of known size", "a mask for each image"])
@pytest.mark.parametrize("arch", PROOFS)
def test_no_pixel_of_one_image_reaches_the_tokens_of_the_other(arch: Architecture, shared: str) -> None:
    """Changing one image leaves the other's features equal to the last bit, in every stage and both ways round."""
    model = noisy(arch)
    a, b, other = torch.randn(3, 2, 3, arch.image_size, arch.image_size, dtype=torch.float64)
    units = arch.units
    masks = random_units(units, 0.5, torch.Generator().manual_seed(3))
    if shared == "a mask for each image":
        masks = torch.cat([masks, ~masks])
    known = units // 2 if shared == "shared mask of known size" else None
    before = stages_of(model, a, b, masks, known)
    new_partner, new_own = stages_of(model, a, other, masks, known), stages_of(model, other, b, masks, known)
    for grid, old, changed_b, changed_a in zip(arch.grids, before, new_partner, new_own, strict=True):
        of_b = whose(masks, grid).expand(2, -1, -1)
        assert torch.equal(old[~of_b], changed_b[~of_b])
        assert torch.equal(old[of_b], changed_a[of_b])
        assert not torch.isclose(old[of_b], changed_b[of_b]).all(-1).any()  # and the other's do change
        assert not torch.isclose(old[~of_b], changed_a[~of_b]).all(-1).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_mask_it_leaks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof above can fail: with nothing blocked one image does reach the other."""
    for module in (windows, swin, pvt):
        monkeypatch.setattr(module, "BLOCKED", 0.0)
    arch = SMALL[family]
    model = noisy(arch)
    a, b, other = torch.randn(3, 1, 3, arch.image_size, arch.image_size, dtype=torch.float64)
    masks = random_units(arch.units, 0.5, torch.Generator().manual_seed(3))
    before, after = stages_of(model, a, b, masks, None), stages_of(model, a, other, masks, None)
    for grid, old, new in zip(arch.grids, before, after, strict=True):
        assert not torch.equal(old[~whose(masks, grid)], new[~whose(masks, grid)])


# What every family does


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_knows_the_masks_size_gives_the_same_loss_and_gradients(family: str) -> None:
    arch = SMALL[family]
    pixels = torch.randn(4, 3, arch.image_size, arch.image_size, dtype=torch.float64)
    mask = random_units(arch.units, 0.5, torch.Generator().manual_seed(0))
    results = []
    for known in (None, arch.units // 2):
        model = noisy(arch).train()
        assert isinstance(model, MixMIM)
        loss = model.pretrain(pixels, mask, known).loss
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-12, rtol=0)
    assert set(results[0][1]) == set(results[1][1])
    for name, gradient in results[0][1].items():
        assert gradient is not None, name
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("size", [32, 96, 160, 224])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_multiple_of_32_runs(family: str, size: int) -> None:
    arch = SMALL[family].at(size)
    model = build_model(arch)
    assert isinstance(model, MixMIM)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output = model(pixels)
        assert output.embedding_BD.shape == (2, arch.embedding_size)
        assert [tuple(stage.shape[1:]) for stage in output.stages_BDHW] == [
            (dim, grid, grid) for dim, grid in zip(arch.dims, arch.grids, strict=True)
        ]
        if size > 32:  # a single unit cannot be mixed
            mask = random_units(arch.units, 0.5, torch.Generator().manual_seed(0))
            assert model.pretrain(pixels, mask).loss.isfinite()


def test_the_sources_of_families_stay_apart() -> None:
    """Mixing, decoder, trainer, export and service never import a family's file; the encoder's table alone does."""
    users = []
    for package in ("mixmim_serve", "training"):
        for path in (REPOSITORY / package).rglob("*.py"):
            text = path.read_text()
            if any(f"mixmim_serve.model.{name} import" in text for name in ("swin", "pvt")):
                users.append(str(path.relative_to(REPOSITORY)))
    assert users == [str(Path("mixmim_serve/model/encoder.py"))]
