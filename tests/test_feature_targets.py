"""Predicted features: targets from an average of the weights, and runs that train on them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import training_data
from conftest import REPOSITORY
from safetensors.torch import load_file
from torch import Tensor
from training_data import MEASURED, NARROW, STEPS_PER_EPOCH, Run, killed_in, run_pretraining

from mixmim_serve.description import read_description
from mixmim_serve.errors import ConfigError
from mixmim_serve.model import MixMIM
from mixmim_serve.model.checkpoint import load_checkpoint
from mixmim_serve.model.mixmim import random_units, to_units, where_hidden
from training.config import PretrainConfig
from training.distributed import World
from training.feature_targets import FeatureObjective, last_blocks, mean_of_blocks, momentum, normalised, spread
from training.nonfinite import BadStep, save_nonfinite
from training.pretraining import BEYOND, Pretraining, PretrainObjective
from training.replay import rebuild
from training.start import read_start

ALONE = World(0, 1, torch.device("cpu"))
FEATURES = dataclasses.replace(
    training_data.SMALL, feature_weight=1.0, ema_momentum=0.9, batch_size=4, base_lr=3e-2, log_every=2
)
DEEP = dataclasses.replace(NARROW, depths=(1, 1, 1, 3))


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)


@pytest.fixture(scope="module")
def photos() -> Path:
    return REPOSITORY / "examples"  # 12 photos: three steps of four


def objective(**changes: object) -> FeatureObjective:
    torch.manual_seed(0)
    return FeatureObjective(MixMIM(DEEP), dataclasses.replace(FEATURES, **changes)).train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 64, 64, generator=generator), random_units(4, 0.5, generator)


# Targets


def test_targets_are_the_normalised_last_blocks_of_whole_images() -> None:
    torch.manual_seed(0)
    model, (pixels, _) = MixMIM(DEEP), batch()
    _, two, three = last_blocks(model, pixels, 5)
    stage = model(pixels).stages_BDHW[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(three, stage)  # the last block's output is the stage's
    assert not torch.allclose(two, three)
    assert [len(last_blocks(model, pixels, count)) for count in (1, 2, 3)] == [1, 2, 3]
    mean = mean_of_blocks([two, three])
    torch.testing.assert_close(mean, (F.layer_norm(two, (64,)) + F.layer_norm(three, (64,))) / 2)
    found, channels = normalised(mean, "token"), normalised(mean, "batch").flatten(0, 1)
    torch.testing.assert_close(found, F.layer_norm(mean, (64,)))
    assert found.shape == (4, 4, 64)
    torch.testing.assert_close(channels.mean(dim=0), torch.zeros(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(channels.std(dim=0, correction=0), torch.ones(64), rtol=0, atol=1e-2)
    assert float(objective(feature_norm="batch").targets(pixels, batch()[1])[0].mean(dim=(0, 1)).abs().max()) < 1e-5


def test_targets_carry_no_gradient_and_belong_to_no_optimiser() -> None:
    learning, (pixels, mask) = objective(), batch()
    assert not learning.targets(pixels, batch()[1])[0].requires_grad
    learning(pixels, mask).backward()
    assert all(parameter.grad is None for parameter in learning.average.parameters())
    assert all(parameter.grad is not None for parameter in learning.model.parameters())
    assert learning.feature_pred.weight.grad is not None
    task = Pretraining(FEATURES, None)
    optimised = {id(parameter) for group in task.parameter_groups() for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in task.objective.parameters() if parameter.requires_grad}
    assert not optimised & {id(parameter) for parameter in task.objective.average.parameters()}


def test_targets_do_not_see_the_mixture() -> None:
    """The error of a unit is taken from the view that hides it, against the target of the same unit."""
    learning, (pixels, mask) = objective(pixel_weight=0.0), batch()
    decoded = learning.model.pretrain(pixels, mask, 2).decoded_2BUD
    predicted = learning.feature_pred(decoded)
    errors = []
    for image in range(4):
        ((target,), _) = learning.targets(pixels[image : image + 1], mask)  # the image alone
        for unit in range(4):
            row = image if mask[0, unit] else 4 + 3 - image  # hidden in its own mixture, or in the partner's
            errors.append(F.smooth_l1_loss(predicted[row, unit], target[unit]))
    torch.testing.assert_close(learning(pixels, mask), torch.stack(errors).mean())


def test_units_come_from_the_view_that_hid_them() -> None:
    mask = torch.tensor([[True, False]])
    views = torch.arange(8.0).reshape(4, 2, 1)  # two mixtures, two views each
    assert where_hidden(views, mask).flatten().tolist() == [0, 7, 2, 5]


def test_the_average_moves_by_its_momentum() -> None:
    learning = objective(ema_momentum=0.75)
    before = [parameter.clone() for parameter in learning.average.parameters()]
    with torch.no_grad():
        for parameter in learning.model.parameters():
            parameter.add_(torch.ones_like(parameter))
    learning.after_step(0.0)
    for old, new, weight in zip(before, learning.average.parameters(), learning.model.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * weight)


def test_the_momentum_rises_along_half_a_cosine() -> None:
    config = dataclasses.replace(FEATURES, ema_momentum=0.9, ema_final_momentum=1.0)
    assert momentum(0.0, config) == pytest.approx(0.9)
    assert momentum(0.25, config) == pytest.approx(1 - 0.1 * (1 + math.sqrt(0.5)) / 2)
    assert momentum(1.0, config) == 1.0


def test_without_momentum_the_targets_are_the_networks_own_features() -> None:
    learning, (pixels, _) = objective(ema_momentum=0.0, ema_final_momentum=0.0), batch()
    with torch.no_grad():
        for parameter in learning.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        own = normalised(mean_of_blocks(last_blocks(learning.model.eval(), pixels, 4)), "token")
    assert not torch.allclose(learning.targets(pixels, batch()[1])[0], own)
    learning.after_step(0.5)
    assert torch.equal(learning.targets(pixels, batch()[1])[0], own)


@pytest.mark.parametrize("crops", [1, 2])
def test_two_halves_of_a_photo_find_each_other(crops: int) -> None:
    """The loss, written out: the mean of a photo's visible units in its own mixture, and in its partner's."""
    learning = objective(embedding_weight=1.0, feature_weight=0.0, pixel_weight=0.0, embedding_crops=crops)
    first, mask = batch()
    second = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    others = (second,) if crops == 2 else ()
    assert learning.crops == crops
    with torch.no_grad():
        encoded = learning.model.pretrain(first, mask, 2, *others).encoded_BUD
        own = [encoded[photo, ~mask[0]].mean(dim=0) for photo in range(4)]
        partner = [encoded[3 - photo, mask[0]].mean(dim=0) for photo in range(4)]
        unit = F.normalize(learning.projector(torch.stack(own + partner)))
        weights = (unit @ unit.T / 0.2).exp()
        losses = [-(weights[row, (row + 4) % 8] / (weights[row].sum() - weights[row, row])).log() for row in range(8)]
        found = learning(torch.cat([first, *others], dim=2), mask)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_two_crops_are_each_predicted_where_they_are_hidden() -> None:
    """As two ordinary batches would: photo i as itself and in its partner's place need not be the same pixels."""
    learning, (first, mask) = objective(feature_weight=1.0, embedding_weight=1.0), batch()
    second = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    model = learning.model
    output = model.pretrain(first, mask, 2, second)
    tokens = model.encode_mixed(model.patch_embed(first), model.patch_embed(second).flip(0), mask, 2)
    torch.testing.assert_close(output.encoded_BUD, tokens)
    own, partner = model.decode(tokens, mask).reshape(2, 4, 4, -1).unbind(0)
    hidden = mask[0]
    errors = [(own - model.targets(to_units(first))).square()[:, hidden]]
    errors.append((partner - model.targets(to_units(second)).flip(0)).square()[:, ~hidden])
    torch.testing.assert_close(output.loss, torch.cat([each.flatten() for each in errors]).mean())
    targets, _ = learning.targets(first, mask, second)
    (of_first, _), (of_second, _) = (learning.targets(crop, mask) for crop in (first, second))
    assert torch.equal(targets[:, hidden], of_first[:, hidden])
    assert torch.equal(targets[:, ~hidden], of_second[:, ~hidden])
    learning(torch.cat([first, second], dim=2), mask).backward()
    assert all(parameter.grad is not None for parameter in learning.parameters() if parameter.requires_grad)


