"""The plain encoder of the export benchmark is the same network, and the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))

pytest.importorskip("openvino")

from benchmarks.plain_encoder import PlainEncoder
from mixmim_serve.config import Architecture
from mixmim_serve.model import build_model

# Windows smaller than the grid in the first two stages.
ARCH = Architecture(8, (2, 1, 1, 1), (1, 1, 2, 2), 128, (8, 8, 8, 4))


def test_the_plain_encoder_has_our_embeddings() -> None:
    torch.manual_seed(0)
    ours, plain = build_model(ARCH).double().eval(), PlainEncoder(ARCH).double().eval()
    for parameter in ours.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    plain.load_state_dict(ours.state_dict())
    pixels = torch.randn(3, 3, 128, 128, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(plain(pixels), ours(pixels).embedding_BD, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_comparison_runs(tmp_path: Path) -> None:
    out = tmp_path / "plain.md"
    words = ["--sizes", "tiny", "--rounds", "1", "--seconds", "0.1", "--batches", "1", "--output", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.plain_export", *words], cwd=REPOSITORY, timeout=1200, check=True)
    report = json.loads(out.with_suffix(".json").read_text())
    assert [(row["runtime"], row["precision"]) for row in report["rows"]] == [
        ("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["ratio_cpu"][0] > 0
        assert min(row["cosine"].values()) > 0.999
    nodes = report["sizes"]["tiny"]["nodes"]
    assert nodes["ours"]["exported"].get("Slice", 0) < nodes["plain"]["exported"]["Slice"]
    assert "| tiny, 1 | onnx fp32 |" in out.read_text()
