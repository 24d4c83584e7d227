"""Attacks through bundles, checkpoints and their JSON: altered, nested, and with names and links that lead outside."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixmim_serve.bundle import GOLDEN, WEIGHTS, open_bundle
from mixmim_serve.description import METADATA_KEY, read_description
from mixmim_serve.engines import open_engine
from mixmim_serve.engines.certificate import FOLDER, certify
from mixmim_serve.errors import BundleError, CheckpointError, EngineError, OutputError
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.manifest import read_manifest
from mixmim_serve.files import sha256
from mixmim_serve.publish.hub import pull, push
from mixmim_serve.strict_json import MAX_DEPTH, parse_json

DEEP = ["[" * 100_000, '{"a":' * 100_000, '{"a":[' * 50_000, "[" * 1000 + "]" * 1000]


def alter(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((bundle / "config.json").read_text())
    change(values)
    (bundle / "config.json").write_text(json.dumps(values))


def reseal(bundle: Path) -> None:
    """Make the checksums those of the files."""
    alter(bundle, lambda values: values["sha256"].update({name: sha256(bundle / name) for name in values["sha256"]}))


def scale_weights(bundle: Path, factor: float) -> None:
    weights = {name: (array * factor).astype(array.dtype) for name, array in load_file(bundle / WEIGHTS).items()}
    header = (bundle / WEIGHTS).read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    save_file(weights, bundle / WEIGHTS, metadata=metadata)
    reseal(bundle)


# What is loaded is what was certified.


def test_scaled_weights_do_not_pass_for_the_old_ones(bundle_copy: Path) -> None:
    certify(open_engine(bundle_copy, "onnx"))
    scale_weights(bundle_copy, 1.3)
    with pytest.raises(BundleError, match="its fingerprint is not that of its weights and settings"):
        open_engine(bundle_copy, "onnx")


def test_scaled_weights_with_a_fingerprint_of_their_own_need_a_certificate(bundle_copy: Path) -> None:
    old = certify(open_engine(bundle_copy, "onnx"))
    scale_weights(bundle_copy, 1.3)
    actual = open_bundle(bundle_copy)._actual_fingerprint()
    alter(bundle_copy, lambda values: values.update(fingerprint=actual))
    engine = open_engine(bundle_copy, "onnx")
    for stored in (bundle_copy / FOLDER).iterdir():  # not even one that was edited to name the new fingerprint
        stored.write_text(stored.read_text().replace(old.fingerprint, actual))
    with pytest.raises(EngineError, match="deviates from torch"):
        certify(engine).require()


def test_settings_belong_to_the_fingerprint(bundle_copy: Path) -> None:
    alter(bundle_copy, lambda values: values["preprocessing"].update(mean=[0.1, 0.2, 0.3]))
    with pytest.raises(BundleError, match="its fingerprint is not"):
        open_bundle(bundle_copy).verify()


def test_another_graph_needs_another_certificate(bundle_copy: Path) -> None:
    onnx = pytest.importorskip("onnx")
    before = certify(open_engine(bundle_copy, "onnx"))
    model = onnx.load(bundle_copy / "encoder.onnx", load_external_data=False)
    model.doc_string = "another graph"
    onnx.save(model, bundle_copy / "encoder.onnx")
    reseal(bundle_copy)
    engine = open_engine(bundle_copy, "onnx")
    assert engine.bundle.fingerprint == before.fingerprint
    assert certify(engine).content != before.content


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b'\x08\0\0\0\0\0\0\0{"a": 1', bytes(8) + b"{}"])
def test_damaged_weights_with_a_right_checksum(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / WEIGHTS).write_bytes(content)
    reseal(bundle_copy)
    with pytest.raises(BundleError, match="its fingerprint is not"):
        open_engine(bundle_copy, "onnx")


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN, "encoder.onnx", "reconstruct.onnx"])
def test_every_file_that_is_loaded_has_a_checksum(bundle_copy: Path, name: str) -> None:
    alter(bundle_copy, lambda values: values["sha256"].pop(name))
    with pytest.raises(BundleError, match=rf"is damaged \(no sha256 of {name}\)"):
        open_bundle(bundle_copy)


# Names and links.


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["graphs"].update({"../x/encoder": values["graphs"]["encoder"]}),
        lambda values: values["graphs"].update({"/x/encoder": ["embedding"]}),
        lambda values: values["graphs"].update({"": ["embedding"]}),
        lambda values: values["graphs"].update({"a\0b": ["embedding"]}),
        lambda values: values["graphs"].update({"x" * 300: ["embedding"]}),
        lambda values: values["sha256"].update({"../x": "0"}),
        lambda values: values["sha256"].update({"": "0"}),
        lambda values: values["sha256"].update({"a\\b": "0"}),
        lambda values: values.update(precisions=["fp32", "../fp16"]),
        lambda values: values.update(precisions=["fp32", "x/../../fp16"]),
        lambda values: values.update(
            built=[
                {"file": "../engine", "graph": "encoder", "precision": "fp16", "runtime": "tensorrt", "version": "1",
                 "hardware": "sm90", "batches": [1, 2, 3]}
            ]
        ),
    ],
)  # fmt: skip
def test_names_stay_in_the_folder(bundle_copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    outside = bundle_copy.parent / "x"
    outside.mkdir()
    shutil.copy(bundle_copy / "encoder.onnx", outside / "encoder.onnx")
    alter(bundle_copy, change)
    with pytest.raises(BundleError, match=r"config\.json is damaged \(.*\): export the bundle again") as caught:
        open_bundle(bundle_copy)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["README.md", "config.json", WEIGHTS, "encoder.onnx"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_are_neither_pulled_nor_pushed(bundle_copy: Path, tmp_path: Path, name: str, relative: bool) -> None:
    (bundle_copy / "README.md").write_text("a card")
    (bundle_copy / name).rename(tmp_path / name)
    (bundle_copy / name).symlink_to(Path("..") / name if relative else tmp_path / name)
    with pytest.raises(BundleError, match=r"nothing was pulled.*is a symbolic link"):
        pull(str(bundle_copy), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    if name != "README.md":  # which is written anew
        with pytest.raises(BundleError, match="is a symbolic link"):
            push(bundle_copy, str(tmp_path / "pushed"))
        assert not (tmp_path / "pushed").exists()


def test_a_dangling_link_and_a_pipe_are_no_card(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "README.md").symlink_to("nowhere")
    with pytest.raises(BundleError, match="symbolic link"):
        pull(str(bundle_copy), tmp_path / "pulled")
    (bundle_copy / "README.md").unlink()
    os.mkfifo(bundle_copy / "README.md")
    with pytest.raises(BundleError, match="it is not a regular file"):
        pull(str(bundle_copy), tmp_path / "pulled")


def test_a_config_that_is_a_pipe_or_device(bundle_copy: Path) -> None:
    for make in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")):
        (bundle_copy / "config.json").unlink()
        make(bundle_copy / "config.json")
        with pytest.raises(BundleError):
            open_bundle(bundle_copy)


# JSON.


@pytest.mark.parametrize("text", DEEP)
def test_nested_json_is_one_sentence(bundle_copy: Path, tmp_path: Path, text: str) -> None:
    (bundle_copy / "config.json").write_text(text)
    with pytest.raises(BundleError, match=r"config\.json is damaged \(it is nested more than 64 levels deep\)"):
        open_bundle(bundle_copy)
    save_file({"a": np.zeros(1)}, tmp_path / "a.safetensors", metadata={METADATA_KEY: text})
    with pytest.raises(CheckpointError, match="has a damaged description: it is nested"):
        read_description(tmp_path / "a.safetensors")
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(OutputError, match="is damaged or not a manifest"):
        read_manifest(Folder(tmp_path))


def test_a_nested_certificate_is_measured_again(bundle_copy: Path) -> None:
    engine = open_engine(bundle_copy, "onnx")
    certify(engine)
    for stored in (bundle_copy / FOLDER).iterdir():
        stored.write_text(DEEP[0])
    assert certify(engine).holds


def test_a_nested_config_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")

    from mixmim_serve.errors import ConfigError
    from training.config import PretrainConfig
    from training.run_folder import RunFolder

    (tmp_path / "config.json").write_text(DEEP[0])
    with pytest.raises(ConfigError, match=r"config\.json is damaged \(it is nested"):
        RunFolder(tmp_path).check(PretrainConfig(), {})


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, True),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), False),
        (json.dumps(["[" * 1000, "{" * 1000, '"' + "[" * 100, "\\" * 3 + '"[' * 100]), True),
        (json.dumps([[]] * 1000), True),
    ],
)
def test_depth_counts_brackets_outside_of_strings(text: str, fine: bool) -> None:
    if fine:
        assert parse_json(text) == json.loads(text)
    else:
        with pytest.raises(ValueError, match="nested more than 64 levels"):
            parse_json(text)


@pytest.mark.parametrize("text", ['"' + '\\"' * 1_000_000 + "[" * 100, '"[' * 1_000_000, "[]" * 1_000_000])
def test_depth_is_counted_in_linear_time(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    assert time.process_time() - began < 3


def test_large_json_is_refused_unread(bundle_copy: Path) -> None:
    with (bundle_copy / "config.json").open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(BundleError, match=r"config\.json is damaged \(it has more than 16,000,000 bytes\)"):
        open_bundle(bundle_copy)
