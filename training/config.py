"""What a run is: one frozen dataclass, checked when it is built. The defaults are the official recipes (recipes.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

from mixmim_serve.config import Architecture, architecture, units_from_partner, unknown
from mixmim_serve.errors import ConfigError

LAYER_DECAY_RULES = ("official", "mae", "mmpretrain")


@dataclass(frozen=True)
class RunConfig:
    """What pretraining and fine-tuning share."""

    size: str = "base"  # named size of the network
    image_size: int = 0  # pixels; 0 takes the network's own
    epochs: int = 600
    warmup_epochs: float = 40.0
    batch_size: int = 2048  # images an update, over all processes and accumulated parts
    accumulate: int = 1  # parts in which a process computes its share of a batch, one after the other
    base_lr: float = 1.5e-4  # for a batch of 256; scaled linearly with the batch
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    min_crop: float = 0.2  # smallest share of the image's area that a random crop keeps
    seed: int = 0
    workers: int = 8  # processes that decode and crop, for each training process
    max_unreadable: float = 0.1  # share of the images; more of them stop the run
    log_every: int = 10  # steps between lines of metrics.jsonl
    save_steps: int = 0  # steps between checkpoints, besides the one after each epoch; 0 for none
    keep_last: int = 2  # checkpoints that stay; the older are deleted,
    keep_every: int = 20  # but for those of every so many epochs
    bf16: bool = True  # autocast; float32 needs no scaler and neither does bf16
    compile: bool = False  # torch.compile: a minute or two first, then faster steps
    checkpoint_activations: bool = False  # compute blocks twice and keep less memory: for huge
    shard: bool = False  # FSDP2: split weights and optimiser over the processes

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "keep_last", "keep_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("workers", "save_steps", "seed", "base_lr", "min_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if not 0 < self.min_crop <= 1 or not 0 <= self.max_unreadable <= 1:
            raise ConfigError("min_crop and max_unreadable are shares between 0 and 1.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(f"warmup_epochs must be below the {self.epochs} epochs, got {self.warmup_epochs}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"a batch of {self.batch_size} cannot be computed in {self.accumulate} equal parts.")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.batch_size / 256

    def lasting(self, epochs: int) -> Self:
        """The same run over another number of epochs, with the same share of warm-up."""
        return dataclasses.replace(self, epochs=epochs, warmup_epochs=self.warmup_epochs * epochs / self.epochs)

    def due(self, epochs: int, every: int) -> bool:
        """Whether what is done every so many epochs, and after the last, is due after this many."""
        return epochs % every == 0 or epochs == self.epochs

    def part(self, processes: int) -> int:
        """Images that a process computes at once.

        Raises:
            ConfigError: when the batch cannot be split evenly.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise ConfigError(
                f"a batch of {self.batch_size} cannot be split over {processes} processes times {self.accumulate} "
                f"accumulated parts: choose a multiple of {parts} for batch_size."
            )
        return self.batch_size // parts


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pretraining run (official README, main_pretrain.py)."""

    mask_ratio: float = 0.5  # share of units taken from the partner image
    sample_every: int = 5  # epochs between pictures of reconstructions
    knn_every: int = 5  # epochs between k-NN judgements, where a labelled set is given

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sample_every", "knn_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError("mask_ratio is a share between 0 and 1.")
        self.part(processes=1)
        # `arch` refuses an unknown size and an impossible image size, too.
        units_from_partner(self.arch.units, self.mask_ratio, "enlarge image_size, or choose a ratio nearer to 0.5")

    @property
    def arch(self) -> Architecture:
        """The network to train, with its decoder."""
        arch = architecture(self.size)
        return arch.at(self.image_size) if self.image_size else arch

    def part(self, processes: int) -> int:
        """Images that a process computes at once: an even number, since each is mixed with another of its part.

        Raises:
            ConfigError: when the batch cannot be split so.
        """
        part = super().part(processes)
        if part % 2:
            raise ConfigError(f"{part} images at once cannot be mixed in pairs: choose an even part of batch_size.")
        return part


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of fine-tuning, on the device (method of timm's `rand-m9-mstd0.5-inc1`); 0 switches a part off."""

    rand_augment_ops: int = 2  # RandAugment operations an image
    rand_augment_magnitude: float = 9.0  # of 10
    rand_augment_std: float = 0.5  # deviation of the magnitude
    erase: float = 0.25  # probability that a rectangle becomes noise
    mixup: float = 0.8  # alpha of the beta distribution
    cutmix: float = 1.0  # alpha of the beta distribution
    smoothing: float = 0.1  # of labels

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if getattr(self, each.name) < 0:
                raise ConfigError(f"augment.{each.name} must be 0 (off) or more, got {getattr(self, each.name)}.")
        if self.erase > 1 or self.smoothing >= 1:
            raise ConfigError("augment.erase and augment.smoothing are shares between 0 and 1.")
        if self.rand_augment_magnitude > 10:
            raise ConfigError(f"augment.rand_augment_magnitude is at most 10, got {self.rand_augment_magnitude}.")


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run (official README, main_finetune.py)."""

    size: str = ""  # the checkpoint's own; a named size is needed only to start from scratch
    epochs: int = 100
    warmup_epochs: float = 5.0
    batch_size: int = 1024
    base_lr: float = 5e-4
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    min_crop: float = 0.08
    layer_decay: float = 0.7  # learning rate of a layer, as a share of the next one's
    layer_decay_rule: str = "official"  # what norm, head and downsampling count as: official, mae or mmpretrain
    drop_path: float = 0.1  # of the last block; rises linearly from 0
    head_std: float = 2e-5  # of the head's first weights on a pretrained encoder; from scratch, the network's own
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    evaluate_every: int = 1  # epochs between measurements on the validation images

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_decay_rule not in LAYER_DECAY_RULES:
            raise unknown("layer_decay_rule", self.layer_decay_rule, LAYER_DECAY_RULES)
        if not 0 < self.layer_decay <= 1 or not 0 <= self.drop_path < 1:
            raise ConfigError("layer_decay and drop_path are shares between 0 and 1.")
        if self.evaluate_every < 1:
            raise ConfigError(f"evaluate_every must be at least 1, got {self.evaluate_every}.")
