"""Fine-tuning, judging and probing on small photos; resizing; class names into the checkpoint."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import photo
from PIL import Image
from rich.console import Console
from training_data import MEASURED
from typer.testing import CliRunner

from mixmim_serve.cli import app
from mixmim_serve.config import Architecture, DecoderConfig, Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, ConfigError, DataError
from mixmim_serve.model import Encoder, build_model
from mixmim_serve.model.blocks import Block
from mixmim_serve.model.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from mixmim_serve.sources import open_source
from training.config import AugmentConfig, FinetuneConfig
from training.data import Batch
from training.evaluation.labelled import Labelled, open_labelled
from training.finetuning import Finetuning, set_drop_path
from training.start import Start, read_start
from training.trainer import Trainer, train

SMALL = FinetuneConfig(
    epochs=4,
    warmup_epochs=1,
    batch_size=8,
    base_lr=0.1,
    min_crop=0.5,
    workers=0,
    log_every=3,
    bf16=False,
    layer_decay=0.9,
    augment=AugmentConfig(rand_augment_magnitude=2, mixup=0.2),
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network with a decoder, at 64 px, with pixels scaled in its own way."""
    torch.manual_seed(1)
    arch = Architecture(8, (1, 1, 2, 1), (1, 1, 2, 2), 64, decoder=DecoderConfig(16, 1, 2))
    path = tmp_path_factory.mktemp("pretrained") / "small.safetensors"
    preprocessing = dataclasses.replace(Preprocessing.evaluation(64), mean=(0.5, 0.5, 0.5))
    save_checkpoint(path, build_model(arch).state_dict(), Description(arch, preprocessing, provenance={"by": "tests"}))
    return path


def task_of(data: Path, start: Path | None, config: FinetuneConfig = SMALL) -> tuple[Finetuning, Labelled]:
    images, val = open_labelled(str(data))
    return Finetuning(config, images.classes, read_start(start) if start else None, val), images


def run(data: Path, start: Path | None, out: Path, config: FinetuneConfig = SMALL, **options: bool) -> Path | None:
    task, images = task_of(data, start, config)
    return train(task, images.source, out, Console(file=io.StringIO()), **options)


