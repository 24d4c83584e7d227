"""Export: the bundle's files, its graphs against torch, weights stored once, and rejected inputs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import REPOSITORY
from exporting import ENCODER_ONLY, WITH_DECODER, graphs_from, write_checkpoint
from numpy.typing import NDArray
from safetensors.numpy import load_file

import export.verify
from export.build import GOLDEN_ROWS, Exported, Options, export_bundle, seal
from export.onnx import build_graphs
from export.verify import photos
from mixmim_serve.bundle import FORMAT, STAGE_OUTPUTS, Bundle, open_bundle
from mixmim_serve.config import Preprocessing, architecture
from mixmim_serve.description import Description
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.engines.base import Arrays, graph_inputs
from mixmim_serve.engines.certificate import TOLERANCES
from mixmim_serve.engines.onnx import OnnxEngine
from mixmim_serve.errors import BundleError, CheckpointError
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from mixmim_serve.model.normalize import Normalize
from mixmim_serve.preprocess import normalize, preprocess

FILES = {"config.json", "weights.safetensors", "encoder.onnx", "reconstruct.onnx", "golden.safetensors"}
ENCODER_OUTPUTS = ("embedding", *STAGE_OUTPUTS)
RECONSTRUCT_OUTPUTS = ("mixed", "reconstruction_a", "reconstruction_b")
INLINE_LIMIT = 4096  # bytes of a tensor that a graph may contain: indices and shapes, never weights
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.jpg"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """A checkpoint, and its bundle with fp16 weights. What needs it is slow: its graphs take ten seconds."""
    folder = tmp_path_factory.mktemp("half")
    checkpoint = write_checkpoint(folder / "checkpoint.safetensors", WITH_DECODER)
    return checkpoint, export_bundle(checkpoint, folder / "bundle", Options(half_weights=True))


@pytest.fixture(scope="module")
def encoder_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """A checkpoint without decoder and head, and its bundle; read-only."""
    folder = tmp_path_factory.mktemp("encoder")
    checkpoint = write_checkpoint(folder / "checkpoint.safetensors", ENCODER_ONLY)
    return checkpoint, export_bundle(checkpoint, folder / "bundle")


@pytest.fixture(scope="module")
def engines(exported_bundle: Path) -> tuple[Engine, Engine]:
    """The exported bundle in ONNX Runtime and in torch."""
    return open_engine(exported_bundle, "onnx"), open_engine(exported_bundle, "torch")


@pytest.fixture
def reuse_graph(encoder_only: tuple[Path, Exported]) -> Iterator[None]:
    """Makes `export_bundle` take the graph of `encoder_only`."""
    with graphs_from(encoder_only[1].bundle.path):
        yield


def random_inputs(bundle: Bundle, graph: str, batch: int) -> Arrays:
    """Noise, with one mask per image."""
    rng = np.random.default_rng(batch)
    inputs: Arrays = {}
    for name, shape in graph_inputs(bundle, graph).items():
        if name == "from_partner":
            inputs[name] = rng.random((batch, *shape)).argsort(axis=1) < shape[0] // 2
        else:
            inputs[name] = rng.integers(0, 256, (batch, *shape), np.uint8)
    return inputs


def real_inputs(bundle: Bundle, graph: str, batch: int) -> Arrays:
    """Preprocessed photos; image b is the photo after image a."""
    pixels = [preprocess(path.read_bytes(), bundle.description.preprocessing) for path in EXAMPLES[: batch + 1]]
    if graph == "encoder":
        return {"pixels": np.stack(pixels[:batch])}
    masks = random_inputs(bundle, graph, batch)["from_partner"]
    return {"image_a": np.stack(pixels[:batch]), "image_b": np.stack(pixels[1 : batch + 1]), "from_partner": masks}


def assert_same(actual: Arrays, expected: Arrays, tolerance: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_allclose(actual[name], array, atol=tolerance, rtol=0, err_msg=name)


def load_graph(bundle: Path, name: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"{name}.onnx", load_external_data=False)


def test_a_bundle_has_the_documented_files(exported_bundle: Path) -> None:
    assert {path.name for path in exported_bundle.iterdir()} - {"certificates"} == FILES
    assert [path.name for path in exported_bundle.parent.iterdir()] == [exported_bundle.name]
    bundle = open_bundle(exported_bundle)
    assert bundle.graphs == {"encoder": (*ENCODER_OUTPUTS, "logits"), "reconstruct": RECONSTRUCT_OUTPUTS}
    assert (bundle.weights, bundle.precisions, bundle.built) == ("float32", ("fp32",), ())
    assert bundle.checksums.keys() == FILES - {"config.json"}
    assert bundle.versions.keys() == {"mixmim-serve", "torch", "onnx", "onnxscript", "onnxruntime"}
    assert len(bundle.fingerprint) == 32


def test_a_bundle_describes_its_checkpoint(exported_bundle: Path, small_checkpoint: Path) -> None:
    description, weights = read_checkpoint(small_checkpoint)
    in_bundle, stored = read_checkpoint(exported_bundle / "weights.safetensors")
    assert open_bundle(exported_bundle).description == description == in_bundle
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("inputs_of", [random_inputs, real_inputs])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("graph", ["encoder", "reconstruct"])
def test_onnx_equals_torch(
    engines: tuple[Engine, Engine], graph: str, batch: int, inputs_of: Callable[[Bundle, str, int], Arrays]
) -> None:
    onnx_engine, torch_engine = engines
    outputs = onnx_engine.bundle.graphs[graph]
    inputs = inputs_of(onnx_engine.bundle, graph, batch)
    results = onnx_engine.run(graph, inputs, outputs)
    assert {len(array) for array in results.values()} == {batch}
    assert_same(results, torch_engine.run(graph, inputs, outputs))


@pytest.mark.parametrize("graph", ["encoder", "reconstruct"])
def test_an_item_does_not_depend_on_its_batch(engines: tuple[Engine, Engine], graph: str) -> None:
    engine = engines[0]
    outputs = engine.bundle.graphs[graph]
    inputs = random_inputs(engine.bundle, graph, 5)
    if graph == "reconstruct":
        assert len(np.unique(inputs["from_partner"], axis=0)) > 1
    together = engine.run(graph, inputs, outputs)
    for item in range(5):
        alone = engine.run(graph, {name: array[item : item + 1] for name, array in inputs.items()}, outputs)
        assert_same(alone, {name: array[item : item + 1] for name, array in together.items()}, 1e-5)


def test_mixed_shows_image_b_where_the_mask_says(engines: tuple[Engine, Engine]) -> None:
    inputs = random_inputs(engines[0].bundle, "reconstruct", 2)
    inputs["from_partner"] = np.array([[True, False, False, False], [False, False, True, True]])
    results = engines[0].run("reconstruct", inputs, RECONSTRUCT_OUTPUTS)
    preprocessing = engines[0].bundle.description.preprocessing
    a, b = (np.stack([normalize(image, preprocessing) for image in inputs[name]]) for name in ("image_a", "image_b"))
    mixed = results["mixed"]
    np.testing.assert_array_equal(mixed[0, :, :32, :32], b[0, :, :32, :32])
    np.testing.assert_array_equal(mixed[0, :, 32:], a[0, :, 32:])
    np.testing.assert_array_equal(mixed[1, :, :32], a[1, :, :32])
    np.testing.assert_array_equal(mixed[1, :, 32:], b[1, :, 32:])
    np.testing.assert_array_equal(results["reconstruction_a"][1, :, :32], a[1, :, :32])
    np.testing.assert_array_equal(results["reconstruction_b"][1, :, 32:], b[1, :, 32:])


@pytest.mark.parametrize("name", ["encoder", "reconstruct"])
def test_graphs_have_a_dynamic_batch(exported_bundle: Path, name: str) -> None:
    model = load_graph(exported_bundle, name)
    bundle = open_bundle(exported_bundle)
    assert [domain.version for domain in model.opset_import if not domain.domain] == [23]
    assert [domain.domain for domain in model.opset_import] == [""]  # no custom or vendor operators
    assert tuple(value.name for value in model.graph.output) == bundle.graphs[name]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    batches = {shape[0] for shape in shapes.values()}
    assert len(batches) == 1
    assert isinstance(batches.pop(), str)
    for value, shape in graph_inputs(bundle, name).items():
        assert tuple(shapes[value][1:]) == shape
    assert all(isinstance(dim, int) for shape in shapes.values() for dim in shape[1:])


def external_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    return {tensor.name: tensor for tensor in tensors}


def in_graph(weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Stored weights under their names in a graph; queries, keys and values are thirds of one matrix."""
    named = {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"(.*\.attn\.)qkv(\.\w+)", name):
            named |= {
                f"model.{match[1]}{part}{match[2]}": third
                for part, third in zip("qkv", np.split(weight, 3), strict=True)
            }
        else:
            named["model." + name.replace(".relative_position", ".position.relative_position")] = weight
    return named


