"""`mixmim bench`: what it measures, and what it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mixmim_serve.bench import Report, Row, _best, _with_share, bench, encoder_flops, matrix_rate
from mixmim_serve.cli import app
from mixmim_serve.cli.bench import _table
from mixmim_serve.config import architecture
from mixmim_serve.errors import EngineError
from mixmim_serve.model import Encoder


@pytest.mark.parametrize(
    ("name", "size", "windows"),
    [("tiny", 128, ()), ("base", 224, ()), ("base", 384, ()), ("swin-tiny", 224, ()), ("swin-tiny", 256, (7, 7, 7, 7)),
     ("pvt-small", 224, ())],
)  # fmt: skip
def test_the_arithmetic_is_counted_as_torch_does(name: str, size: int, windows: tuple[int, ...]) -> None:
    arch = architecture(name, with_decoder=False).at(size, windows)
    with torch.device("meta"):
        model = Encoder(arch).eval()
        pixels = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(pixels)
    assert encoder_flops(arch) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.slow
def test_a_report_has_a_row_for_each_engine_precision_and_batch(
    exported_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixmim_serve.bench._rates_to_measure", lambda: [("cpu", "fp32")])  # a second each
    heard: list[str] = []
    contenders = (("onnx", "fp32"), ("openvino", "fp32"), ("onnx", "fp16"))
    report = bench(exported_bundle, contenders, batches=(1, 3), seconds=0.01, rounds=2, progress=heard.append)
    assert [(row.engine, row.precision, row.batch) for row in report.rows] == [
        ("onnx-cpu", "fp32", 1), ("onnx-cpu", "fp32", 3), ("openvino-cpu", "fp32", 1), ("openvino-cpu", "fp32", 3)
    ]  # fmt: skip
    for row in report.rows:
        assert row.images_per_second == pytest.approx(row.batch * 1e3 / row.p50)
        assert 0 < row.p50 <= row.p99
        assert row.memory > 20
        assert 0 < row.load < 60
        assert row.cosine > 0.99999
        assert row.error < 1e-4
        assert row.share is not None
        assert 0 < row.share < 2
    assert list(report.missing) == ["onnx fp16"]
    assert "has no fp16 graphs" in report.missing["onnx fp16"]
    assert report.rates["cpu fp32"] > 0
    assert {row.gpu_memory for row in report.rows} == {None}
    assert report.about["engines"].keys() == {"onnx-cpu", "openvino-cpu"}
    assert sum("openvino fp32" in line for line in heard) == 2
    assert sum("onnx fp16" in line for line in heard) == 1  # not asked again


def test_a_bundle_that_nothing_runs_is_refused(exported_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.bench._rates_to_measure", list)
    with pytest.raises(EngineError, match=r"no installed engine can run this bundle\. .*has no fp16 graphs"):
        bench(exported_bundle, (("onnx", "fp16"),), seconds=0.01, rounds=1)


def test_the_machines_rate_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.bench.MATRIX", 512)
    rate = matrix_rate("fp32", 0.05)
    assert rate is not None
    assert 0.001 < rate < 1000


def test_the_command_writes_a_table_json_and_a_picture(
    exported_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixmim_serve.bench._rates_to_measure", lambda: [("cpu", "fp32")])  # a second each
    monkeypatch.setattr("mixmim_serve.bench.ON_CPU", (("onnx", "fp32"),))  # test_readme.py: all
    target = tmp_path / "out" / "bench.json"
    done = CliRunner().invoke(
        app,
        ["bench", str(exported_bundle), "--batch", "2", "--seconds", "0.1", "--rounds", "1", "--output", str(target)],
    )
    assert done.exit_code == 0, done.output
    assert "onnx-cpu" in done.output
    values = json.loads(target.read_text())
    assert {Row(**row).batch for row in values["rows"]} == {2}
    with Image.open(target.with_suffix(".png")) as picture:
        assert picture.width > 800


def test_rows_of_a_gpu_are_held_to_its_own_rate_and_show_its_memory() -> None:
    row = Row("tensorrt-rtx-cuda", "fp16", 8, 1000.0, 8.0, 9.0, 500.0, 1.0, 1.0, 0.0, None, 750.4)
    rates = {"cuda fp16": 10.0, "cpu fp16": 1.0}
    assert _with_share(row, 1e9, rates).share == pytest.approx(0.1)
    assert _with_share(dataclasses.replace(row, engine="onnx-cpu"), 1e9, rates).share == pytest.approx(1.0)
    assert _with_share(dataclasses.replace(row, precision="bf16"), 1e9, rates).share is None
    slower = dataclasses.replace(row, images_per_second=500.0, gpu_memory=800.0)
    assert _best([slower, row]) == dataclasses.replace(row, gpu_memory=800.0)
    about = {"bundle": "tiny", "gflop_an_image": 1.0}
    for memory, expected in ((750.4, ["750"]), (None, [])):
        table = _table(Report((dataclasses.replace(row, gpu_memory=memory),), {}, rates, about))
        found = [list(column.cells) for column in table.columns if column.header == "GPU MB"]  # type: ignore[attr-defined]
        assert [cell for cells in found for cell in cells] == expected