def test_equal_tokens_have_no_spread() -> None:
    token = torch.randn(1, 1, 8)
    assert float(spread(token.expand(4, 4, 8))) == 0
    assert float(spread(F.layer_norm(torch.randn(64, 16, 8), (8,)))) == pytest.approx(1, abs=0.05)


def test_a_compiled_step_gives_the_same_loss_and_readings() -> None:
    """Without a break in the graph, by dynamo alone: kernels that round differently are another matter."""
    eager, (pixels, mask) = objective(), batch()
    expected = eager(pixels, mask)
    compiled = objective()
    found = torch.compile(compiled, backend="eager", fullgraph=True)(pixels, mask)
    assert torch.equal(found, expected)
    assert compiled.readings(ALONE) == eager.readings(ALONE)


# The paper's method stays as it was


def test_by_default_loss_and_gradients_are_those_of_the_paper_to_the_last_bit() -> None:
    pixels, mask = batch()
    torch.manual_seed(0)
    model = MixMIM(NARROW).train()
    loss = PretrainObjective(model, 0.5)(pixels, mask)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    tokens = model.patch_embed(pixels)  # the same, written out
    encoded = model.encode_mixed(tokens, tokens.flip(0), mask, 2)
    x, token = model.decoder_embed(encoded), model.mask_token
    views = [torch.where(mask[..., None], token, x), torch.where(mask[..., None], x, token)]
    x = (torch.cat(views) + model.decoder_pos_embed).unsqueeze(1)
    for block in model.decoder_blocks:
        x = block(x)
    own, partner = model.decoder_pred(model.decoder_norm(x)).squeeze(1).float().reshape(2, 4, 4, -1).unbind(0)
    predicted = torch.where(mask[..., None], own, partner.flip(0))
    expected = (predicted - model.targets(to_units(pixels))).square().mean()
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in model.named_parameters())


