"""Where the numbers of a run go besides metrics.jsonl: TensorBoard, and MLflow or Weights & Biases when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixmim_serve.errors import ConfigError

TRACKERS = ("mlflow", "wandb")


class Tracker(Protocol):
    """Takes numbers and pictures by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """A picture, uint8."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the step are of a run that was cut: a resumed one writes them again.
        self.writer: Any = SummaryWriter(run, purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As in `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """As in `Tracker`."""
        self.writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def close(self) -> None:
        """As in `Tracker`."""
        self.writer.close()


class MLflow:
    """A run of the active experiment (MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where)."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(run_name=run.name)
        mlflow.log_params(config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As in `Tracker`."""
        self.mlflow.log_metrics(dict(values), step=step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """As in `Tracker`."""
        self.mlflow.log_image(pixels_HWC, artifact_file=f"{name}-{step:08d}.png")

    def close(self) -> None:
        """As in `Tracker`."""
        self.mlflow.end_run()


class WandB:
    """A run of Weights & Biases (WANDB_PROJECT and WANDB_MODE say where)."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(name=run.name, id=run.name, dir=run, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As in `Tracker`."""
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """As in `Tracker`."""
        self.run.log({name: self.wandb.Image(pixels_HWC)}, step=step)

    def close(self) -> None:
        """As in `Tracker`."""
        self.run.finish()


def check_trackers(names: Iterable[str]) -> None:
    """Refuse an unknown name before anything is written.

    Raises:
        ConfigError: naming the known ones.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"unknown tracker {name!r}: choose mlflow or wandb (TensorBoard is always written).")


def open_trackers(names: Iterable[str], run: Path, config: Mapping[str, Any], step: int = 0) -> list[Tracker]:
    """TensorBoard and what was asked for; `step` is where a resumed run goes on."""
    made: list[Tracker] = [TensorBoard(run, step)]
    for name in names:
        made.append(MLflow(run, config) if name == "mlflow" else WandB(run, config))
    return made
