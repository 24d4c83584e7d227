"""Our checkpoints: a round trip, and every kind of file that is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from mixmim_serve.config import Architecture, DecoderConfig, Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError
from mixmim_serve.model import MixMIM, build_model
from mixmim_serve.model.checkpoint import load_checkpoint, save_checkpoint
from mixmim_serve.model.released import import_checkpoint

SMALL = Architecture(8, (1, 1, 1, 1), (1, 1, 1, 1), 64, decoder=DecoderConfig(16, 1, 2, norm_eps=1e-6))
DESCRIPTION = Description(SMALL, Preprocessing.evaluation(64), provenance={"made_by": "a test"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(SMALL).state_dict(), DESCRIPTION)
    return path


def test_a_checkpoint_rebuilds_the_model_alone(tmp_path: Path) -> None:
    model = build_model(SMALL).eval()
    save_checkpoint(tmp_path / "a.safetensors", model.state_dict(), DESCRIPTION)
    loaded, description = load_checkpoint(tmp_path / "a.safetensors")
    pixels = torch.randn(2, 3, 64, 64)
    assert description == DESCRIPTION
    assert isinstance(loaded, MixMIM)
    assert loaded.decoder_norm.eps == 1e-6
    assert loaded.decoder_blocks[0].norm1.eps == 1e-6
    assert torch.equal(loaded(pixels).embedding_BD, model(pixels).embedding_BD)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]  # no temporary file left


def test_equal_checkpoints_are_equal_files(tmp_path: Path) -> None:
    weights = build_model(SMALL).state_dict()
    for number in range(8):  # the order of several metadata keys would be random
        save_checkpoint(tmp_path / f"{number}.safetensors", weights, DESCRIPTION)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_half_precision_on_disk_loads_as_float32(tmp_path: Path) -> None:
    model = build_model(SMALL)
    save_checkpoint(tmp_path / "a.safetensors", model.state_dict(), DESCRIPTION, torch.float16)
    loaded, _ = load_checkpoint(tmp_path / "a.safetensors")
    weight = model.norm.weight
    assert loaded.norm.weight.dtype == torch.float32
    assert torch.equal(loaded.norm.weight, weight.half().float())


def test_a_failed_write_leaves_the_old_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("mixmim_serve.model.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(checkpoint, build_model(SMALL).state_dict(), DESCRIPTION)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_unusable_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    cases = {
        "no such file": tmp_path / "missing.safetensors",
        "not a complete safetensors file": tmp_path / "cut.safetensors",
        "without a model description": tmp_path / "bare.safetensors",
        "lacks weights: norm.weight": tmp_path / "lacking.safetensors",
        "has unknown weights: extra": tmp_path / "extra.safetensors",
        r"norm.weight is \[3\] instead of \[64\]": tmp_path / "misshapen.safetensors",
    }
    weights = load_file(checkpoint)
    paths = list(cases.values())
    paths[1].write_bytes(checkpoint.read_bytes()[:-100])
    save_file(weights, paths[2])
    save_checkpoint(paths[3], {k: v for k, v in weights.items() if k != "norm.weight"}, DESCRIPTION)
    save_checkpoint(paths[4], weights | {"extra": torch.zeros(1)}, DESCRIPTION)
    save_checkpoint(paths[5], weights | {"norm.weight": torch.zeros(3)}, DESCRIPTION)
    for sentence, path in cases.items():
        with pytest.raises(CheckpointError, match=sentence):
            load_checkpoint(path)


class Exploit:
    """Unpickles to a call that would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_import_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    official = torch.load(GOLDEN / "official_finetune_mini.pth", weights_only=False)["model"]
    names = list(official)
    cases: dict[str, object] = {
        "was not loaded|contains more than weights": {"model": official, "hook": Exploit(tmp_path / "hacked")},
        "holds no weights of MixMIM, Swin or PVT": {"conv1.weight": torch.zeros(3)},
        "lacks weights: layers.2.blocks.0.attn.proj.bias": {
            k: v for k, v in official.items() if k != "layers.2.blocks.0.attn.proj.bias"
        },
        "has unknown weights: surprise": official | {"surprise": torch.zeros(1)},
        "has misshapen weights: norm.weight": official | {"norm.weight": torch.zeros(5)},
        "holds a list": [1, 2, 3],
        "patch_embed.proj.weight": {k: v for k, v in official.items() if not k.startswith("patch_embed.")},
    }
    assert "norm.weight" in names
    for number, (sentence, content) in enumerate(cases.items()):
        source = tmp_path / f"{number}.pth"
        torch.save(content, source)
        with pytest.raises(CheckpointError, match=sentence):
            import_checkpoint(source, tmp_path / "out.safetensors")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.pth").write_bytes((GOLDEN / "official_finetune_mini.pth").read_bytes()[:5000])
    for name in ("text.pth", "cut.pth", "missing.pth"):
        with pytest.raises(CheckpointError, match=r"torch checkpoint|no such file"):
            import_checkpoint(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "layout", "classes"),
    [
        ("official_pretrain", "official", 0),
        ("official_finetune", "official", 10),
        ("mmpretrain_pretrain", "mmpretrain", 0),
        ("mmpretrain_classify", "mmpretrain", 10),
    ],
)
def test_import_writes_a_checkpoint_of_ours(tmp_path: Path, name: str, layout: str, classes: int) -> None:
    target = tmp_path / "out.safetensors"
    imported = import_checkpoint(GOLDEN / f"{name}_mini.pth", target)
    model, description = load_checkpoint(target)
    expected = load_file(GOLDEN / f"{name}_mini.expected.safetensors")
    assert description == imported.description
    assert description.provenance["layout"] == layout
    assert description.arch.num_classes == classes
    assert description.arch.windows == (12, 12, 6, 3)
    assert bool(description.labels) == (name == "mmpretrain_classify")
    assert (description.arch.decoder is not None) == bool(imported.notes) == name.endswith("pretrain")
    if classes:
        torch.testing.assert_close(model(expected["images"]).logits_BC, expected["logits"], atol=1e-5, rtol=0)


def test_import_reads_a_bare_state_dict(tmp_path: Path) -> None:
    content = torch.load(GOLDEN / "mmpretrain_classify_mini.pth", weights_only=True)["state_dict"]
    torch.save({f"module.{name}": value for name, value in content.items()}, tmp_path / "bare.pth")
    bare = import_checkpoint(tmp_path / "bare.pth", tmp_path / "bare.safetensors").description
    whole = import_checkpoint(GOLDEN / "mmpretrain_classify_mini.pth", tmp_path / "whole.safetensors").description
    assert bare.arch == whole.arch
    one, two = load_file(tmp_path / "bare.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_import_carries_weights_to_another_size(tmp_path: Path) -> None:
    import_checkpoint(GOLDEN / "official_finetune_mini.pth", tmp_path / "out.safetensors", image_size=160)
    model, description = load_checkpoint(tmp_path / "out.safetensors")
    assert description.preprocessing == Preprocessing.evaluation(160)
    assert model(torch.randn(1, 3, 160, 160)).embedding_BD.shape == (1, 64)
