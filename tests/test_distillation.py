"""`mixmim distill`: what is matched, what stays frozen, exact resume, different sizes, errors."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from exporting import write_checkpoint
from rich.console import Console
from training_data import NARROW, SMALL, killed_in
from typer.testing import CliRunner

import training.recipes
from mixmim_serve.cli import app
from mixmim_serve.config import Architecture, architecture
from mixmim_serve.errors import BundleError, CheckpointError, ConfigError, MixMIMError, NonFiniteError
from mixmim_serve.model import Encoder, MixMIM
from mixmim_serve.model.checkpoint import load_checkpoint, read_checkpoint
from mixmim_serve.settings import override
from mixmim_serve.sources import Source, open_source
from training.config import DistillConfig
from training.data import load_step
from training.distillation import PARTS, Distillation, DistillObjective, frozen, matched, read_teacher, reduced
from training.distributed import World
from training.recipes import tiny_distill_cpu
from training.replay import replay
from training.run_folder import RunFolder
from training.start import Start
from training.trainer import Trainer, train

ALONE = World(0, 1, torch.device("cpu"))
WIDER = Architecture(12, (1, 2, 1, 1), (1, 1, 2, 2), 96, decoder=NARROW.decoder, num_classes=3)
_inherited = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL)}
CONFIG = DistillConfig(**_inherited)
BESIDE = dataclasses.replace(CONFIG, mixmim_weight=0.5)


@pytest.fixture(autouse=True)
def narrow_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Wider than the student, at a larger input size, with a decoder and a head that nobody needs."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    return read_teacher(write_checkpoint(path, WIDER, labels=("cat", "dog", "owl")))


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return open_source(photos)


def project_at_random(objective: DistillObjective) -> None:
    """In place of zeros, with which no gradient would reach the student."""
    torch.manual_seed(2)
    for projection in objective.projections.values():
        torch.nn.init.normal_(projection.weight, std=0.1)


def run(source: Source, teacher: Start, out: Path, config: DistillConfig = CONFIG, *, resume: bool = False) -> Path:
    final = train(Distillation(config, source, teacher), source, out, Console(file=io.StringIO()), resume=resume)
    assert final is not None
    return final


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[float, ...]]:
    """Of each line: the loss and its parts."""
    names = ("loss", "grad_norm", "mixmim_loss", *(f"distill_{part}" for part in PARTS))
    return [tuple(line.get(name, 0.0) for name in names) for line in lines(out)]


# What is matched


def test_a_student_that_equals_its_teacher_has_no_loss(source: Source, tmp_path: Path) -> None:
    """With projections that only standardise; a small change of one weight is seen in every part."""
    teacher = read_teacher(write_checkpoint(tmp_path / "same.safetensors", NARROW))
    task = Distillation(CONFIG, source, teacher)
    objective = task.objective
    task.model.load_state_dict(frozen(teacher).state_dict())
    with torch.no_grad():
        for part in PARTS:
            mean, scale = objective.get_buffer(f"{part}_mean"), objective.get_buffer(f"{part}_scale")
            objective.projections[part].weight.copy_(torch.diag(1 / scale))
            objective.projections[part].bias.copy_(-mean / scale)
    trainer = Trainer(task, source, RunFolder(tmp_path), ALONE)
    inputs = task.inputs(next(iter(trainer.loader)), 0, 0)
    assert float(objective(*inputs).detach()) < 1e-6
    assert max(objective.readings(ALONE).values()) < 1e-6
    with torch.no_grad():
        task.model.patch_embed.proj.weight[0, 0, 0, 0] += 1.0
    assert float(objective(*inputs).detach()) > 1e-3
    assert min(objective.readings(ALONE).values()) > 1e-4


def test_a_student_that_gives_the_mean_explains_nothing(source: Source, teacher: Start, tmp_path: Path) -> None:
    """Each part is a share of the variance, whatever the teacher's scale."""
    task = Distillation(CONFIG, source, teacher)
    features = task.teacher_features(source)
    for part, values_NE in features.items():
        mean, scale = task.objective.get_buffer(f"{part}_mean"), task.objective.get_buffer(f"{part}_scale")
        torch.testing.assert_close(mean, values_NE.mean(dim=0), rtol=1e-4, atol=1e-5)
        assert 0.9 < float(((values_NE - mean) / scale).square().mean()) < 1
        own = torch.zeros(len(values_NE), task.objective.projections[part].in_features)
        assert 0.9 < float(task.objective.mismatch(part, own, values_NE).detach()) < 1
    assert features["embedding"].shape == (24, 96)
    assert features["stage3"].shape == (24 * 6 * 6, 48)


