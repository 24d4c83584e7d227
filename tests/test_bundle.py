"""Bundles as they are opened and verified, and what both engines refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmim_serve.bundle import Bundle, canonical_json, encoder_outputs, fingerprint, open_bundle
from mixmim_serve.config import architecture
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.engines.base import Arrays
from mixmim_serve.errors import BundleError, EngineError
from mixmim_serve.files import sha256

PIXELS = np.zeros((2, 64, 64, 3), np.uint8)
MASKS = np.zeros((2, 4), np.bool_)
PAIR = {"image_a": PIXELS, "image_b": PIXELS, "from_partner": MASKS}


@pytest.fixture(scope="module", params=["onnx", "openvino", "torch"])  # those that need no GPU
def engine(request: pytest.FixtureRequest, exported_bundle: Path) -> Engine:
    if request.param == "torch":
        pytest.importorskip("torch")
    return open_engine(exported_bundle, request.param, "fp32")


def alter_config(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((bundle / "config.json").read_text())
    change(values)
    (bundle / "config.json").write_text(json.dumps(values))


def replace_graph(bundle: Path, name: str, content: bytes) -> None:
    """Another graph, with a checksum that says it belongs there."""
    path = bundle / f"{name}.onnx"
    path.write_bytes(content)
    alter_config(bundle, lambda values: values["sha256"].update({path.name: sha256(path)}))


def test_a_bundle_reads_what_was_written(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    bundle.save_config()
    assert open_bundle(bundle_copy) == bundle
    assert bundle.arch == bundle.description.arch
    assert bundle.description.labels == ("cat", "dog", "owl")
    assert bundle.graph_path("encoder") == bundle_copy / "encoder.onnx"
    with pytest.raises(BundleError, match="has no fp16 graphs, only fp32: export it with --precision fp16"):
        bundle.graph_path("encoder", "fp16")


def test_what_is_no_bundle_is_refused(tmp_path: Path, bundle_copy: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty", bundle_copy / "config.json"):
        with pytest.raises(BundleError, match=r"is not a bundle: expected a folder with config\.json"):
            open_bundle(path)
        with pytest.raises(BundleError, match="is not a bundle"):
            open_engine(path, "onnx")


@pytest.mark.parametrize("content", ["", "{", "\0", "[]", "null", "3", '"text"', "{}", '{"format": 2', '{"format": 2}'])
def test_a_damaged_config_is_refused(bundle_copy: Path, content: str) -> None:
    (bundle_copy / "config.json").write_text(content)
    with pytest.raises(BundleError, match=r"config\.json is damaged \(.*\): export the bundle again"):
        open_bundle(bundle_copy)


def test_a_config_that_is_not_text_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / "config.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(0, "export it again"), (1, "export it again"), ("2", "export it again"), (None, "export it again"),
     (3, "update mixmim-serve")],
)  # fmt: skip
def test_another_format_is_refused(bundle_copy: Path, number: object, advice: str) -> None:
    alter_config(bundle_copy, lambda values: values.update(format=number))
    with pytest.raises(BundleError, match=f"has format {number}, this version reads 2: {advice}"):
        open_bundle(bundle_copy)


KEYS = (
    "format",
    "fingerprint",
    "architecture",
    "preprocessing",
    "weights",
    "precisions",
    "built",
    "graphs",
    "versions",
    "sha256",
)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(bundle_copy: Path, key: str) -> None:
    alter_config(bundle_copy, lambda values: values.pop(key))
    with pytest.raises(BundleError, match=f"is damaged .*{key}"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architecture": {"embed_dim": 8}}, "invalid architecture"),
        (
            {"preprocessing": {"image_size": 32, "resize_size": 32}},
            "preprocessing produces 32 px, the network expects 64",
        ),
        ({"labels": ["cat"]}, "1 labels for 3 classes"),
        ({"graphs": ["encoder"]}, "is damaged"),
        ({"graphs": {"encoder": 3}}, "is damaged"),
        ({"sha256": None}, "is damaged"),
        ({"precisions": 32}, "is damaged"),
        ({"built": [{"file": "x"}]}, "is damaged"),
    ],
)
def test_a_config_with_wrong_values_is_refused(bundle_copy: Path, change: dict[str, object], sentence: str) -> None:
    alter_config(bundle_copy, lambda values: values.update(change))
    with pytest.raises(BundleError, match=f"is damaged.*{sentence}|{sentence}"):
        open_bundle(bundle_copy)


FILES = ("encoder.onnx", "golden.safetensors", "reconstruct.onnx", "weights.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_verify_names_a_missing_file(bundle_copy: Path, name: str) -> None:
    open_bundle(bundle_copy).verify()
    (bundle_copy / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}: export the bundle again"):
        open_bundle(bundle_copy).verify()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_verify_sees_one_altered_bit(bundle_copy: Path, name: str, position: int) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[position] ^= 1
    (bundle_copy / name).write_bytes(content)
    for check in (lambda: open_bundle(bundle_copy).verify(), lambda: open_engine(bundle_copy, "onnx")):
        with pytest.raises(BundleError, match=rf"{name} was altered after the export \(its sha256 differs\)"):
            check()


def test_every_file_beside_the_config_has_a_checksum(exported_bundle: Path) -> None:
    assert sorted(open_bundle(exported_bundle).checksums) == list(FILES)


def test_an_unknown_graph_is_refused(exported_bundle: Path, engine: Engine) -> None:
    with pytest.raises(BundleError, match="has no decoder graph; it has encoder, reconstruct"):
        open_bundle(exported_bundle).graph_path("decoder")
    with pytest.raises(BundleError, match="has no decoder graph; it has encoder, reconstruct"):
        engine.run("decoder", {"pixels": PIXELS}, ["embedding"])


@pytest.mark.parametrize(
    ("graph", "inputs", "outputs", "sentence"),
    [
        ("encoder", {"pixels": PIXELS}, ["embeding"], r"returns embedding, .*, logits; requested: embeding\."),
        ("encoder", {"pixels": PIXELS}, ["embedding", "mixed"], r"requested: mixed\."),
        ("encoder", {"pixels": PIXELS}, [], "requested: nothing"),
        ("encoder", {"image": PIXELS}, ["embedding"], "the encoder graph takes pixels; got image"),
        ("encoder", {}, ["embedding"], "the encoder graph takes pixels; got nothing"),
        ("encoder", {"pixels": PIXELS, "image": PIXELS}, ["embedding"], "takes pixels; got pixels, image"),
        (
            "encoder",
            {"pixels": PIXELS[0]},
            ["embedding"],
            r"pixels must have shape \(batch, 64, 64, 3\).*got \(64, 64, 3\)",
        ),
        ("encoder", {"pixels": PIXELS[:, :32]}, ["embedding"], r"got \(2, 32, 64, 3\)"),
        ("encoder", {"pixels": PIXELS.transpose(0, 3, 1, 2)}, ["embedding"], r"got \(2, 3, 64, 64\)"),
        ("encoder", {"pixels": np.uint8(0)}, ["embedding"], r"pixels must have shape .*got \(\)"),
        ("encoder", {"pixels": PIXELS / 255}, ["embedding"], "pixels must have dtype uint8; got float64"),
        ("reconstruct", PAIR | {"from_partner": MASKS * 1}, ["mixed"], "from_partner must have dtype bool; got int64"),
        ("reconstruct", {"image_a": PIXELS, "image_b": PIXELS}, ["mixed"], "takes image_a, image_b, from_partner; got"),
        ("reconstruct", PAIR, ["logits"], r"returns mixed, reconstruction_a, reconstruction_b; requested: logits\."),
        (
            "reconstruct",
            PAIR | {"from_partner": MASKS[:, 1:]},
            ["mixed"],
            r"from_partner must have shape \(batch, 4\).*2, 3",
        ),
        ("reconstruct", PAIR | {"from_partner": MASKS[:1]}, ["mixed"], "the same batch for all inputs"),
        ("reconstruct", PAIR | {"image_b": PIXELS[:1]}, ["mixed"], "the same batch for all inputs"),
    ],
)
def test_engines_refuse_what_a_graph_does_not_take(
    engine: Engine, graph: str, inputs: Arrays, outputs: list[str], sentence: str
) -> None:
    with pytest.raises(EngineError, match=sentence):
        engine.run(graph, inputs, outputs)


def test_engines_give_the_outputs_that_were_asked_for(engine: Engine) -> None:
    shapes = {"logits": (2, 3), "stage1": (2, 8, 16, 16), "stage4": (2, 64, 2, 2), "embedding": (2, 64)}
    results = engine.run("encoder", {"pixels": PIXELS}, list(shapes))
    assert list(results) == list(shapes)
    assert {name: array.shape for name, array in results.items()} == shapes
    assert all(array.dtype == np.float32 for array in results.values())
    assert engine.run("reconstruct", PAIR, ["mixed"])["mixed"].shape == (2, 3, 64, 64)


def test_engines_take_other_layouts(engine: Engine) -> None:
    """Fortran order and negative strides are not misread."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    masks = np.array([[True, False, False, True], [False, True, True, True]])
    plain = {"image_a": pixels, "image_b": pixels[::-1], "from_partner": masks}
    other = {name: np.asfortranarray(array) for name, array in plain.items()}
    expected = engine.run("reconstruct", plain, ["reconstruction_a"])["reconstruction_a"]
    np.testing.assert_array_equal(engine.run("reconstruct", other, ["reconstruction_a"])["reconstruction_a"], expected)


