"""Swin and PVT against Hugging Face transformers, and public checkpoints as each implementation writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from mixmim_serve.cli import app
from mixmim_serve.config import architecture
from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.model import Encoder, build_model
from mixmim_serve.model.checkpoint import load_checkpoint
from mixmim_serve.model.released import import_checkpoint

transformers = pytest.importorskip("transformers")

CLASSES = 5
Weights = dict[str, Tensor]


def randomize(model: nn.Module) -> nn.Module:
    """Weights of which every bias, norm and table matters, with features of about 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and "position" not in name and "token" not in name:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        elif "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.1 * noise
        else:
            parameter.data = 0.3 * noise
    return model.eval()


def swin(size: int = 224, window: int = 7) -> nn.Module:
    """A narrow Swin classifier of transformers."""
    config = transformers.SwinConfig(
        image_size=size, window_size=window, embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4],
        num_labels=CLASSES, drop_path_rate=0.0,
    )  # fmt: skip
    return randomize(transformers.SwinForImageClassification(config))


def pvt(size: int = 224) -> nn.Module:
    """A narrow PVT classifier of transformers, with the official code's constant in the norms after convolutions."""
    config = transformers.PvtConfig(
        image_size=size, hidden_sizes=[8, 16, 40, 64], depths=[1, 2, 1, 2], num_labels=CLASSES
    )
    model = randomize(transformers.PvtForImageClassification(config))
    for name, module in model.named_modules():
        if name.endswith(("self.layer_norm", *(f"patch_embeddings.{stage}.layer_norm" for stage in range(4)))):
            module.eps = 1e-5  # transformers: 1e-6, as in all others
    return model