def test_each_network_sees_the_crop_at_its_own_size_and_scale(source: Source, teacher: Start, tmp_path: Path) -> None:
    other = dataclasses.replace(
        teacher, description=dataclasses.replace(
            teacher.description, preprocessing=dataclasses.replace(teacher.description.preprocessing, std=(0.5,) * 3)
        )
    )  # fmt: skip
    task = Distillation(CONFIG, source, other)
    trainer = Trainer(task, source, RunFolder(tmp_path), ALONE)
    batch = next(iter(trainer.loader))
    assert batch.pixels_BHWC.shape == (8, 96, 96, 3)  # the larger of both
    pixels, _, *targets = task.inputs(batch, 0, 0)
    assert pixels.shape == (8, 3, 64, 64)
    flipped = batch.pixels_on(ALONE.device).float().permute(0, 3, 1, 2) / 255
    mean = torch.tensor(other.description.preprocessing.mean).view(3, 1, 1)
    expected = matched(task.teacher((flipped - mean) / 0.5))
    for target, part in zip(targets, PARTS, strict=True):
        torch.testing.assert_close(target, expected[part])
    assert [tuple(target.shape) for target in targets] == [(8, 96), (8, 48, 6, 6), (8, 96, 3, 3)]


def test_maps_of_different_grids_meet_on_the_coarser_one(teacher: Start) -> None:
    """Whichever of both is finer: a constant map stays what it is, and another one is averaged."""
    objective = DistillObjective(Encoder(CONFIG.arch), frozen(teacher), CONFIG)
    project_at_random(objective)
    own, target = torch.randn(2, 32, 4, 4), torch.randn(2, 48, 1, 1)
    finer = target.expand(-1, -1, 8, 8)
    torch.testing.assert_close(
        objective.mismatch("stage3", own, finer), objective.mismatch("stage3", own, target.expand(-1, -1, 4, 4))
    )
    averaged = own.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(
        objective.mismatch("stage3", own, target), objective.mismatch("stage3", averaged, target)
    )


def test_pixels_are_reduced_as_the_loader_reduces_them() -> None:
    ramp = torch.arange(96, dtype=torch.uint8).view(1, 1, 96, 1).expand(2, 96, 96, 3)
    smaller = reduced(ramp, 48)
    assert smaller.shape == (2, 48, 48, 3)
    torch.testing.assert_close(
        smaller[0, 0, 8:-8, 0], torch.arange(16, 80, 2, dtype=torch.float) + 0.5, rtol=0, atol=0.51
    )
    assert reduced(ramp, 96) is ramp
    white = torch.full((1, 96, 96, 3), 255, dtype=torch.uint8)
    white[:, :48] = 0  # bicubic overshoots at an edge
    assert (float(reduced(white, 64).min()), float(reduced(white, 64).max())) == (0, 255)


# Runs