def test_engines_serve_several_threads_at_once(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 256, (1 + number % 3, 64, 64, 3), np.uint8) for number in range(24)]

    def run(number: int) -> Arrays:
        pixels = batches[number]
        if number % 2:
            return engine.run("encoder", {"pixels": pixels}, ["embedding", "stage2"])
        masks = np.arange(4)[None, :].repeat(len(pixels), 0) % 3 == number % 3
        return engine.run(
            "reconstruct", {"image_a": pixels, "image_b": 255 - pixels, "from_partner": masks}, ["reconstruction_b"]
        )

    alone = [run(number) for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(24)))
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-5, rtol=0)


def test_an_engine_says_what_it_is(engine: Engine, exported_bundle: Path) -> None:
    assert engine.name in ("onnx-cpu", "onnx-cuda", "openvino-cpu", "torch-cpu", "torch-cuda")
    assert engine.bundle == open_bundle(exported_bundle)
    assert engine.precision == "fp32"
    assert engine.version[0].isdigit()
    assert engine.hardware


def test_onnx_opens_reconstruct_when_it_is_first_asked_for(bundle_copy: Path) -> None:
    engine = open_engine(open_bundle(bundle_copy), "onnx", threads=1)
    (bundle_copy / "encoder.onnx").unlink()  # loaded already
    engine.run("encoder", {"pixels": PIXELS}, ["embedding"])
    engine.run("reconstruct", PAIR, ["mixed"])
    (bundle_copy / "reconstruct.onnx").unlink()
    engine.run("reconstruct", PAIR, ["mixed"])