def test_by_default_nothing_is_added(photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(training_data.SMALL, epochs=1, warmup_epochs=0, batch_size=4)
    assert type(Pretraining(config, None).objective) is PretrainObjective
    run = run_pretraining(config, photos, tmp_path / "run")
    assert run.metrics[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm", "rate", "waiting", "memory"}
    assert "method" not in read_description(run.final).provenance
    assert state_of(run.path)["objective"] == {}


# Runs


def state_of(path: Path) -> dict[str, dict[str, Tensor]]:
    (last,) = (path / "checkpoints").glob("*.state.pt")
    state: dict[str, dict[str, Tensor]] = torch.load(last, weights_only=True)
    return state


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with features that nobody interrupted; read-only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.config.architecture", lambda _: NARROW)
        return run_pretraining(FEATURES, photos, tmp_path_factory.mktemp("whole") / "run")


def test_the_log_has_both_losses_and_the_targets_spread(whole: Run) -> None:
    for line in whole.metrics:
        assert line["loss"] == pytest.approx(line["pixel_loss"] + line["feature_loss"], rel=1e-5)
        assert 0 < line["target_std"] < 1


def test_the_final_checkpoint_is_an_ordinary_one(whole: Run) -> None:
    model, description = load_checkpoint(whole.final)
    assert type(model) is MixMIM
    assert description.provenance["method"] == {"feature_weight": 1.0, "ema_momentum": 0.9}
    average = state_of(whole.path)["objective"]["average"]
    weights = load_file(whole.final)
    assert weights.keys() == average.keys()
    assert not torch.equal(weights["norm.weight"], average["norm.weight"])


def test_the_average_can_be_the_final_weights(whole: Run, photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(FEATURES, final_weights="average")
    run = run_pretraining(config, photos, tmp_path / "run")
    final, average = load_file(run.final), state_of(whole.path)["objective"]["average"]
    assert all(torch.equal(final[name], average[name]) for name in average)
    last = load_file(tmp_path / "run" / "checkpoints" / f"step-{2 * STEPS_PER_EPOCH:08d}.safetensors")
    trained = load_file(whole.final)
    assert all(torch.equal(last[name], trained[name]) for name in trained)
    assert load_checkpoint(run.final)[1].provenance["method"]["final_weights"] == "average"


@pytest.mark.parametrize("step", [1, 4, 5])  # within a line of the log, and between two
def test_a_resumed_run_is_equal_to_the_last_bit(whole: Run, photos: Path, tmp_path: Path, step: int) -> None:
    assert_resumes(whole, dataclasses.replace(FEATURES, save_steps=1), photos, tmp_path, step)


def test_a_run_with_embeddings_resumes_too(photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(FEATURES, feature_weight=0.0, embedding_weight=1.0)
    whole = run_pretraining(config, photos, tmp_path / "whole")
    for line in whole.metrics:
        assert line["loss"] == pytest.approx(line["pixel_loss"] + line["embedding_loss"], rel=1e-5)
        assert 0.1 < line["embedding_loss"] < 10
    assert type(load_checkpoint(whole.final)[0]) is MixMIM
    assert_resumes(whole, config, photos, tmp_path, 4)


def assert_resumes(whole: Run, config: PretrainConfig, photos: Path, tmp_path: Path, step: int) -> None:
    with killed_in(step):
        run_pretraining(config, photos, tmp_path / "run")
    run = run_pretraining(config, photos, tmp_path / "run", resume=True)
    assert without_speed(run) == without_speed(whole)
    one, other = load_file(run.final), load_file(whole.final)
    assert all(torch.equal(one[key], other[key]) for key in other)
    mine, theirs = (state_of(path)["objective"] for path in (run.path, whole.path))
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"sums"}:
        assert all(torch.equal(mine[name][key], theirs[name][key]) for key in theirs[name]), name


def without_speed(run: Run) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in run.metrics]


def test_a_run_of_before_these_settings_goes_on(photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(training_data.SMALL, batch_size=4)
    with killed_in(4):
        run_pretraining(config, photos, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text())
    about["config"] = {name: value for name, value in about["config"].items() if name not in BEYOND}
    path.write_text(json.dumps(about))
    state = next((tmp_path / "run" / "checkpoints").glob("*.state.pt"))
    torch.save({key: value for key, value in torch.load(state).items() if key != "objective"}, state)
    with pytest.raises(ConfigError, match=r"was started with attention None \(now across\)"):
        run_pretraining(dataclasses.replace(config, attention="across"), photos, tmp_path / "run", resume=True)
    assert run_pretraining(config, photos, tmp_path / "run", resume=True).final.exists()


def test_features_are_learnt_and_do_not_collapse(photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(FEATURES, epochs=40, log_every=STEPS_PER_EPOCH, sample_every=1000, keep_every=1000)
    lines = run_pretraining(config, photos, tmp_path / "run").metrics
    losses = [line["feature_loss"] for line in lines]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert lines[-1]["target_std"] > 0.3


def test_a_step_that_is_run_again_has_the_average(tmp_path: Path) -> None:
    task = Pretraining(FEATURES, None)
    with torch.no_grad():
        for parameter in task.objective.average.parameters():
            parameter.add_(1.0)
    (tmp_path / "config.json").write_text(json.dumps({"task": "pretrain", "config": dataclasses.asdict(FEATURES)}))
    bad = BadStep(0, 0, [], [])
    save_nonfinite(tmp_path, ALONE, task.model.state_dict(), task.describe({}), bad, task.objective.resume_state())
    again = rebuild(tmp_path, read_start(tmp_path / "nonfinite" / "weights.safetensors")).objective
    assert all(map(torch.equal, again.average.state_dict().values(), task.objective.average.state_dict().values()))
    assert torch.equal(again.feature_pred.weight, task.objective.feature_pred.weight)


# Attention


def test_the_switch_lets_tokens_of_two_images_meet() -> None:
    torch.manual_seed(0)
    for attention, meet in (("masked", False), ("across", True)):
        config: PretrainConfig = dataclasses.replace(training_data.SMALL, attention=attention)
        model = Pretraining(config, None).model.eval()
        pixels, mask = batch()
        with torch.inference_mode():
            tokens = model.patch_embed(pixels)
            one, other = (model.encode_mixed(tokens, partner, mask, 2) for partner in (tokens.flip(0), 1 - tokens))
        own = ~mask[0]
        assert torch.equal(one[:, own], other[:, own]) == (not meet), attention


def test_the_switch_is_part_of_the_provenance(photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(training_data.SMALL, epochs=1, warmup_epochs=0, batch_size=4, attention="across")
    run = run_pretraining(config, photos, tmp_path / "run")
    assert read_description(run.final).provenance["method"] == {"attention": "across"}
    assert "attention" not in json.dumps(read_description(run.final).to_dict()["architecture"])
    plain = run_pretraining(dataclasses.replace(config, attention="masked"), photos, tmp_path / "plain")
    assert plain.losses != run.losses
    started = Pretraining(dataclasses.replace(training_data.SMALL, size=""), None, start=read_start(run.final))
    assert not started.model.attends_across  # the run's setting decides, not the checkpoint's


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention": "mask"}, "unknown attention 'mask': choose one of masked, across. Did you mean masked"),
        ({"feature_weight": -1.0}, "feature_weight and embedding_weight must be 0 or more, and not all 0"),
        ({"pixel_weight": 0.0, "feature_weight": 0.0}, "and not all 0, got 0.0, 0.0, 0.0"),
        ({"pixel_weight": 2.0, "feature_weight": 0.0}, "are for runs with other losses: set feature_weight too"),
        ({"final_weights": "average", "feature_weight": 0.0}, "are for runs with other losses: set feature_weight too"),
        ({"final_weights": "both"}, "unknown final_weights 'both': choose one of trained, average"),
        ({"embedding_crops": 3}, "embedding_crops must be 1 or 2, got 3"),
        ({"feature_norm": "layer"}, "unknown feature_norm 'layer': choose one of token, batch"),
        ({"ema_momentum": 1.5}, "must be shares, the second not below the first, got 1.5 and 1.0"),
        ({"ema_final_momentum": 0.5}, "must be shares, the second not below the first, got 0.9 and 0.5"),
        ({"feature_blocks": 0}, "feature_blocks must be at least 1"),
        ({"shard": True}, "predicted features need a whole copy of the network in each process: set shard=false"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(FEATURES, **changes)