@pytest.fixture(scope="module")
def whole(source: Source, teacher: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with MixMIM's loss beside it; read-only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.config.architecture", lambda _: NARROW)
        run(source, teacher, out, BESIDE)
    return out


def test_the_loss_falls(source: Source, teacher: Start, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=12, warmup_epochs=1)
    final = run(source, teacher, tmp_path / "run", config)
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert all("mixmim_loss" not in line for line in logged)
    for name in ("loss", *(f"distill_{part}" for part in PARTS)):
        first, last = (sum(line[name] for line in part) / 3 for part in (logged[:3], logged[-3:]))
        assert last < 0.9 * first, name
    description, weights = read_checkpoint(final)
    assert description.arch.decoder is None  # nothing trained one
    assert not [name for name in weights if "projection" in name or "teacher" in name]
    assert not list((tmp_path / "run" / "samples").glob("reconstructions*"))


def test_the_loss_is_the_weighted_sum_of_its_parts(whole: Path) -> None:
    for loss, _, mixmim, embedding, stage3, stage4 in losses(whole):
        assert loss == pytest.approx(embedding + (stage3 + stage4) / 2 + 0.5 * mixmim, rel=1e-4)
        assert mixmim > 0
    assert isinstance(load_checkpoint(whole / "final.safetensors")[0], MixMIM)
    assert (whole / "samples" / "reconstructions-epoch-0002.png").exists()


def test_weights_that_are_zero_leave_a_part_out(source: Source, teacher: Start, tmp_path: Path) -> None:
    task = Distillation(dataclasses.replace(CONFIG, match_stages=0.0), source, teacher)
    trainer = Trainer(task, source, RunFolder(tmp_path), ALONE)
    trainer.set_learning_rate(1)
    trainer.train_step([next(iter(trainer.loader))])
    assert float(task.objective.projections["embedding"].weight.grad.abs().max()) > 0
    assert float(task.objective.projections["stage3"].weight.grad.abs().max()) == 0


def test_the_teacher_stays_as_it_is(source: Source, teacher: Start, tmp_path: Path) -> None:
    """In evaluation mode, outside of the objective, without gradients, its weights those of the file."""
    task = Distillation(BESIDE, source, teacher)
    before = {name: weight.clone() for name, weight in task.teacher.state_dict().items()}
    assert train(task, source, tmp_path / "run", Console(file=io.StringIO()))
    assert not any(module.training for module in task.teacher.modules())
    assert not any(weight.requires_grad or weight.grad is not None for weight in task.teacher.parameters())
    for name, weight in task.teacher.state_dict().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(weight, teacher.weights[name])
    trained = {id(weight) for group in task.parameter_groups() for weight in group["params"]}
    assert not trained & {id(weight) for weight in task.teacher.parameters()}
    assert trained >= {id(weight) for weight in task.objective.projections.parameters()}


@pytest.mark.parametrize("step", [1, 4])
def test_it_resumes_exactly(source: Source, teacher: Start, whole: Path, tmp_path: Path, step: int) -> None:
    """Before the first checkpoint and after it; projections are not in a checkpoint's weights, and must come back."""
    with killed_in(step):
        run(source, teacher, tmp_path / "run", BESIDE)
    again = run(source, teacher, tmp_path / "run", BESIDE, resume=True)
    assert losses(tmp_path / "run") == losses(whole)
    one, other = (read_checkpoint(path)[1] for path in (again, whole / "final.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_teacher_cannot_go_on(source: Source, teacher: Start, tmp_path: Path) -> None:
    with killed_in(4):
        run(source, teacher, tmp_path / "run")
    other = read_teacher(write_checkpoint(tmp_path / "other.safetensors", WIDER, noise=0.2, labels=tuple("abc")))
    with pytest.raises(ConfigError, match=r"started with start scratch, teacher sha256:\w+ \(now scratch, teacher sh"):
        run(source, other, tmp_path / "run", resume=True)
    moved = read_teacher(Path(shutil.copy(teacher.path, tmp_path / "moved.safetensors")))
    run(source, moved, tmp_path / "run", resume=True)  # the same weights at another place


def test_the_teacher_stands_in_the_provenance(whole: Path, teacher: Start, exported_bundle: Path) -> None:
    about = read_checkpoint(whole / "final.safetensors")[0].provenance
    assert about["task"] == "distill"
    assert about["origin"]["teacher"]["identity"] == teacher.identity
    assert about["origin"]["teacher"]["size"] == "custom"
    bundled = Distillation(CONFIG, None, read_teacher(exported_bundle))
    fingerprint = json.loads((exported_bundle / "config.json").read_text())["fingerprint"]
    assert bundled.origin["teacher"]["fingerprint"] == fingerprint
    later = read_teacher(whole)  # a run is a teacher, too
    assert Distillation(CONFIG, None, later).origin["teacher"]["origin"] == about["origin"]


def test_a_step_that_is_not_finite_is_replayed(
    source: Source, teacher: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Distillation(CONFIG, source, teacher)
    with torch.no_grad():
        task.objective.projections["stage4"].weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="gradients of step 1 are not finite"):
        train(task, source, tmp_path / "run", Console(file=io.StringIO()))
    found = replay(tmp_path / "run")
    assert "first in the output of projections.stage4" in found[-1]
    write_checkpoint(tmp_path / "other.safetensors", WIDER, noise=0.2, labels=tuple("abc"))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    about["origin"]["teacher"]["path"] = str(tmp_path / "other.safetensors")
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    with pytest.raises(MixMIMError, match="is not the teacher that"):
        replay(tmp_path / "run")


def test_two_halves_give_the_gradients_of_the_whole_batch(source: Source, teacher: Start, tmp_path: Path) -> None:
    """As two processes do: each part's loss is a mean over equally many images."""
    found = []
    for accumulate in (1, 2):
        config = dataclasses.replace(BESIDE, accumulate=accumulate)
        task = Distillation(config, source, teacher)
        project_at_random(task.objective)
        trainer = Trainer(task, source, RunFolder(tmp_path), ALONE)
        trainer.set_learning_rate(1)
        parts, _ = load_step(trainer.dataset, trainer.sampler, 0)
        trainer.train_step(parts)
        found.append({name: weight.grad for name, weight in task.objective.named_parameters()})
    for name, expected in found[0].items():
        largest = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=2e-5 * largest, msg=name)


# Configuration


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixmim_weight": -1.0}, "must be 0 or more, and one of the first two above 0, got 1.0, 1.0, -1.0"),
        ({"match_embedding": 0.0, "match_stages": 0.0, "mixmim_weight": 1.0}, "one of the first two above 0"),
        ({"shard": True}, "needs a whole copy of the student"),
        ({"feature_weight": 1.0}, "has no feature_weight"),
        ({"size": ""}, "the student needs a size"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(CONFIG, **changes).arch  # noqa: B018


def test_the_student_has_a_decoder_only_for_mixmims_loss() -> None:
    assert CONFIG.arch.decoder is None
    assert BESIDE.arch == dataclasses.replace(NARROW, image_size=64)
    assert override(CONFIG, ["mixmim_weight=0.3"]).arch.decoder is not None


# The command


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe without torch.compile, which takes a minute."""
    recipe = dataclasses.replace(tiny_distill_cpu(), compile=False, monitor=0)
    monkeypatch.setitem(training.recipes.DISTILL, "tiny-distill-cpu", lambda: recipe)


def mixmim(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, MixMIMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())  # lines wrap


@pytest.mark.usefixtures("short")
def test_distill(photos: Path, teacher: Start, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--image-size", 64, "--epochs", 1, "--batch-size", 8, "--workers", 0, "--knn", labelled)
    said = mixmim("distill", photos, "--teacher", teacher.path, "--size", "tiny", "--out", out, *options,
                  "--set", "mixmim_weight=0.5")  # fmt: skip
    assert f"learns from {teacher.path}: custom at 96 px, 96 numbers in its embedding" in said
    assert "learns embedding (weight 1), stages 3 and 4 (weight 1), MixMIM with 50% mixed in (weight 0.5)" in said
    assert f"next: mixmim export {out / 'final.safetensors'} BUNDLE_DIR" in said
    assert lines(out)[-1]["knn20_top1"] == 100
    assert "is already finished" in mixmim("distill", photos, "--teacher", teacher.path, "--out", out, *options,
                                           "--set", "mixmim_weight=0.5", "--resume")  # fmt: skip


@pytest.mark.usefixtures("short")
def test_few_photos_change_the_recipe(photos: Path, teacher: Start, tmp_path: Path) -> None:
    """As for pretraining; stopped before it trains."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").touch()
    result = CliRunner().invoke(app, ["distill", str(photos), "--teacher", str(teacher.path), "--out",
                                      str(tmp_path / "run")])  # fmt: skip
    assert "batch 8 instead of 128: there are only 24 images" in result.output
    assert isinstance(result.exception, ConfigError)


def test_a_teacher_that_cannot_teach_is_refused(
    photos: Path, bundle_copy: Path, teacher: Start, tmp_path: Path
) -> None:
    command = ("distill", photos, "--out", tmp_path / "run", "--teacher")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"config": {}, "task": "pretrain"}')
    with pytest.raises(CheckpointError, match="unfinished is a run that has not finished"):
        mixmim(*command, tmp_path / "unfinished")
    with pytest.raises(CheckpointError, match="no such file"):
        mixmim(*command, tmp_path / "nothing.safetensors")
    gaps = {name: weight for name, weight in teacher.weights.items() if not name.startswith("norm.")}
    with pytest.raises(CheckpointError, match=r"teacher.safetensors lacks weights: norm.bias, norm.weight"):
        Distillation(CONFIG, None, Start(teacher.path, teacher.description, gaps))
    weights = bundle_copy / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + bytes(byte ^ 1 for byte in whole[-4:]))
    with pytest.raises(BundleError):
        mixmim(*command, bundle_copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"is a bundle without weights.safetensors, and a teacher needs its wei"):
        mixmim(*command, bundle_copy)
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_that_of_pretraining() -> None:
    """So that both differ in what is learned alone."""
    ours, theirs = tiny_distill_cpu(), training.recipes.tiny_cpu()
    differing = {field.name for field in dataclasses.fields(theirs)
                 if getattr(ours, field.name) != getattr(theirs, field.name)}  # fmt: skip
    assert not differing
    assert architecture("tiny").embed_dim == 32
    text = tiny_distill_cpu.__doc__ or ""
    assert all(word in text for word in ("Command: ", "Hardware: ", "Time", "number", "ours"))