def test_an_unknown_engine_is_refused(exported_bundle: Path) -> None:
    every = "auto, onnx, onnx-tensorrt, openvino, tensorrt, tensorrt-rtx, torch"
    with pytest.raises(EngineError, match=f"unknown engine 'tensorflow': choose one of {every}"):
        open_engine(exported_bundle, "tensorflow")


def test_both_onnx_packages_are_refused(exported_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.engines.onnx._installed", lambda package: package == "onnxruntime-gpu")
    open_engine(exported_bundle, "onnx")
    monkeypatch.setattr("mixmim_serve.engines.onnx._installed", lambda package: True)
    with pytest.raises(EngineError, match=r"onnxruntime and onnxruntime-gpu are both installed.*pip uninstall"):
        open_engine(exported_bundle, "onnx")
    pytest.importorskip("torch")
    open_engine(exported_bundle, "torch")


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [("onnx", "onnxruntime", "cpu"), ("openvino", "openvino", "openvino"), ("torch", "torch", "export")],
)
def test_a_missing_runtime_says_how_to_install_it(
    exported_bundle: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"mixmim_serve.engines.{kind}", raising=False)
    with pytest.raises(EngineError, match=rf"is not installed: run pip install 'mixmim-serve\[{extra}\]'"):
        open_engine(exported_bundle, kind)


def test_a_graph_that_onnx_cannot_load_is_one_sentence(bundle_copy: Path) -> None:
    replace_graph(bundle_copy, "encoder", b"no graph at all")
    with pytest.raises(EngineError, match=r"ONNX Runtime \S+ cannot load \S+encoder.onnx: ") as caught:
        open_engine(bundle_copy, "onnx")
    assert "\n" not in str(caught.value)


def test_a_graph_that_fails_as_it_runs_is_one_sentence(bundle_copy: Path) -> None:
    replace_graph(bundle_copy, "reconstruct", (bundle_copy / "encoder.onnx").read_bytes())
    with pytest.raises(EngineError, match="ONNX Runtime failed on the reconstruct graph: ") as caught:
        open_engine(bundle_copy, "onnx").run("reconstruct", PAIR, ["mixed"])
    assert "\n" not in str(caught.value)


def test_encoder_outputs_have_logits_only_with_a_head() -> None:
    assert encoder_outputs(architecture("tiny")) == ("embedding", "stage1", "stage2", "stage3", "stage4")
    assert encoder_outputs(architecture("tiny", num_classes=2))[-1] == "logits"


def test_the_fingerprint_ignores_order_and_nothing_else(exported_bundle: Path) -> None:
    bundle: Bundle = open_bundle(exported_bundle)

    def of(weights: dict[str, bytes]) -> str:
        return fingerprint(bundle.description, weights)

    assert of({"a": b"1", "b": b"2"}) == of({"b": b"2", "a": b"1"})
    assert len({of({"a": b"1", "b": b"2"}), of({"a": b"2", "b": b"1"}), of({"a": b"12"}), of({"ab": b"12"})}) == 4
    assert canonical_json({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'