def outputs_of(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Logits and each stage's tokens before downsampling, (B, L, D), of a model of transformers."""
    ends = [stage.blocks[-1] for stage in model.swin.encoder.layers] if hasattr(model, "swin") else [
        stage[-1] for stage in model.pvt.encoder.block
    ]  # fmt: skip
    found: dict[str, Tensor] = {}
    hooks = [
        end.register_forward_hook(lambda _, __, output, key=f"stage{number}": found.update({key: output[0]}))
        for number, end in enumerate(ends, start=1)
    ]
    with torch.inference_mode():
        found["logits"] = model(pixels).logits
    for hook in hooks:
        hook.remove()
    return found


def assert_same(ours: Encoder, theirs: nn.Module, size: int) -> None:
    """Every stage and the logits, to 1e-5."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = ours(pixels)
    expected = outputs_of(theirs, pixels)
    for number, stage in enumerate(output.stages_BDHW, start=1):
        tokens = expected[f"stage{number}"][:, -stage[0, 0].numel() :]  # a class token stands first
        assert 0.1 < tokens.std() < 20
        torch.testing.assert_close(stage.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits_BC, expected["logits"], atol=1e-5, rtol=1e-5)


# Files as each implementation writes them, from a model of transformers


def on_disk(model: nn.Module, folder: Path) -> Path:
    """What `save_pretrained` writes: the names of transformers 4 and of the hub."""
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def in_memory(model: nn.Module, folder: Path) -> Path:
    """The state dict of transformers 5, where some names differ from those on disk."""
    torch.save(model.state_dict(), folder / "state.bin")
    return folder / "state.bin"


def official_swin(model: nn.Module, folder: Path) -> Path:
    """microsoft/Swin-Transformer: {"model": ...}, with buffers, `head`, downsampling at the end of a stage."""
    weights = swin_names(model)
    config = model.config
    grid = config.image_size // 4
    for stage in range(4):
        tokens = config.window_size**2
        weights[f"layers.{stage}.blocks.0.attn.relative_position_index"] = torch.zeros(tokens, tokens)
        if grid > config.window_size:
            side = math.ceil(grid / config.window_size)
            weights[f"layers.{stage}.blocks.1.attn_mask"] = torch.zeros(side * side, tokens, tokens)
        grid //= 2
    torch.save({"model": weights}, folder / "swin.pth")
    return folder / "swin.pth"


def timm_swin(model: nn.Module, folder: Path) -> Path:
    """Of timm from 0.9 on: no buffers, `head.fc`, downsampling at the start of the next stage."""
    weights = {}
    for name, tensor in swin_names(model).items():
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) + 1}.{rest}"
        weights[name.replace("head.", "head.fc.")] = tensor
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "timm.safetensors")
    return folder / "timm.safetensors"


def swin_names(model: nn.Module) -> Weights:
    """A Swin of transformers under the official names, written out key by key."""
    root, weights = model.swin, {}

    def take(name: str, layer: nn.Module) -> None:
        weights.update({f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})

    take("patch_embed.proj", root.embeddings.patch_embeddings.projection)
    take("patch_embed.norm", root.embeddings.norm)
    for s, stage in enumerate(root.encoder.layers):
        for b, block in enumerate(stage.blocks):
            name, attention = f"layers.{s}.blocks.{b}", block.attention
            take(f"{name}.norm1", block.layernorm_before)
            take(f"{name}.norm2", block.layernorm_after)
            take(f"{name}.mlp.fc1", block.mlp.fc1)
            take(f"{name}.mlp.fc2", block.mlp.fc2)
            take(f"{name}.attn.proj", attention.o_proj)
            for kind in ("weight", "bias"):
                parts = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
                weights[f"{name}.attn.qkv.{kind}"] = torch.cat(parts).detach()
            table = attention.relative_position_bias.relative_position_bias_table
            weights[f"{name}.attn.relative_position_bias_table"] = table.detach()
        if stage.downsample is not None:
            take(f"layers.{s}.downsample", stage.downsample)
    take("norm", root.layernorm)
    take("head", model.classifier)
    return weights


def official_pvt(model: nn.Module, folder: Path) -> Path:
    """whai362/PVT: a bare state dict."""
    root, weights = model.pvt.encoder, {}

    def take(name: str, layer: nn.Module) -> None:
        weights.update({f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()})

    for s, (embedding, stage) in enumerate(zip(root.patch_embeddings, root.block, strict=True), start=1):
        take(f"patch_embed{s}.proj", embedding.projection)
        take(f"patch_embed{s}.norm", embedding.layer_norm)
        weights[f"pos_embed{s}"] = embedding.position_embeddings.detach()
        for b, block in enumerate(stage):
            name, attention = f"block{s}.{b}", block.attention.self
            take(f"{name}.norm1", block.layer_norm_1)
            take(f"{name}.norm2", block.layer_norm_2)
            take(f"{name}.mlp.fc1", block.mlp.dense1)
            take(f"{name}.mlp.fc2", block.mlp.dense2)
            take(f"{name}.attn.q", attention.query)
            take(f"{name}.attn.proj", block.attention.output.dense)
            for kind in ("weight", "bias"):
                parts = [getattr(part, kind) for part in (attention.key, attention.value)]
                weights[f"{name}.attn.kv.{kind}"] = torch.cat(parts).detach()
            if s < 4:
                take(f"{name}.attn.sr", attention.sequence_reduction)
                take(f"{name}.attn.norm", attention.layer_norm)
    weights["cls_token"] = root.patch_embeddings[3].cls_token.detach()
    take("norm", root.layer_norm)
    take("head", model.classifier)
    torch.save(weights, folder / "pvt.pth")
    return folder / "pvt.pth"


Writer = Callable[[nn.Module, Path], Path]
SWIN_FILES = [on_disk, in_memory, official_swin, timm_swin]
PVT_FILES = [on_disk, in_memory, official_pvt]


# Parity


@pytest.mark.parametrize("write", SWIN_FILES)
@pytest.mark.parametrize(("size", "window"), [(224, 7), (384, 12)])
def test_swin_equals_transformers(tmp_path: Path, size: int, window: int, write: Writer) -> None:
    theirs = swin(size, window)
    imported = import_checkpoint(write(theirs, tmp_path), tmp_path / "ours.safetensors")
    arch = imported.description.arch
    assert (arch.family, arch.image_size, arch.windows, arch.num_classes) == ("swin", size, (window,) * 4, CLASSES)
    assert bool(imported.notes) == (write is not official_swin)  # whose masks say the size
    assert_same(load_checkpoint(tmp_path / "ours.safetensors")[0], theirs, size)


@pytest.mark.parametrize("write", PVT_FILES)
@pytest.mark.parametrize("size", [224, 384])
def test_pvt_equals_transformers(tmp_path: Path, size: int, write: Writer) -> None:
    theirs = pvt(size)
    imported = import_checkpoint(write(theirs, tmp_path), tmp_path / "ours.safetensors")
    arch = imported.description.arch
    assert (arch.family, arch.image_size, arch.class_token, arch.num_classes) == ("pvt", size, True, CLASSES)
    assert not imported.notes
    assert_same(load_checkpoint(tmp_path / "ours.safetensors")[0], theirs, size)


@pytest.mark.parametrize("size", [256, 288])
def test_a_window_that_does_not_divide_the_grid_is_padded_as_in_transformers(tmp_path: Path, size: int) -> None:
    """Both pad after the norm, below and to the right. 256 px: grids of 64, 32, 16 and 8."""
    theirs = swin(size, 7)
    import_checkpoint(on_disk(theirs, tmp_path), tmp_path / "ours.safetensors", image_size=size, window=7)
    assert_same(load_checkpoint(tmp_path / "ours.safetensors")[0], theirs, size)


PUBLISHED = {
    "swin-tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 224, 7),
    "swin-small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 224, 7),
    "swin-base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 224, 7),
    "swin-base-384": (128, [2, 2, 18, 2], [4, 8, 16, 32], 384, 12),
    "swin-large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 224, 7),
    "swin-large-384": (192, [2, 2, 18, 2], [6, 12, 24, 48], 384, 12),
}
PUBLISHED_PVT = {
    "pvt-tiny": [2, 2, 2, 2],
    "pvt-small": [3, 4, 6, 3],
    "pvt-medium": [3, 4, 18, 3],
    "pvt-large": [3, 8, 27, 3],
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_swins_have_as_many_parameters(name: str) -> None:
    width, depths, heads, size, window = PUBLISHED[name]
    config = transformers.SwinConfig(
        embed_dim=width, depths=depths, num_heads=heads, image_size=size, window_size=window, num_labels=1000
    )
    with torch.device("meta"):
        theirs = transformers.SwinForImageClassification(config)
        ours = build_model(architecture(name, num_classes=1000, with_decoder=False))
    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("name", PUBLISHED_PVT)
def test_published_pvts_have_as_many_parameters(name: str) -> None:
    """But for the class token and its position, which make one of 512 numbers here."""
    config = transformers.PvtConfig(depths=PUBLISHED_PVT[name], num_labels=1000)
    arch = architecture(name, num_classes=1000, with_decoder=False)
    with torch.device("meta"):
        theirs = transformers.PvtForImageClassification(config)
        ours = build_model(arch)
    assert parameters(ours) == parameters(theirs) - 2 * 512


# Other input sizes, heads and windows


def test_other_windows_and_sizes_resize_the_tables(tmp_path: Path) -> None:
    source = timm_swin(swin(), tmp_path)
    table = load_file(source)["layers.0.blocks.0.attn.relative_position_bias_table"]
    larger = import_checkpoint(source, tmp_path / "384.safetensors", image_size=384).description.arch
    assert (larger.image_size, larger.windows) == (384, (12,) * 4)
    resized = load_file(tmp_path / "384.safetensors")["layers.0.blocks.0.attn.relative_position_bias_table"]
    grid = table.reshape(1, 13, 13, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (23, 23), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized, expected.flatten(2)[0].T)
    same = import_checkpoint(source, tmp_path / "padded.safetensors", image_size=256, window=7).description.arch
    assert (same.image_size, same.windows) == (256, (7,) * 4)
    kept = load_file(tmp_path / "padded.safetensors")["layers.0.blocks.0.attn.relative_position_bias_table"]
    assert torch.equal(kept, table)


def test_learned_positions_are_resized_as_the_official_code_does(tmp_path: Path) -> None:
    source = official_pvt(pvt(), tmp_path)
    import_checkpoint(source, tmp_path / "ours.safetensors", image_size=384)
    resized = load_file(tmp_path / "ours.safetensors")["layers.3.pos_embed"]
    places = torch.load(source, weights_only=True)["pos_embed4"][:, 1:].reshape(1, 7, 7, 64).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(places, (12, 12), mode="bilinear")
    torch.testing.assert_close(resized, expected.flatten(2).transpose(1, 2))


def test_a_head_of_imagenet_22k_keeps_its_size(tmp_path: Path) -> None:
    weights = swin_names(swin())
    weights |= {"head.weight": torch.randn(21841, 64), "head.bias": torch.randn(21841)}
    torch.save({"model": weights}, tmp_path / "22k.pth")
    description = import_checkpoint(tmp_path / "22k.pth", tmp_path / "ours.safetensors").description
    assert description.arch.num_classes == 21841
    assert load_checkpoint(tmp_path / "ours.safetensors")[0].head.bias.shape == (21841,)


def test_a_model_without_head_and_prefix_is_imported(tmp_path: Path) -> None:
    """`SwinModel` and `PvtModel`."""
    for model in (swin().swin, pvt().pvt):
        torch.save(model.state_dict(), tmp_path / "model.bin")
        arch = import_checkpoint(tmp_path / "model.bin", tmp_path / "ours.safetensors").description.arch
        assert (arch.family, arch.num_classes) == (model.config.model_type, 0)


# What is refused


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Weights], Path]:
    folder = tmp_path_factory.mktemp("broken")

    def write(weights: Weights) -> Path:
        torch.save(weights, folder / "broken.pth")
        return folder / "broken.pth"

    return write


def test_left_over_and_missing_keys_are_named(tmp_path: Path, broken: Callable[[Weights], Path]) -> None:
    ours = swin_names(swin())
    theirs = dict(swin().state_dict())
    pyramid = torch.load(official_pvt(pvt(), tmp_path), weights_only=True)
    table = "layers.0.blocks.1.attn.relative_position_bias_table"
    key = "swin.encoder.layers.0.blocks.0.attention.k_proj.weight"
    cases: dict[str, Weights] = {
        "has unknown weights: mask_token": ours | {"mask_token": torch.zeros(1)},
        "lacks weights: layers.2.blocks.1.mlp.fc1.bias": without(ours, "layers.2.blocks.1.mlp.fc1.bias"),
        rf"misshapen weights: {table} is \[529, 1\] instead of \[169, 1\]": ours | {table: torch.zeros(529, 1)},
        r"lacks weights: layers.0.blocks.0.attn.k.weight \(by our names\)": without(theirs, key),
        r"layers.3.pos_embed is \[1, 50, 64\] instead of \[1, 49, 64\]": without(pyramid, "cls_token"),
        "a PVT v2, whose convolutions mix the two images": {"block1.0.mlp.dwconv.dwconv.weight": torch.zeros(1)},
        "holds a Swin V2: only the first Swin": {"layers.0.blocks.0.attn.logit_scale": torch.zeros(1)},
        "holds no weights of MixMIM, Swin or PVT": {"conv1.weight": torch.zeros(3)},
    }
    for sentence, weights in cases.items():
        with pytest.raises(CheckpointError, match=sentence):
            import_checkpoint(broken(weights), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def without(weights: Weights, *names: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def test_windows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConfigError, match="a window of 60 tokens is larger than the 56 x 56"):
        import_checkpoint(timm_swin(swin(), tmp_path), out, window=60)
    with pytest.raises(ConfigError, match="has no windows"):
        import_checkpoint(official_pvt(pvt(), tmp_path), out, window=7)
    assert not out.exists()


def test_the_command_says_what_it_assumed(tmp_path: Path) -> None:
    source = timm_swin(swin(), tmp_path)
    run = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "ours.safetensors"), "--window", "4"])
    assert run.exit_code == 0
    assert "does not say its input size: assumed 224 px" in run.output
    assert load_checkpoint(tmp_path / "ours.safetensors")[1].arch.windows == (4, 4, 4, 4)
