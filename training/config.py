"""What a pretraining run is: one frozen dataclass, checked when it is built."""

from __future__ import annotations

from dataclasses import dataclass

from mixmim_serve.config import Architecture, architecture, units_from_partner
from mixmim_serve.errors import ConfigError


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run. The defaults are the official recipe (official README, main_pretrain.py); see recipes.py."""

    size: str = "base"
    image_size: int = 0  # pixels; 0 takes the size's own
    epochs: int = 600
    warmup_epochs: float = 40.0
    batch_size: int = 2048
    base_lr: float = 1.5e-4  # for a batch of 256; scaled linearly with the batch
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    mask_ratio: float = 0.5  # share of units taken from the partner image
    min_crop: float = 0.2  # smallest share of the image's area that a random crop keeps
    seed: int = 0
    workers: int = 8  # processes that decode and crop
    log_every: int = 10  # steps between lines of metrics.jsonl
    checkpoint_every: int = 20  # epochs
    bf16: bool = True  # autocast
    compile: bool = False  # torch.compile: a minute or two first, then faster steps

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2: each image is mixed with another one of its batch.")
        if not 0 < self.mask_ratio < 1 or not 0 < self.min_crop <= 1:
            raise ConfigError("mask_ratio and min_crop are shares between 0 and 1.")
        if self.workers < 0:
            raise ConfigError(f"workers must be 0 (decode in the training process) or more, got {self.workers}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(f"warmup_epochs must be below the {self.epochs} epochs, got {self.warmup_epochs}.")
        # `arch` refuses an unknown size and an impossible image size, too.
        units_from_partner(self.arch.units, self.mask_ratio, "enlarge image_size, or choose a ratio nearer to 0.5")

    @property
    def arch(self) -> Architecture:
        """The network to train, with its decoder."""
        arch = architecture(self.size)
        return arch.at(self.image_size) if self.image_size else arch

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.batch_size / 256
