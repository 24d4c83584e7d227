"""Parity with the arrays that the two public implementations produced (tests/golden/README.md)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden_sets
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mixmim_serve.config import architecture
from mixmim_serve.model import Encoder, MixMIM, build_model
from mixmim_serve.model.released import infer_architecture, read_released, resize_weights

DECODER_HEADS = 4  # of both golden networks; shapes do not show it
ATOL = 1e-5  # float32 and float64 differ by 4e-6; 1e-4 would miss a wrong decoder eps


@dataclass(frozen=True)
class Golden:
    """One golden set."""

    folder: Path
    network: str
    transfer: str

    def expected(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path(name, ".expected.safetensors"))

    def metadata(self, name: str) -> dict[str, str]:
        with safe_open(self.path(name, ".expected.safetensors"), "pt") as file:
            return file.metadata()

    def path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name.format(self.network)}{suffix}"

    def load(self, name: str, **changes: object) -> tuple[Encoder, dict[str, Tensor]]:
        """The public checkpoint in our model, and its weights under our names."""
        path = self.path(name, ".pth")
        released = read_released(path)
        arch, _ = infer_architecture(path, released, DECODER_HEADS)
        if changes:
            arch = replace(arch, decoder=replace(arch.decoder, **changes))
        model = build_model(arch)
        model.load_state_dict(released.weights)
        return model, released.weights


@pytest.fixture(params=golden_sets())
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(*request.param)


def assert_close(actual: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("checkpoint", "arrays"),
    [
        ("official_pretrain_{}", "official_pretrain_{}"),
        ("official_pretrain_{}", "official_pretrain_{}_ratio75_rawpix"),
        ("mmpretrain_pretrain_{}", "mmpretrain_pretrain_{}"),
    ],
)
def test_pretraining(golden: Golden, checkpoint: str, arrays: str) -> None:
    model, _ = golden.load(checkpoint, normalize_targets=golden.metadata(arrays)["norm_pix_loss"] == "true")
    assert isinstance(model, MixMIM)
    expected = golden.expected(arrays)
    output = model.pretrain(expected["images"], expected["mask"].bool().unsqueeze(0))
    assert_close(output.encoded_BUD, expected["encoded"])
    assert_close(output.predicted_2BUP, expected["predicted"])
    torch.testing.assert_close(output.loss.reshape(1), expected["loss"], rtol=1e-5, atol=0)

    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = [name.removeprefix("grad.") for name in expected if name.startswith("grad.")]
    assert bool(compared) == checkpoint.startswith("official")  # mmpretrain's file has none
    for name in compared:
        reference = expected[f"grad.{name}"]
        assert_close(gradients[name], reference, atol=1e-3 * reference.abs().max().item())


@pytest.mark.parametrize("name", ["official_finetune_{}", "mmpretrain_classify_{}"])
def test_classification(golden: Golden, name: str) -> None:
    model, _ = golden.load(name)
    expected = golden.expected(name)
    output = model(expected["images"])
    assert_close(output.embedding_BD, expected["features"])
    assert_close(output.logits_BC, expected["logits"])


def test_transfer_to_a_larger_input(golden: Golden) -> None:
    model, weights = golden.load("official_pretrain_{}")
    expected = load_file(golden.folder / f"official_transfer_{golden.transfer}.expected.safetensors")
    tables = [expected[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(4)]
    windows = tuple((math.isqrt(len(table)) + 1) // 2 for table in tables)
    larger = replace(model.arch.at(expected["images"].shape[-1], windows), decoder=None)
    resized = resize_weights(weights, model.arch, larger)
    compared = [name for name in expected if name in resized]
    assert len(compared) == 6  # the position embedding and five bias tables
    for name in compared:
        assert_close(resized[name], expected[name])
    encoder = build_model(larger)
    encoder.load_state_dict(resized)
    assert_close(encoder(expected["images"]).embedding_BD, expected["features"])


@pytest.mark.parametrize(("key", "count"), json.loads((GOLDEN / "official_param_counts.json").read_text()).items())
def test_parameter_counts(key: str, count: int) -> None:
    pretrain = key.endswith("_pretrain")
    name = key.removesuffix("_pretrain").removesuffix("_classify_1000").removesuffix("_encoder").replace("_", "-")
    classes = 1000 if key.endswith("_classify_1000") else 0
    with torch.device("meta"):
        model = build_model(architecture(name, num_classes=classes, with_decoder=pretrain))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
