"""The `mixmim` command: what each subcommand prints and writes, and one sentence when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from conftest import GOLDEN, REPOSITORY
from exporting import graphs_from
from PIL import Image
from serving import take_out
from typer.testing import CliRunner

from mixmim_serve.bundle import open_bundle
from mixmim_serve.cli import app, main
from mixmim_serve.description import read_description
from mixmim_serve.engines import engine_fingerprint, open_engine
from mixmim_serve.extract.pipeline import run_files
from mixmim_serve.panel import draw_panel
from mixmim_serve.preprocess import preprocess
from mixmim_serve.tasks import reconstruct_pair

EXAMPLES = REPOSITORY / "examples"
HAT, SHOES = EXAMPLES / "hat.jpg", EXAMPLES / "shoes.jpg"
COMMANDS = sorted(typer.main.get_command(app).commands)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output, as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


Mixmim = Callable[..., Outcome]


@pytest.fixture
def mixmim(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Mixmim:
    """Runs the command in this process, and catches what it and its libraries print."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mixmim", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        return Outcome(exit_info.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two photos, one of them deeper, a hidden one, and one that is no image."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / "b.jpg").write_bytes(HAT.read_bytes())
    (folder / "a" / "z.JPG").write_bytes(SHOES.read_bytes())
    (folder / ".hidden.jpg").write_bytes(HAT.read_bytes())
    (folder / "notes.txt").write_text("no image by its name")
    return folder


def embeddings(bundle: Path, paths: list[Path]) -> list[Any]:
    """What the library gives for the same files."""
    return [result.outputs["embedding"] for result in run_files(open_engine(bundle), paths, ["embedding"])]


def assert_one_sentence(outcome: Outcome, sentence: str) -> None:
    """Exit code 1, and nothing on standard error but the reason."""
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("mixmim: ")
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1


# What works


def test_embed_prints_a_line_an_image_in_order(mixmim: Mixmim, exported_bundle: Path, photos: Path) -> None:
    outcome = mixmim("embed", exported_bundle, SHOES, photos, HAT)
    expected = [SHOES, photos / "a" / "z.JPG", photos / "b.jpg", HAT]  # as given, the folder sorted
    assert (outcome.code, outcome.err) == (0, "passed over 1 file: .txt (1)\n")
    assert [line["path"] for line in outcome.lines] == [str(path) for path in expected]
    assert {line["fingerprint"] for line in outcome.lines} == {engine_fingerprint(open_engine(exported_bundle))}
    vectors = np.array([line["embedding"] for line in outcome.lines], np.float32)
    assert np.array_equal(vectors, embeddings(exported_bundle, expected))


def test_embed_writes_the_same_vectors_as_npy(
    mixmim: Mixmim, exported_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    printed = mixmim("embed", exported_bundle, SHOES, photos).lines
    target = tmp_path / "new" / "vectors.npy"
    outcome = mixmim("embed", exported_bundle, SHOES, photos, "--output", target)
    names = target.with_suffix(".json")
    line = f"wrote {target}: 3 rows of 64 numbers; their paths are in {names}\n"
    assert (outcome.code, outcome.out, outcome.err) == (0, line, "passed over 1 file: .txt (1)\n")
    array = np.load(target, allow_pickle=False)
    assert (array.shape, array.dtype) == ((3, 64), np.float32)
    assert np.array_equal(array, np.array([line["embedding"] for line in printed], np.float32))
    assert json.loads(names.read_text()) == {
        **{name: printed[0][name] for name in ("model", "fingerprint", "model_fingerprint")},
        "paths": [line["path"] for line in printed],
    }  # fmt: skip
    assert sorted(path.name for path in target.parent.iterdir()) == ["vectors.json", "vectors.npy"]
    mixmim("embed", exported_bundle, HAT, "--output", tmp_path / "hat.json")  # no .npy: the list must not replace it
    assert np.load(tmp_path / "hat.json").shape == (1, 64)
    assert json.loads((tmp_path / "hat.json.json").read_text())["paths"] == [str(HAT)]


@pytest.mark.parametrize("damage", ["empty", "cut", "unreadable"])
def test_one_bad_image_is_skipped_and_named(
    mixmim: Mixmim, exported_bundle: Path, photos: Path, tmp_path: Path, damage: str
) -> None:
    bad = photos / "a" / "bad file.jpg"
    bad.write_bytes(HAT.read_bytes()[:1000] if damage == "cut" else b"")
    if damage == "unreadable":
        bad.unlink()
        bad.symlink_to(bad)  # a circle, which nobody can open
    reason = {"empty": "the image is empty", "cut": "the JPEG image is truncated", "unreadable": "cannot read"}[damage]
    target = tmp_path / "vectors.npy"
    good = [photos / "a" / "z.JPG", photos / "b.jpg"]
    for command in ("embed", "classify", "embed --output"):
        option = ("--output", target) if "--output" in command else ()
        outcome = mixmim(command.split()[0], exported_bundle, photos, HAT, *option)
        assert outcome.code == 1
        passed_over, named, counted = outcome.err.splitlines()
        assert passed_over == "passed over 1 file: .txt (1)"
        assert named.startswith("mixmim: ")
        assert str(bad) in named
        assert reason in named
        assert counted == "mixmim: 1 of 4 images could not be read and were skipped"
        if not option:
            assert [line["path"] for line in outcome.lines] == [*map(str, good), str(HAT)]
    assert np.array_equal(np.load(target), embeddings(exported_bundle, [*good, HAT]))
    assert json.loads(target.with_suffix(".json").read_text())["paths"] == [*map(str, good), str(HAT)]


def test_classify_prints_the_best_classes(mixmim: Mixmim, exported_bundle: Path) -> None:
    outcome = mixmim("classify", exported_bundle, HAT, SHOES, "--top", "2")
    assert (outcome.code, outcome.err) == (0, "")
    assert [line["path"] for line in outcome.lines] == [str(HAT), str(SHOES)]
    for line, result in zip(
        outcome.lines, run_files(open_engine(exported_bundle), [HAT, SHOES], ["logits"]), strict=True
    ):
        best = np.argsort(-result.outputs["logits"])[:2]
        assert [guess["index"] for guess in line["classes"]] == best.tolist()
        assert [guess["label"] for guess in line["classes"]] == [("cat", "dog", "owl")[index] for index in best]
    (every,) = mixmim("classify", exported_bundle, HAT).lines  # 5 wanted, 3 there
    assert sum(guess["probability"] for guess in every["classes"]) == pytest.approx(1)


def test_reconstruct_draws_the_panel(mixmim: Mixmim, exported_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "panel.png"
    outcome = mixmim("reconstruct", exported_bundle, HAT, SHOES, "--output", target, "--seed", "3", "--ratio", "0.75")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"wrote {target}\n", "")
    engine = open_engine(exported_bundle)
    preprocessing = engine.bundle.description.preprocessing
    a, b = (preprocess(path.read_bytes(), preprocessing) for path in (HAT, SHOES))
    with Image.open(target) as panel:
        assert panel.tobytes() == draw_panel(reconstruct_pair(engine, a, b, 0.75, 3), preprocessing).tobytes()


def test_extract_writes_a_folder_and_names_what_it_could_not_read(
    mixmim: Mixmim, exported_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "a" / "cut.jpg").write_bytes(HAT.read_bytes()[:1000])
    target = tmp_path / "features"
    outcome = mixmim("extract", exported_bundle, photos, target, "--features", "stage4", "--set", "options.batch=2")
    assert (outcome.code, outcome.out) == (0, f"{target}: 2 rows for 3 images, 1 could not be read\n")
    assert "passed over 1 file: .txt (1)" in outcome.err
    assert "could not read a/cut.jpg: the JPEG image is truncated" in outcome.err
    table = pq.read_table(target / "features" / "000000.parquet")
    assert table.column_names[:2] == ["key", "embedding"]
    assert "stage4" in table.column_names
    assert table["key"].to_pylist() == ["a/z.JPG", "b.jpg"]  # below the folder, sorted
    expected = embeddings(exported_bundle, [photos / "a" / "z.JPG", photos / "b.jpg"])
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected)
    assert pq.read_table(target / "errors.parquet")["key"].to_pylist() == ["a/cut.jpg"]
    assert json.loads((target / "manifest.json").read_text())["options"]["batch"] == 2


def test_info_describes_checkpoint_and_bundle(mixmim: Mixmim, small_checkpoint: Path, exported_bundle: Path) -> None:
    checkpoint, bundle = (json.loads(mixmim("info", path).out) for path in (small_checkpoint, exported_bundle))
    assert checkpoint["checkpoint"] == str(small_checkpoint)
    assert bundle["bundle"] == str(exported_bundle)
    assert bundle["fingerprint"] == open_bundle(exported_bundle).fingerprint
    assert bundle["outputs"]["encoder"][0] == "embedding"
    for about in (checkpoint, bundle):
        assert about["size"] == "custom"
        assert about["architecture"]["embed_dim"] == 8
        assert about["labels"] == ["cat", "dog", "owl"]
        assert about["provenance"] == {"made_by": "tests"}


def test_import_writes_a_checkpoint(mixmim: Mixmim, tmp_path: Path) -> None:
    target = tmp_path / "mini.safetensors"
    outcome = mixmim("import", GOLDEN / "official_finetune_mini.pth", target, "--image-size", "128")
    assert (outcome.code, outcome.out) == (0, f"wrote {target}\n")
    assert read_description(target).arch.num_classes == 10
    assert read_description(target).arch.image_size == 128


def test_export_overwrites_only_when_told(
    mixmim: Mixmim, small_checkpoint: Path, exported_bundle: Path, bundle_copy: Path
) -> None:
    (bundle_copy / "encoder.onnx").write_bytes(b"old")
    assert_one_sentence(mixmim("export", small_checkpoint, bundle_copy), "is already a bundle")
    assert (bundle_copy / "encoder.onnx").read_bytes() == b"old"
    with graphs_from(exported_bundle):
        outcome = mixmim("export", small_checkpoint, bundle_copy, "--overwrite")
    assert outcome.code == 0
    model = f"model bundle, model fingerprint {open_bundle(exported_bundle).fingerprint}"
    assert f"wrote {bundle_copy}: {model}\nfp32: cosine with torch at least 1.000000" in outcome.out
    open_bundle(bundle_copy).verify()
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]  # nothing left beside it


