"""Where a run logs besides metrics.jsonl: TensorBoard always, MLflow and Weights & Biases on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixmim_serve.errors import ConfigError

TRACKERS = ("mlflow", "wandb")


class Tracker(Protocol):
    """Logs numbers and pictures by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name."""

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """Log a picture, uint8 (H, W, 3)."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after `step` come from an interrupted run; the resumed one writes them again.
        self.writer: Any = SummaryWriter(run, purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """See `Tracker`."""
        self.writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class MLflow:
    """A run of the active experiment, set by MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(run_name=run.name)
        mlflow.log_params(config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.mlflow.log_metrics(dict(values), step=step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """See `Tracker`."""
        self.mlflow.log_image(pixels_HWC, artifact_file=f"{name}-{step:08d}.png")

    def close(self) -> None:
        """See `Tracker`."""
        self.mlflow.end_run()


class WandB:
    """A Weights & Biases run, set up by WANDB_PROJECT and WANDB_MODE."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(name=run.name, id=run.name, dir=run, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """See `Tracker`."""
        self.run.log({name: self.wandb.Image(pixels_HWC)}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()


def check_trackers(names: Iterable[str]) -> None:
    """Reject an unknown name before anything is written.

    Raises:
        ConfigError: listing the available ones.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"unknown tracker {name!r}: choose mlflow or wandb (TensorBoard is always written).")


def open_trackers(names: Iterable[str], run: Path, config: Mapping[str, Any], step: int = 0) -> list[Tracker]:
    """TensorBoard and the named trackers; `step` is where a resumed run continues."""
    trackers: list[Tracker] = [TensorBoard(run, step)]
    for name in names:
        trackers.append(MLflow(run, config) if name == "mlflow" else WandB(run, config))
    return trackers
