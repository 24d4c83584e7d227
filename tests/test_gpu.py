"""Tests that need a GPU; run with `make gpu`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_data import SMALL

from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.distributed import World
from training.pretraining import Pretraining
from training.run_folder import RunFolder
from training.trainer import Trainer

pytestmark = pytest.mark.gpu
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def trainer_on(device: torch.device, config: PretrainConfig, images: Path, run: Path) -> Trainer:
    source = open_source(images)
    run.mkdir(exist_ok=True)
    return Trainer(Pretraining(config, source), source, RunFolder(run), World(0, 1, device))


def losses(trainer: Trainer, steps: int) -> list[float]:
    """Losses of the first steps, over as many epochs as needed."""
    found = []
    while len(found) < steps:
        trainer.sampler.epoch = len(found) // trainer.sampler.steps
        for batch in trainer.loader:
            trainer.set_learning_rate(len(found) / trainer.sampler.steps)
            with trainer.compiler.step(trainer.step, trainer.meter):
                found.append(trainer.train_step([batch])[0])
            trainer.step += 1
    return [float(loss) for loss in found[:steps]]


def test_a_few_steps_in_float32_equal_the_cpu(photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=10)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    on_gpu, on_cpu = (losses(trainer_on(device, config, photos, tmp_path), 10) for device in (GPU, CPU))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_some_hundred_real_steps_in_bf16_compiled_follow_the_cpu(tmp_path: Path) -> None:
    """The loss of the last fifty steps, on real photos, is the CPU's within two percent."""
    config = PretrainConfig(
        size="tiny", image_size=64, epochs=300, warmup_epochs=10, batch_size=12, base_lr=2e-2, workers=2, compile=True
    )
    images = REPOSITORY / "examples"
    ends = []
    for device, changes in ((GPU, {}), (CPU, {"compile": False, "bf16": False})):
        run = losses(trainer_on(device, dataclasses.replace(config, **changes), images, tmp_path), 300)
        ends.append(sum(run[-50:]) / 50)
        assert ends[-1] < run[0] - 0.05
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


def test_nothing_waits_for_the_device_between_log_lines(photos: Path, tmp_path: Path) -> None:
    trainer = trainer_on(GPU, dataclasses.replace(SMALL, bf16=True), photos, tmp_path)
    batches = list(trainer.loader)
    trainer.train_step([batches[0]])  # the first step may wait for allocations and kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            trainer.meter.add(*trainer.train_step([batch]), len(batch.pixels_BHWC))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attention_with_a_learned_bias_runs_in_a_fused_kernel(photos: Path, tmp_path: Path) -> None:
    trainer = trainer_on(GPU, dataclasses.replace(SMALL, bf16=True), photos, tmp_path)
    fused = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused):  # raises when none of them supports the inputs
        loss, _ = trainer.train_step([next(iter(trainer.loader))])
    assert loss.isfinite()
