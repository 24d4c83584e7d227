"""Every family through everything: pretraining, going on, fine-tuning, probe, export, engines, service, extraction."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import assert_engines_are_whole, write_checkpoint
from rich.console import Console
from safetensors.numpy import load_file
from training_data import SMALL, run_pretraining
from typer.testing import CliRunner

from export.build import Options, export_bundle
from export.onnx import build_graphs
from export.rewrite import rewrite_for_export
from export.tensorrt import EngineOptions
from mixmim_serve.bundle import Bundle
from mixmim_serve.cli import app
from mixmim_serve.config import Architecture, DecoderConfig, architecture
from mixmim_serve.engines import open_engine
from mixmim_serve.engines.certificate import TOLERANCES
from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.model import MixMIM
from mixmim_serve.model.checkpoint import load_checkpoint, read_checkpoint
from mixmim_serve.sources import open_source
from training.config import FinetuneConfig
from training.evaluation.labelled import open_labelled
from training.finetuning import Finetuning
from training.pretraining import Pretraining
from training.recipes import tiny_finetune_cpu
from training.start import Start, read_start
from training.trainer import train

DECODER = DecoderConfig(16, 1, 2)
SWIN = Architecture(8, (2, 2, 3, 1), (1, 1, 2, 2), 64, (4, 4, 4, 4), decoder=DECODER, family="swin")
PADDED = dataclasses.replace(SWIN, image_size=96, windows=(5, 5, 5, 5))
PVT = Architecture(8, (1, 1, 2, 1), (1, 2, 5, 8), 64, decoder=DECODER, family="pvt")
FAMILIES = {"swin": SWIN, "pvt": PVT}
CLASSIFIER = dataclasses.replace(PVT, decoder=None, class_token=True, num_classes=3)
OWN = dataclasses.replace(SMALL, size="", image_size=0, epochs=1, warmup_epochs=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    archs = FAMILIES | {"padded": PADDED, "classifier": CLASSIFIER}
    return {name: write_checkpoint(folder / f"{name}.safetensors", arch) for name, arch in archs.items()}


def mixmim(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


# Training


@pytest.mark.parametrize("size", ["swin-mini", "pvt-mini"])
def test_pretraining_from_scratch_learns(photos: Path, tmp_path: Path, size: str) -> None:
    run = run_pretraining(dataclasses.replace(SMALL, size=size), photos, tmp_path / "run")
    description, _ = read_checkpoint(run.final)
    assert description.arch == architecture(size).at(64)
    assert json.loads(json.dumps(description.to_dict()))["architecture"]["family"] == size.partition("-")[0]
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_at_another_size_and_with_other_windows(
    family: str, checkpoints: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    start = read_start(checkpoints[family])
    windows = {"swin": (3,), "pvt": ()}[family]
    task = Pretraining(dataclasses.replace(OWN, image_size=96, windows=windows), None, start=start)
    assert task.arch == FAMILIES[family].at(96, windows * 4)
    assert task.loaded.endswith("encoder and decoder, resized from 64 to 96 px")
    source = open_source(photos)
    final = train(Pretraining(OWN, source, start=start), source, tmp_path / "run", Console(file=io.StringIO()))
    assert final is not None
    description, weights = read_checkpoint(final)
    assert description.arch == FAMILIES[family]
    assert description.provenance["origin"]["taken"] == "encoder and decoder"
    name = "layers.1.blocks.0.mlp.fc1.weight"
    assert 0 < (weights[name] - start.weights[name]).norm() < 0.5 * start.weights[name].norm()


def test_a_class_token_is_left_out_of_pretraining(checkpoints: dict[str, Path]) -> None:
    """A supervised PVT: its encoder without the token, and a new decoder."""
    start = read_start(checkpoints["classifier"])
    task = Pretraining(OWN, None, start=start)
    assert not task.arch.class_token
    assert not any("cls_token" in name for name in task.model.state_dict())
    assert "encoder, with a new decoder, without its class token" in task.loaded
    assert "class_token" in task.origin
    for name, tensor in task.model.state_dict().items():
        if name.startswith("layers."):
            assert torch.equal(tensor, start.weights[name]), name


@pytest.mark.parametrize("name", [*FAMILIES, "classifier"])
def test_fine_tuning_and_layer_decay(name: str, checkpoints: dict[str, Path], labelled: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny_finetune_cpu().with_epochs(1), batch_size=8, workers=0, bf16=False, compile=False, log_every=1
    )
    images, val = open_labelled(str(labelled))
    start = read_start(checkpoints[name])
    task = Finetuning(config, images.classes, start, val)
    assert task.arch.class_token == start.description.arch.class_token
    scales = {group["lr_scale"] for group in task.parameter_groups()}
    assert len(scales) == sum(start.description.arch.depths) + 1
    final = train(task, images.source, tmp_path / "run", Console(file=io.StringIO()))
    assert final is not None
    description = read_checkpoint(final)[0]
    assert (description.arch.family, description.labels) == (start.description.arch.family, ("blue", "red"))


def test_positions_and_class_token_learn_with_their_stages_first_block() -> None:
    from training.optim import layer_scale

    depths = (2, 2, 2, 2)
    for rule in ("official", "mae", "mmpretrain"):
        for name in ("layers.3.pos_embed", "layers.3.cls_token"):
            first = layer_scale("layers.3.blocks.0.attn.q.weight", depths, 0.7, rule)
            assert layer_scale(name, depths, 0.7, rule) == first


@pytest.mark.parametrize("name", [*FAMILIES, "classifier"])
def test_probe_saves_a_classifier(name: str, checkpoints: dict[str, Path], labelled: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    report = json.loads(mixmim("probe", labelled, "--from", checkpoints[name], "--save", head, "--json"))
    assert report["linear"]["top1"] >= 50
    model, description = load_checkpoint(head)
    assert description.arch.family == FAMILIES.get(name, PVT).family
    assert model(torch.zeros(1, 3, 64, 64)).logits_BC.shape == (1, 2)


# Export


@pytest.mark.parametrize("name", [*FAMILIES, "padded", "classifier"])
def test_a_rewritten_model_computes_the_same(name: str, checkpoints: dict[str, Path]) -> None:
    """In float64: one Gather instead of rolls and cuts, windows as heads, three products instead of one or two."""
    model = load_checkpoint(checkpoints[name])[0].double()
    rewritten = copy.deepcopy(model)
    rewrite_for_export(rewritten, written_out=True)
    size = model.arch.image_size
    a, b = torch.randn(2, 2, 3, size, size, dtype=torch.float64)
    with torch.inference_mode():
        expected, actual = model(a), rewritten(a)
        pairs = [*zip(actual.stages_BDHW, expected.stages_BDHW, strict=True)]
        pairs.append((actual.embedding_BD, expected.embedding_BD))
        if isinstance(model, MixMIM) and isinstance(rewritten, MixMIM):
            masks = torch.rand(2, model.arch.units) < 0.5
            one, other = model.reconstruct(a, b, masks), rewritten.reconstruct(a, b, masks)
            pairs += [(other.image_a, one.image_a), (other.image_b, one.image_b)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)  # normalising pixels is not double throughout


def test_a_class_token_gives_no_reconstruction(checkpoints: dict[str, Path]) -> None:
    model, description = load_checkpoint(checkpoints["classifier"])
    assert build_graphs(model, description.preprocessing).keys() == {"encoder"}


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Of every kind, verified in ONNX Runtime and OpenVINO by the export itself."""
    folder = tmp_path_factory.mktemp("bundles")
    built = {}
    for name, checkpoint in checkpoints.items():
        precisions = ("fp32", "fp16", "bf16") if name in FAMILIES else ("fp32",)  # a minute each
        exported = export_bundle(checkpoint, folder / name, Options(precisions, ("onnx", "openvino")))
        assert exported.agreement.keys() == {*precisions, "fp32, OpenVINO"}
        for outputs in (exported.agreement["fp32"], exported.agreement["fp32, OpenVINO"]):
            assert all(each.within(TOLERANCES["fp32"]) for each in outputs.values())
        built[name] = exported.bundle
    return built


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "padded", "classifier"])
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_engines_equal_torch_for_any_batch(bundles: dict[str, Bundle], name: str, kind: str) -> None:
    bundle = bundles[name]
    engine, reference = open_engine(bundle, kind, "fp32"), open_engine(bundle, "torch", "fp32")
    rng = np.random.default_rng(0)
    size, units = bundle.arch.image_size, bundle.arch.units
    for batch in (1, 3):
        images = {key: rng.integers(0, 256, (batch, size, size, 3), np.uint8) for key in ("image_a", "image_b")}
        inputs = {"encoder": {"pixels": images["image_a"]}}
        if "reconstruct" in bundle.graphs:
            masks = rng.random((batch, units)).argsort(axis=1) < units // 2
            inputs["reconstruct"] = images | {"from_partner": masks}
        for graph, arrays in inputs.items():
            expected = reference.run(graph, arrays, bundle.graphs[graph])
            for key, array in engine.run(graph, arrays, bundle.graphs[graph]).items():
                np.testing.assert_allclose(array, expected[key], atol=2e-4, rtol=0, err_msg=f"{graph}.{key}")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_stored_once_and_graphs_are_small(bundles: dict[str, Bundle], name: str) -> None:
    import onnx

    bundle = bundles[name]
    stored = sum(array.nbytes for array in load_file(bundle.path / "weights.safetensors").values())
    for graph in bundle.graphs:
        model = onnx.load(bundle.graph_path(graph), load_external_data=False)
        inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(tensor.ByteSize() for tensor in inline) < stored / 10
        assert all(tensor.ByteSize() <= 8192 for tensor in inline)  # places to gather from, never weights


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_service_and_extraction_take_any_family(bundles: dict[str, Bundle], name: str, tmp_path: Path) -> None:
    from serving import HAT, SHOES, client_of

    engine = open_engine(bundles[name], "onnx", "fp32", threads=1)
    with client_of(engine) as client:
        vector = client.post("/embed", files={"image": ("a.jpg", HAT)}).json()["embedding"]
        assert len(vector) == bundles[name].arch.embedding_size
        panel = client.post("/reconstruct", files=[("image", ("a.jpg", HAT)), ("image", ("b.jpg", SHOES))])
        assert panel.status_code == 200
        assert client.post("/score", files={"image": ("a.jpg", HAT)}).json()["score"] > 0
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "hat.jpg").write_bytes(HAT)
    said = mixmim("extract", bundles[name].path, tmp_path / "images", tmp_path / "features", "--engine", "onnx")
    assert "1 rows for 1 images" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_tensorrt_rtx_builds_both_graphs(checkpoints: dict[str, Path], name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = EngineOptions("tensorrt-rtx", (1, 2, 4), ("8.9",))
    options = Options(("fp16",), ("onnx", "tensorrt-rtx"), engine=engine)
    bundle = export_bundle(checkpoints[name], tmp_path / "bundle", options).bundle
    assert {each.graph for each in bundle.built} == {"encoder", "reconstruct"}
    assert_engines_are_whole(bundle, "sm89", (1, 2, 4))


# Bad input


def test_a_checkpoint_of_another_family_is_refused(checkpoints: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = ("pretrain", photos, "--from", checkpoints["swin"], "--out", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"swin.safetensors is a swin network of size custom, not base: omit size"):
        mixmim(*run, "--size", "base")
    with pytest.raises(ConfigError, match=r"swin.safetensors has size custom, not swin-tiny: omit size"):
        mixmim(*run, "--size", "swin-tiny")
    with pytest.raises(ConfigError, match=r"unknown size 'swim-tiny': choose one of .* Did you mean swin-tiny"):
        mixmim(*run, "--size", "swim-tiny")
    with pytest.raises(ConfigError, match="is a pvt network of size custom, not swin-mini"):
        Finetuning(FinetuneConfig(size="swin-mini"), ("a", "b"), read_start(checkpoints["pvt"]), None)
    assert not (tmp_path / "run").exists()


def test_windows_that_do_not_fit_are_refused(checkpoints: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = ("pretrain", photos, "--out", tmp_path / "run", "--set")
    with pytest.raises(ConfigError, match="a window of 60 tokens is larger than the 16 x 16 tokens"):
        mixmim(*run, "windows=60", "--from", checkpoints["swin"])
    with pytest.raises(ConfigError, match="a PVT attends to the whole image and has no windows"):
        mixmim(*run, "windows=7", "--from", checkpoints["pvt"])
    with pytest.raises(ConfigError, match="a window of 7 does not divide its grid of 32 tokens"):
        mixmim(*run, "windows=7", "--from", "tiny")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_family_are_refused(checkpoints: dict[str, Path]) -> None:
    swin, pvt = (read_start(checkpoints[name]) for name in ("swin", "pvt"))
    with pytest.raises(CheckpointError, match=r"lacks weights: layers.0.blocks.0.attn.kv.bias"):
        Start(swin.path, pvt.description, swin.weights).model()
    token = read_start(checkpoints["classifier"]).weights
    described = dataclasses.replace(pvt.description, arch=dataclasses.replace(CLASSIFIER, class_token=False))
    with pytest.raises(CheckpointError, match=r"has unknown weights: layers.3.cls_token\. Is it a checkpoint of this"):
        Start(pvt.path, described, token).model()


def test_info_says_the_family(checkpoints: dict[str, Path]) -> None:
    facts = json.loads(mixmim("info", checkpoints["pvt"]))
    assert facts["architecture"]["family"] == "pvt"
    assert facts["architecture"]["windows"] == []