def assert_points_at_weights(bundle: Path, tensor: onnx.TensorProto, weights: Mapping[str, NDArray[Any]]) -> None:
    where = {entry.key: entry.value for entry in tensor.external_data}
    weight = weights[tensor.name]
    assert where["location"] == "weights.safetensors"
    assert tuple(tensor.dims) == weight.shape
    assert onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) == weight.dtype
    begin, length = int(where["offset"]), int(where["length"])
    assert (bundle / "weights.safetensors").read_bytes()[begin : begin + length] == weight.tobytes(), tensor.name


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.slow
def test_weights_are_stored_once(exported_bundle: Path, half: tuple[Path, Exported], precision: str) -> None:
    bundle = exported_bundle if precision == "float32" else half[1].bundle.path
    weights = in_graph(load_file(bundle / "weights.safetensors"))
    external_names = set()
    for name in ("encoder", "reconstruct"):
        model = load_graph(bundle, name)
        external = external_tensors(model)
        external_names |= external.keys()
        for tensor in external.values():
            assert tensor.ByteSize() < 1000  # a reference without values
            assert_points_at_weights(bundle, tensor, weights)
        inline = [tensor for tensor in model.graph.initializer if tensor.name not in external]
        inline += [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
        assert all(tensor.ByteSize() <= INLINE_LIMIT for tensor in inline)
        assert not model.functions
    # The optimiser merges a new network's biases and norms, all zeros and ones: compare values.
    stored = {name: weight.tobytes() for name, weight in weights.items() if weight.any()}
    assert {weights[name].tobytes() for name in external_names if weights[name].any()} == set(stored.values())
    if precision == "float16":  # no two tensors of this network are equal
        assert external_names == weights.keys()
    assert {str(weight.dtype) for weight in weights.values()} == {precision}


def test_nothing_of_this_machine_is_in_the_bundle(
    exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    temporary = tmp_path_factory.getbasetemp().parent  # above the folders of all processes of the suite
    for path in (file for file in exported_bundle.iterdir() if file.is_file()):
        content = path.read_bytes()
        for text in (str(REPOSITORY), str(temporary), "site-packages", ".py"):
            assert text.encode() not in content, f"{text} in {path.name}"


@pytest.mark.slow
def test_half_weights_halve_the_file(half: tuple[Path, Exported]) -> None:
    checkpoint, exported = half
    bundle = exported.bundle
    assert 0.48 < (bundle.path / "weights.safetensors").stat().st_size / checkpoint.stat().st_size < 0.55
    assert (bundle.weights, bundle.precisions) == ("float16", ("fp32",))
    assert max(agreement.error for agreement in exported.agreement["fp32"].values()) <= TOLERANCES["fp32"].error
    original = read_checkpoint(checkpoint)[1]
    stored = read_checkpoint(bundle.path / "weights.safetensors")[1]
    assert all(torch.equal(stored[name], weight.half()) for name, weight in original.items())


@pytest.mark.parametrize("graph", ["encoder", "reconstruct"])
@pytest.mark.slow
def test_half_weights_compute_what_torch_does_with_them(half: tuple[Path, Exported], graph: str) -> None:
    checkpoint, exported = half
    bundle = exported.bundle
    inputs = random_inputs(bundle, graph, 5)
    results = open_engine(bundle, "onnx").run(graph, inputs, bundle.graphs[graph])
    assert_same(results, open_engine(bundle, "torch").run(graph, inputs, bundle.graphs[graph]))
    if graph == "encoder":  # rounding changes a little, but something
        with torch.inference_mode():
            pixels = Normalize(bundle.description.preprocessing)(torch.from_numpy(inputs["pixels"]))
            exact = load_checkpoint(checkpoint)[0](pixels).embedding_BD.numpy()
        assert 1e-5 < np.abs(results["embedding"] - exact).max() < 0.05


def test_an_encoder_gives_a_bundle_without_reconstruction(encoder_only: tuple[Path, Exported]) -> None:
    bundle = encoder_only[1].bundle
    assert {path.name for path in bundle.path.iterdir()} == FILES - {"reconstruct.onnx"}
    assert bundle == open_bundle(bundle.path)
    assert bundle.graphs == {"encoder": ENCODER_OUTPUTS}
    assert encoder_only[1].agreement["fp32"].keys() == {f"encoder.{name}" for name in ENCODER_OUTPUTS}
    inputs = random_inputs(bundle, "encoder", 3)
    engine = open_engine(bundle, "onnx")
    assert_same(
        engine.run("encoder", inputs, ENCODER_OUTPUTS),
        open_engine(bundle, "torch").run("encoder", inputs, ENCODER_OUTPUTS),
    )
    with pytest.raises(BundleError, match="has no reconstruct graph; it has encoder"):
        engine.run("reconstruct", inputs, ["mixed"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [160, 384])
def test_other_sizes_agree_in_onnx_runtime_and_openvino(tmp_path: Path, size: int) -> None:
    arch = dataclasses.replace(ENCODER_ONLY, image_size=size, windows=())
    checkpoint = write_checkpoint(tmp_path / "checkpoint.safetensors", arch)
    exported = export_bundle(checkpoint, tmp_path / "bundle", Options(targets=("onnx", "openvino")))
    assert exported.bundle.arch.grids[0] == size // 4
    assert exported.agreement.keys() == {"fp32", "fp32, OpenVINO"}
    for outputs in exported.agreement.values():
        assert outputs.keys() == {f"encoder.{name}" for name in ENCODER_OUTPUTS}
        assert all(agreement.within(TOLERANCES["fp32"]) for agreement in outputs.values())


def test_a_single_unit_cannot_be_reconstructed() -> None:
    assert build_graphs(build_model(WITH_DECODER), Preprocessing.evaluation(64)).keys() == {"encoder", "reconstruct"}
    assert build_graphs(build_model(WITH_DECODER.at(32)), Preprocessing.evaluation(32)).keys() == {"encoder"}


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_golden_arrays_are_what_an_engine_gives(exported_bundle: Path, kind: str) -> None:
    bundle = open_bundle(exported_bundle)
    golden = load_file(exported_bundle / "golden.safetensors")
    engine = open_engine(bundle, kind)
    names = set()
    for graph, outputs in bundle.graphs.items():
        inputs = {name: golden[f"{graph}.{name}"] for name in graph_inputs(bundle, graph)}
        assert_same(engine.run(graph, inputs, outputs), {name: golden[f"{graph}.{name}"] for name in outputs})
        names |= {f"{graph}.{name}" for name in (*inputs, *outputs)}
        assert {len(array) for array in inputs.values()} == {GOLDEN_ROWS[graph]}
    assert golden.keys() == names
    pixels = photos(bundle.description.preprocessing)
    np.testing.assert_array_equal(golden["encoder.pixels"], pixels[:2])
    assert 0 < golden["reconstruct.from_partner"].sum() < bundle.arch.units


def sealed(folder: Path, weights: Mapping[str, torch.Tensor], description: Description, half_weights: bool) -> str:
    """The fingerprint of a bundle, without exporting its graphs."""
    folder.mkdir()
    dtype = torch.float16 if half_weights else torch.float32
    save_checkpoint(folder / "weights.safetensors", weights, description, dtype)
    graphs = build_graphs(build_model(description.arch), description.preprocessing)
    return seal(folder, description, graphs, Options(half_weights=half_weights)).fingerprint


@pytest.mark.slow
def test_the_fingerprint_is_of_all_that_changes_the_numbers(
    exported_bundle: Path, small_checkpoint: Path, half: tuple[Path, Exported], tmp_path: Path
) -> None:
    description, weights = read_checkpoint(small_checkpoint)
    one_bit = weights["norm.bias"].clone()
    one_bit[0] += 1e-6
    other_arch = dataclasses.replace(description.arch, windows=(16, 8, 2, 1))
    other_pixels = dataclasses.replace(description.preprocessing, mean=(0.5, 0.5, 0.5))
    fingerprints = [
        sealed(tmp_path / "same", weights, description, False),
        sealed(tmp_path / "weight", weights | {"norm.bias": one_bit}, description, False),
        sealed(tmp_path / "mean", weights, dataclasses.replace(description, preprocessing=other_pixels), False),
        sealed(tmp_path / "windows", weights, dataclasses.replace(description, arch=other_arch), False),
        sealed(tmp_path / "precision", weights, description, True),
    ]
    assert fingerprints[0] == open_bundle(exported_bundle).fingerprint
    assert len(set(fingerprints)) == len(fingerprints)
    renamed = dataclasses.replace(description, labels=("a", "b", "c"), provenance={"made_by": "someone else"})
    assert sealed(tmp_path / "labels", weights, renamed, False) == fingerprints[0]
    half_description, half_weights = read_checkpoint(half[0])
    assert sealed(tmp_path / "half", half_weights, half_description, True) == half[1].bundle.fingerprint


@pytest.mark.slow
def test_exporting_again_gives_the_same_bundle(encoder_only: tuple[Path, Exported], tmp_path: Path) -> None:
    checkpoint, first = encoder_only
    again = export_bundle(checkpoint, tmp_path / "again").bundle
    assert again.fingerprint == first.bundle.fingerprint
    assert again.description == first.bundle.description
    one, two = (read_checkpoint(bundle.path / "weights.safetensors")[1] for bundle in (again, first.bundle))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)


class Wrong:
    """An engine whose last output has an error."""

    def __init__(self, engine: Engine, error: float) -> None:
        self.bundle, self.name, self.engine, self.error = engine.bundle, engine.name, engine, error
        self.precision, self.max_batch = engine.precision, engine.max_batch

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        results = self.engine.run(graph, inputs, outputs)
        last = self.bundle.graphs[graph][-1]
        if last in results:
            results[last][-1].flat[-1] += self.error  # one value of one image
        return results


@pytest.mark.usefixtures("reuse_graph")
@pytest.mark.parametrize("error", [1e-3, -1e-3, float("nan"), float("inf")])
def test_an_export_that_disagrees_is_refused(
    encoder_only: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    monkeypatch.setattr(export.verify, "OnnxEngine", lambda *arguments: Wrong(OnnxEngine(*arguments), error))
    with pytest.raises(BundleError, match=r"onnx-cpu differs from torch by .* in encoder.stage4 .*was not written"):
        export_bundle(encoder_only[0], tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_tampered_graph_is_refused(encoder_only: tuple[Path, Exported], tmp_path: Path) -> None:
    """A real case: ONNX Runtime runs a graph in which one LayerNormalization has another epsilon."""
    model = load_graph(encoder_only[1].bundle.path, "encoder")
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 0.1
    onnx.save(model, tmp_path / "encoder.onnx")
    with graphs_from(tmp_path), pytest.raises(BundleError, match=r"differs from torch .* in encoder"):
        export_bundle(encoder_only[0], tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]


@pytest.mark.usefixtures("reuse_graph")
def test_a_refused_export_leaves_the_old_bundle(
    encoder_only: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, exported = encoder_only
    target = Path(shutil.copytree(exported.bundle.path, tmp_path / "bundle"))
    monkeypatch.setattr(export.verify, "OnnxEngine", lambda *arguments: Wrong(OnnxEngine(*arguments), 1.0))
    with pytest.raises(BundleError, match="differs from torch"):
        export_bundle(checkpoint, target, Options(overwrite=True))
    assert open_bundle(target).checksums == exported.bundle.checksums
    open_bundle(target).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("reuse_graph")
def test_a_failed_move_brings_the_old_bundle_back(
    encoder_only: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, exported = encoder_only
    target = Path(shutil.copytree(exported.bundle.path, tmp_path / "bundle"))
    rename = Path.rename

    def refuse_new(path: Path, to: Path) -> Path:
        if path.name == "bundle" and path != target:
            raise OSError("Device or resource busy")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="busy"):
        export_bundle(checkpoint, target, Options(overwrite=True))
    open_bundle(target).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_in_the_way_is_not_overwritten(small_checkpoint: Path, bundle_copy: Path, tmp_path: Path) -> None:
    photos_folder = tmp_path / "photos"
    photos_folder.mkdir()
    (photos_folder / "holiday.jpg").write_bytes(b"dear")
    for target in (photos_folder, photos_folder / "holiday.jpg"):
        for overwrite in (False, True):
            with pytest.raises(BundleError, match=r"exists and is not a bundle: .*nothing was overwritten"):
                export_bundle(small_checkpoint, target, Options(overwrite=overwrite))
    assert (photos_folder / "holiday.jpg").read_bytes() == b"dear"
    with pytest.raises(BundleError, match=r"is already a bundle: .*--overwrite"):
        export_bundle(small_checkpoint, bundle_copy)
    open_bundle(bundle_copy).verify()
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "bundle"}


@pytest.mark.usefixtures("reuse_graph")
def test_overwrite_replaces_the_whole_bundle(
    encoder_only: tuple[Path, Exported], bundle_copy: Path, tmp_path: Path
) -> None:
    (bundle_copy / "notes.txt").write_text("of the old bundle")
    exported = export_bundle(encoder_only[0], bundle_copy, Options(overwrite=True))
    assert exported.bundle == open_bundle(bundle_copy)
    assert exported.bundle.fingerprint == encoder_only[1].bundle.fingerprint
    exported.bundle.verify()
    assert {path.name for path in bundle_copy.iterdir()} == FILES - {"reconstruct.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("reuse_graph")
def test_new_and_empty_folders_are_written(encoder_only: tuple[Path, Exported], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "some" / "where"):
        export_bundle(encoder_only[0], target).bundle.verify()
        assert json.loads((target / "config.json").read_text())["format"] == FORMAT


def test_an_unusable_checkpoint_is_refused_by_its_own_name(small_checkpoint: Path, tmp_path: Path) -> None:
    description, weights = read_checkpoint(small_checkpoint)
    lacking = tmp_path / "lacking.safetensors"
    save_checkpoint(lacking, {name: w for name, w in weights.items() if name != "norm.bias"}, description)
    with pytest.raises(CheckpointError, match=r"lacking\.safetensors lacks weights: norm\.bias"):
        export_bundle(lacking, tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="no such file"):
        export_bundle(tmp_path / "missing.safetensors", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["lacking.safetensors"]


def test_weights_that_fp16_cannot_hold_are_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    """70,000 becomes infinity in fp16."""
    description, weights = read_checkpoint(small_checkpoint)
    encoder = dataclasses.replace(description, arch=dataclasses.replace(description.arch, decoder=None))
    names = build_model(encoder.arch).state_dict()
    large = {name: weights[name] for name in names} | {"norm.weight": torch.full_like(weights["norm.weight"], 7e4)}
    save_checkpoint(tmp_path / "large.safetensors", large, encoder)
    with pytest.raises(BundleError, match=r"norm\.weight has values too large for fp16: export without --half-weights"):
        export_bundle(tmp_path / "large.safetensors", tmp_path / "bundle", Options(half_weights=True))
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]


@pytest.mark.slow
def test_base_exports_to_small_graphs(tmp_path: Path) -> None:
    """The published depths and windows: 115 M weights, and graphs without them."""
    checkpoint = write_checkpoint(tmp_path / "base.safetensors", architecture("base", num_classes=1000), 0.01)
    exported = export_bundle(checkpoint, tmp_path / "base")
    assert max(agreement.error for agreement in exported.agreement["fp32"].values()) <= TOLERANCES["fp32"].error
    weights = load_file(exported.bundle.path / "weights.safetensors")
    for name in ("encoder", "reconstruct"):
        model = load_graph(exported.bundle.path, name)
        external = external_tensors(model)
        assert external.keys() <= in_graph(weights).keys()
        assert all(
            tensor.ByteSize() <= INLINE_LIMIT for tensor in model.graph.initializer if tensor.name not in external
        )
        assert (exported.bundle.path / f"{name}.onnx").stat().st_size < 1_000_000
    shutil.rmtree(tmp_path)  # 930 MB
