"""Small photos and a small run for the training tests."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from mixmim_serve.config import Architecture, DecoderConfig
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.data import Batch
from training.pretraining import Pretraining
from training.trainer import Trainer, train

# Two epochs of three steps; the peak learning rate is 1e-3.
SMALL = PretrainConfig(
    size="tiny",
    image_size=64,
    epochs=2,
    warmup_epochs=0.5,
    batch_size=8,
    base_lr=3.2e-2,
    workers=0,
    log_every=1,
    keep_every=1,
    bf16=False,
    monitor=0,
    report=False,
)
STEPS_PER_EPOCH = 3
NARROW = Architecture(8, (1, 1, 1, 1), (1, 1, 1, 1), 64, decoder=DecoderConfig(16, 1, 2))  # a few thousand weights
MEASURED = ("rate", "waiting", "memory")  # log values that differ between equal runs


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run and what it printed."""

    path: Path
    final: Path
    printed: str

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics]


def run_pretraining(config: PretrainConfig, images: Path, path: Path, **options: bool) -> Run:
    """Pretrain; the run must succeed."""
    console = Console(file=io.StringIO(), width=200)
    source = open_source(images)
    final = train(Pretraining(config, source), source, path, console, **options)
    assert final is not None
    assert isinstance(console.file, io.StringIO)
    return Run(path, final, console.file.getvalue())


class Killed(BaseException):
    """Raised like SIGKILL: no code catches it."""


@contextlib.contextmanager
def killed_in(step: int) -> Iterator[None]:
    """A block whose run ends in this step, counted from 0, as if by SIGKILL; fails if it does not."""
    train_step = Trainer.train_step

    def until(trainer: Trainer, parts: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        if trainer.step == step:
            raise Killed
        return train_step(trainer, parts)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        patch.setattr(Trainer, "train_step", until)
        yield