def lines(path: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in json.loads(line).items() if name not in MEASURED}
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def tuned(labelled: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    assert run(labelled, pretrained, folder) == folder / "final.safetensors"
    return folder


# Runs


def test_it_learns_and_keeps_the_class_names(tuned: Path, labelled: Path, pretrained: Path) -> None:
    judged = [line for line in lines(tuned) if "val_top1" in line]
    assert [line["epoch"] for line in judged] == [1, 2, 3, 4]
    assert judged[-1]["val_top1"] == 100
    model, description = load_checkpoint(tuned / "final.safetensors")
    assert description.labels == ("blue", "red")
    assert description.arch == dataclasses.replace(read_start(pretrained).description.arch, decoder=None, num_classes=2)
    assert description.preprocessing.mean == (0.5, 0.5, 0.5)  # as the backbone was pretrained
    assert description.provenance["start"].startswith("sha256:")
    assert description.provenance["task"] == "finetune"
    assert type(model) is Encoder


def test_a_run_that_ended_anywhere_resumes_exactly(
    tuned: Path, labelled: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Dropped paths, augmentation and mixing come again as they would have."""

    class Killed(BaseException):
        pass

    step = Trainer.train_step

    def until(trainer: Trainer, parts: object) -> object:
        if trainer.step == 7:
            raise Killed
        return step(trainer, parts)

    config = dataclasses.replace(SMALL, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", until)
        with pytest.raises(Killed):
            run(labelled, pretrained, tmp_path / "run", config)
    assert (tmp_path / "run" / "checkpoints" / "step-00000006.state.pt").exists()
    run(labelled, pretrained, tmp_path / "run", config, resume=True)
    assert lines(tmp_path / "run") == lines(tuned)
    one, other = (read_checkpoint(path / "final.safetensors")[1] for path in (tmp_path / "run", tuned))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_another_start_is_not_resumed(labelled: Path, pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "run"))
    (folder / "final.safetensors").unlink()
    task = Finetuning(dataclasses.replace(SMALL, size="tiny"), ("blue", "red"), None, None)
    with pytest.raises(ConfigError, match=r"was started with size  \(now tiny\), start sha256:\w+ \(now scratch\)"):
        train(task, open_source(labelled / "train"), folder, Console(quiet=True), resume=True)


def test_the_head_starts_near_zero_only_on_a_pretrained_encoder(labelled: Path, pretrained: Path) -> None:
    tuned, _ = task_of(labelled, pretrained)
    scratch, _ = task_of(labelled, None, dataclasses.replace(SMALL, size="tiny", image_size=64))
    assert 0 < tuned.objective.model.head.weight.abs().max() < 1e-3
    assert scratch.objective.model.head.weight.std() > 0.02


def test_from_scratch(labelled: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, size="tiny", image_size=64, epochs=2)
    final = run(labelled, None, tmp_path / "run", config)
    assert final is not None
    assert read_start(final).description.provenance["start"] == "scratch"
    with pytest.raises(ConfigError, match="training from scratch needs a size: add --set size=tiny"):
        task_of(labelled, None)


def test_another_input_size_is_carried_over(labelled: Path, pretrained: Path) -> None:
    task, _ = task_of(labelled, pretrained, dataclasses.replace(SMALL, image_size=96))
    assert task.arch.image_size == task.preprocessing.image_size == 96
    old = read_start(pretrained).weights
    new = task.objective.model.state_dict()
    assert new["absolute_pos_embed"].shape[1] == 24 * 24
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert new[table].shape != old[table].shape
    assert torch.equal(new["layers.1.blocks.0.mlp.fc1.weight"], old["layers.1.blocks.0.mlp.fc1.weight"])
    middle_old, middle_new = old[table][len(old[table]) // 2], new[table][len(new[table]) // 2]
    torch.testing.assert_close(middle_new, middle_old, atol=0.01, rtol=0)  # a token's bias to itself


def test_the_whole_encoder_is_taken_and_the_head_starts_near_zero(labelled: Path, pretrained: Path) -> None:
    task, _ = task_of(labelled, pretrained)
    old, new = read_start(pretrained).weights, task.objective.model.state_dict()
    for name, weight in new.items():
        if not name.startswith("head."):
            assert torch.equal(weight, old[name]), name
    assert not [name for name in new if name.startswith(("decoder", "mask_token"))]
    assert new["head.weight"].std() == pytest.approx(2e-5, rel=0.2)
    assert new["head.bias"].abs().max() == 0


def test_dropped_paths_rise_with_depth() -> None:
    model = Encoder(Architecture(8, (1, 1, 2, 1), (1, 1, 1, 1), 64))
    set_drop_path(model, 0.4)
    assert [b.drop_path for b in model.modules() if isinstance(b, Block)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_a_dropped_path_skips_whole_branches_and_keeps_the_mean() -> None:
    block = Encoder(Architecture(8, (1, 1, 1, 1), (1, 1, 1, 1), 64)).layers[0].blocks[0]
    block.drop_path = 0.25
    branch = torch.ones(4000, 1, 3, 8)
    torch.manual_seed(0)
    dropped = block.train().drop(branch)
    values = dropped.flatten(1)
    assert ((values == 0).all(dim=1) | (values == 1 / 0.75).all(dim=1)).all()
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    assert block.eval().drop(branch) is branch


def test_layer_decay_reaches_the_learning_rates(labelled: Path, pretrained: Path, tmp_path: Path) -> None:
    from training.distributed import World
    from training.run_folder import RunFolder

    task, images = task_of(labelled, pretrained)
    trainer = Trainer(task, images.source, RunFolder(tmp_path), World(0, 1, torch.device("cpu")))
    trainer.set_learning_rate(1)
    rates = sorted({group["lr"] for group in trainer.optimizer.param_groups})
    peak = SMALL.base_lr * 8 / 256
    assert rates == pytest.approx([peak * 0.9**power for power in range(6, 0, -1)])  # five blocks and the patches


def test_a_batch_becomes_soft_targets(labelled: Path, pretrained: Path) -> None:
    task, _ = task_of(labelled, pretrained, dataclasses.replace(SMALL, augment=AugmentConfig(0, 0, 0, 0, 0, 0, 0.1)))
    pixels = torch.full((2, 64, 64, 3), 128, dtype=torch.uint8)
    batch = Batch(pixels, torch.tensor([1, 0]), torch.tensor([False, True]), ())
    inputs = task.inputs(batch, 0, 0)
    torch.testing.assert_close(inputs[1], torch.tensor([[0.05, 0.95], [0.95, 0.05]]))
    expected = (128 / 255 - 0.5) / 0.229
    assert float(inputs[0][0, 0].mean()) == pytest.approx(expected, abs=1e-4)


# Data that does not fit


def copy(labelled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(labelled, tmp_path / "data"))


def test_train_and_val_must_have_the_same_classes(labelled: Path, tmp_path: Path) -> None:
    data = copy(labelled, tmp_path)
    shutil.rmtree(data / "val" / "red")
    with pytest.raises(DataError, match=r"val has no image of class red of .*train: add some, or give another --val"):
        open_labelled(str(data))
    (data / "val" / "green").mkdir()
    shutil.copy(data / "val" / "blue" / "0.png", data / "val" / "green" / "0.png")
    with pytest.raises(DataError, match=r"val has images of class green, not among the 2 classes to learn"):
        open_labelled(str(data))


def test_one_class_or_none_is_refused(labelled: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no labels: put the images of each class into a folder"):
        open_labelled(str(photos))
    shutil.copytree(labelled / "train" / "red", tmp_path / "one" / "red")
    with pytest.raises(DataError, match=r"has only one class \(red\): at least two are needed"):
        open_labelled(str(tmp_path / "one"))


def test_val_may_lie_elsewhere_or_nowhere(labelled: Path) -> None:
    images, val = open_labelled(str(labelled / "train"))
    assert val is None
    assert images.classes == ("blue", "red")
    images, val = open_labelled(str(labelled / "train"), str(labelled / "val"))
    assert val is not None
    assert len(val.labels_N) == 8


def test_a_checkpoint_of_another_size_is_refused(labelled: Path, pretrained: Path) -> None:
    with pytest.raises(ConfigError, match=r"small.safetensors has size custom, not base: omit size"):
        task_of(labelled, pretrained, dataclasses.replace(SMALL, size="base"))


# The commands


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_finetune_evaluate_export_and_classify(labelled: Path, pretrained: Path, tmp_path: Path) -> None:
    """The whole way from a backbone to answers, as a user goes it."""
    settings = ["compile=false", "base_lr=0.1", "layer_decay=0.9", "bf16=false", "augment.mixup=0"]
    options = [word for setting in settings for word in ("--set", setting)]
    run_folder = tmp_path / "run"
    said = invoke(
        "finetune", labelled, "--from", pretrained, "--out", run_folder, "--epochs", 3, "--batch-size", 8,
        "--workers", 0, *options,
    )  # fmt: skip
    final = run_folder / "final.safetensors"
    assert f"wrote {final}; next: mixmim evaluate TEST_DATA --from {final}" in said
    assert json.loads((run_folder / "config.json").read_text())["config"]["augment"]["mixup"] == 0
    said = invoke("evaluate", labelled / "val", "--from", final, "--out", tmp_path / "report")
    assert said.startswith("top-1 100.00 % of 8 images; see")  # of two classes top-5 says nothing
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["confusion_matrix"] == [[4, 0], [0, 4]]
    assert [each["recall"] for each in report["classes"]] == [100, 100]
    assert np.asarray(Image.open(tmp_path / "report" / "confusion.png")).std() > 10
    invoke("export", final, tmp_path / "bundle")
    answer = json.loads(invoke("classify", tmp_path / "bundle", labelled / "val" / "red" / "1.png", "--top", 1))
    assert answer["classes"][0]["label"] == "red"


def test_probe_judges_and_writes_a_head(labelled: Path, pretrained: Path, tmp_path: Path) -> None:
    said = invoke("probe", labelled, "--from", pretrained, "--save", tmp_path / "head.safetensors", "--json")
    found = json.loads(said)
    assert found["linear"]["top1"] == 100
    assert found["linear"]["images"] == 8
    assert found["knn"].keys() == {"k=1", "k=5", "k=10", "k=20"}  # none beyond 24 training images
    start = read_start(tmp_path / "head.safetensors")
    assert start.description.labels == ("blue", "red")
    assert start.description.arch.decoder is not None  # reconstruction still works
    old = read_start(pretrained)
    assert all(torch.equal(start.weights[name], weight) for name, weight in old.weights.items())
    assert start.description.provenance["by"] == "tests"
    said = invoke("evaluate", labelled / "val", "--from", tmp_path / "head.safetensors", "--out", tmp_path / "report")
    assert said.startswith("top-1 100.00 %")


def test_evaluate_needs_a_head_and_known_classes(tuned: Path, labelled: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no classification head with class names: make one with mixmim fin"):
        invoke("evaluate", labelled / "val", "--from", pretrained)
    (tmp_path / "data" / "owl").mkdir(parents=True)
    photo(0).save(tmp_path / "data" / "owl" / "1.jpg")
    with pytest.raises(DataError, match="has images of class owl, not among the 2 classes"):
        invoke("evaluate", tmp_path / "data", "--from", tuned / "final.safetensors")


def test_an_unreadable_image_of_val_is_left_out(tuned: Path, labelled: Path, tmp_path: Path) -> None:
    data = copy(labelled, tmp_path)
    (data / "val" / "red" / "x.jpg").write_text("no image")
    invoke("evaluate", data / "val", "--from", tuned / "final.safetensors", "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["accuracy"]["images"] == 8
    assert report["unreadable"][0].startswith("red/x.jpg: the data is not an image")


def test_a_start_is_a_checkpoint_or_a_bundle(pretrained: Path, exported_bundle: Path, tmp_path: Path) -> None:
    assert isinstance(read_start(exported_bundle), Start)
    with pytest.raises(CheckpointError, match="no such file"):
        read_start(tmp_path / "missing.safetensors")