def test_a_shipped_bundle_is_found_by_name(
    mixmim: Mixmim, exported_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mixmim_serve.cli.common.__file__", str(tmp_path / "cli" / "common.py"))
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "small").symlink_to(exported_bundle)
    assert json.loads(mixmim("info", "small").out)["bundle"] == str(tmp_path / "bundles" / "small")
    monkeypatch.chdir(exported_bundle.parent)  # a folder of that name goes first
    assert json.loads(mixmim("info", exported_bundle.name).out)["bundle"] == exported_bundle.name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"Example: mixmim {command} " in result.output
    usage = result.output.partition("Usage: ")[2].partition("\n")[0]
    assert "[[" not in usage  # Typer adds brackets and dots to a metavar itself
    assert "...}" not in usage


def test_all_commands_are_there() -> None:
    assert COMMANDS == [
        "anomaly", "bench", "calibrate", "check", "classify", "compare", "distill", "drift", "duplicates", "embed",
        "evaluate", "export", "extract", "finetune", "head", "import", "info", "map", "neighbours", "pretrain", "probe",
        "pull", "push", "reconstruct", "replay", "score", "serve",
    ]  # fmt: skip


def test_embed_runs_without_torch(exported_bundle: Path) -> None:
    code = """
import sys
from mixmim_serve.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "embed", exported_bundle, HAT], capture_output=True, text=True, check=True
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


# What does not


@pytest.mark.parametrize("command", ["embed", "embed to npy", "classify", "reconstruct"])
def test_without_a_readable_image_nothing_is_written(
    mixmim: Mixmim, exported_bundle: Path, tmp_path: Path, command: str
) -> None:
    cut, target = tmp_path / "cut.jpg", tmp_path / "out"
    cut.write_bytes(HAT.read_bytes()[:1000])
    arguments = {
        "embed": ("embed", exported_bundle, cut),
        "embed to npy": ("embed", exported_bundle, cut, "--output", target),
        "classify": ("classify", exported_bundle, cut),
        "reconstruct": ("reconstruct", exported_bundle, HAT, cut, "--output", target),
    }[command]
    assert_one_sentence(mixmim(*arguments), "the JPEG image is truncated")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.jpg"]


def test_a_bad_image_is_named(mixmim: Mixmim, exported_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    for command in ("embed", "classify"):
        assert_one_sentence(mixmim(command, exported_bundle, tmp_path / "text.jpg"), f"{tmp_path}/text.jpg: ")
    (tmp_path / "empty.jpg").touch()
    outcome = mixmim("reconstruct", exported_bundle, tmp_path / "text.jpg", tmp_path / "empty.jpg")
    assert (outcome.code, outcome.out) == (1, "")
    first, second = outcome.err.splitlines()
    assert first.startswith(f"mixmim: {tmp_path}/text.jpg: ")
    assert second.startswith(f"mixmim: {tmp_path}/empty.jpg: ")


USES_A_BUNDLE = (
    "embed B HAT",
    "classify B HAT",
    "reconstruct B HAT HAT --output OUT",
    "extract B DIR OUT",
    "info B",
    "serve B",
)


@pytest.mark.parametrize("command", USES_A_BUNDLE)
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_folder_that_is_no_bundle_is_refused(
    mixmim: Mixmim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, damage: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("os.execve", pytest.fail)  # serve would become another program
    names = {"B": tmp_path / damage, "HAT": HAT, "DIR": EXAMPLES, "OUT": tmp_path / "out"}
    assert_one_sentence(mixmim(*(names.get(word, word) for word in command.split())), f"{damage} is not a bundle")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", USES_A_BUNDLE[:-1])  # the last is in test_server.py
def test_an_altered_bundle_is_refused(mixmim: Mixmim, bundle_copy: Path, tmp_path: Path, command: str) -> None:
    (bundle_copy / "encoder.onnx").write_bytes(b"altered")
    names = {"B": bundle_copy, "HAT": HAT, "DIR": EXAMPLES, "OUT": tmp_path / "out"}
    outcome = mixmim(*(names.get(word, word) for word in command.split()))
    assert_one_sentence(outcome, f"{bundle_copy / 'encoder.onnx'} was altered after the export")
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_used_are_refused(mixmim: Mixmim, exported_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: dict[str, tuple[object, ...]] = {
        "missing.jpg: no such file or folder": ("embed", exported_bundle, tmp_path / "missing.jpg"),
        "empty has no images": ("embed", exported_bundle, tmp_path / "empty"),
        "hat.jpg is not a source of images": ("extract", exported_bundle, HAT, tmp_path / "out"),
        "unknown executor 'cloud'": ("extract", exported_bundle, EXAMPLES, tmp_path / "out", "--executor", "cloud"),
        "unknown setting 'threads'": ("extract", exported_bundle, EXAMPLES, tmp_path / "out", "--set", "threads=2"),
        "cannot read": ("reconstruct", exported_bundle, HAT, tmp_path / "missing.jpg"),
        "/dev/null: ": ("embed", exported_bundle, HAT, "--output", "/dev/null/out.npy"),
        "choose one between 0 and 1": ("reconstruct", exported_bundle, HAT, SHOES, "--ratio", "1"),
        "is not a bundle": ("info", tmp_path / "missing"),
        "hat.jpg is not a complete safetensors file": ("info", HAT),
        "no such file": ("export", tmp_path / "missing.safetensors", tmp_path / "out"),
    }
    for sentence, arguments in cases.items():
        assert_one_sentence(mixmim(*arguments), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_bundle_without_the_part_is_refused(mixmim: Mixmim, bundle_copy: Path, tmp_path: Path) -> None:
    take_out(take_out(bundle_copy, "head"), "decoder")
    assert_one_sentence(mixmim("classify", bundle_copy, HAT), "this model has no classification head")
    target = tmp_path / "panel.png"
    outcome = mixmim("reconstruct", bundle_copy, HAT, SHOES, "--output", target)
    assert_one_sentence(outcome, "this model has no decoder")
    assert not target.exists()


def test_import_of_a_text_file_writes_nothing(mixmim: Mixmim, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no checkpoint")
    outcome = mixmim("import", tmp_path / "text.pth", tmp_path / "out.safetensors")
    assert_one_sentence(outcome, "text.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["text.pth"]


def test_export_leaves_other_folders_alone(mixmim: Mixmim, small_checkpoint: Path, photos: Path) -> None:
    outcome = mixmim("export", small_checkpoint, photos, "--overwrite")
    assert_one_sentence(outcome, "exists and is not a bundle")
    assert (photos / "b.jpg").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed",),
        ("embed", "tiny", "a.jpg", "--unknown"),
        ("classify", "tiny", "a.jpg", "--top", "0"),
        ("serve", "tiny", "--port", "70000"),
        ("reconstruct", "tiny", "a.jpg", "b.jpg", "--seed", "-1"),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(mixmim: Mixmim, arguments: tuple[str, ...]) -> None:
    outcome = mixmim(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: ")


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("torch", "train", ["import", "a.pth", "b.safetensors"]),
        ("onnxruntime", "cpu", ["embed", "BUNDLE", str(HAT), "--engine", "onnx"]),
        ("openvino", "openvino", ["embed", "BUNDLE", str(HAT), "--engine", "openvino"]),
        ("pyarrow", "extract", ["extract", "BUNDLE", str(EXAMPLES), "out"]),
        ("ray", "ray", ["extract", "BUNDLE", str(EXAMPLES), "out", "--executor", "ray"]),
        ("lance", "lance", ["extract", "BUNDLE", str(EXAMPLES), "out", "--format", "lance"]),
    ],
)
def test_a_missing_extra_is_named(
    exported_bundle: Path, tmp_path: Path, package: str, extra: str, arguments: list[str]
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from mixmim_serve.cli import main; main()"
    words = [str(exported_bundle) if word == "BUNDLE" else word for word in arguments]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert_one_sentence(Outcome(done.returncode, done.stdout, done.stderr), f"pip install 'mixmim-serve[{extra}]'")
