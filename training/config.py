"""Run configurations: frozen dataclasses, validated when built. The defaults are the official recipes (recipes.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, Self

from mixmim_serve.config import Architecture, architecture, units_from_partner, unknown
from mixmim_serve.errors import ConfigError

MORE_UNITS = "enlarge image_size, or choose a ratio nearer to 0.5"
AUTO: Literal["auto"] = "auto"  # of `compile`
ATTENTION = ("masked", "across")
FEATURE_NORMS = ("token", "batch")
FINAL_WEIGHTS = ("trained", "average")
LAYER_DECAY_RULES = ("official", "mae", "mmpretrain")


@dataclass(frozen=True)
class RunConfig:
    """Fields common to pretraining and fine-tuning."""

    size: str = "base"  # named size of the network; empty: that of the checkpoint that the run starts from
    image_size: int = 0  # pixels; 0 keeps the network's own
    windows: tuple[int, ...] = ()  # tokens on one side of an attention window, one number or one per stage; () for the
    # network's own, or at another input size those of that size
    epochs: int = 600
    warmup_epochs: float = 40.0
    batch_size: int = 2048  # images per update, over all processes and accumulated parts
    accumulate: int = 1  # parts into which a process splits its share of a batch, one backward pass each
    base_lr: float = 1.5e-4  # for a batch of 256; scaled linearly with the batch size
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    min_crop: float = 0.2  # smallest share of the image's area that a random crop keeps
    seed: int = 0
    workers: int = 8  # decoding processes per training process
    max_unreadable: float = 0.1  # share of the images; the run stops above it
    log_every: int = 10  # steps per line of metrics.jsonl
    save_steps: int = 0  # steps between checkpoints within an epoch, besides the one after it; 0 for none
    keep_last: int = 2  # latest checkpoints to keep; older ones are deleted,
    keep_every: int = 20  # except one per this many epochs
    bf16: bool = True  # autocast; bf16 needs no gradient scaler
    compile: bool | Literal["auto"] = False  # torch.compile; auto: when enough steps are ahead to win its time back
    checkpoint_activations: bool = False  # recompute blocks in the backward pass to save memory: for huge
    shard: bool = False  # FSDP2: shard weights and optimiser state over the processes
    report: bool = True  # write RUN/report.html after each epoch

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "keep_last", "keep_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("workers", "save_steps", "seed", "base_lr", "min_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.compile not in (True, False, AUTO):
            raise ConfigError(f"compile must be true, false or auto, got {self.compile!r}.")
        if not 0 < self.min_crop <= 1 or not 0 <= self.max_unreadable <= 1:
            raise ConfigError("min_crop and max_unreadable must be shares between 0 and 1.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(f"warmup_epochs must be below the {self.epochs} epochs, got {self.warmup_epochs}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"a batch of {self.batch_size} cannot be split into {self.accumulate} equal parts.")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.batch_size / 256

    def with_epochs(self, epochs: int) -> Self:
        """The same run with another number of epochs and the same share of warm-up; a longer one keeps no more."""
        return dataclasses.replace(
            self,
            epochs=epochs,
            warmup_epochs=self.warmup_epochs * epochs / self.epochs,
            keep_every=max(self.keep_every, self.keep_every * epochs // self.epochs),
        )

    def due(self, epochs: int, every: int) -> bool:
        """Whether an action of every `every` epochs is due after this many; always after the last."""
        return epochs % every == 0 or epochs == self.epochs

    def part_size(self, processes: int) -> int:
        """Images per process and accumulated part.

        Raises:
            ConfigError: when the batch cannot be split evenly.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise ConfigError(
                f"a batch of {self.batch_size} cannot be split over {processes} processes times {self.accumulate} "
                f"accumulated parts: set batch_size to a multiple of {parts}."
            )
        return self.batch_size // parts


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pretraining run (official README, main_pretrain.py)."""

    mask_ratio: float = 0.5  # share of units taken from the partner image
    attention: str = "masked"  # masked: tokens attend within their own image, as in the paper; across: within both
    pixel_weight: float = 1.0  # of the reconstruction loss, when there are others (feature_targets.py):
    feature_weight: float = 0.0  # of the features of hidden units; 0: none, as in the paper
    embedding_weight: float = 0.0  # of telling a photo from the batch's others; 0: none, as in the paper
    embedding_crops: int = 2  # crops of a photo for its places in two mixtures: 2, or 1 for the same
    feature_blocks: int = 4  # last blocks of the last stage whose outputs are averaged as targets
    feature_norm: str = "token"  # last norm of the targets: of each token, or of each channel over the batch
    ema_momentum: float = 0.996  # of the average of weights that gives the targets: first value,
    ema_final_momentum: float = 1.0  # last value
    final_weights: str = "trained"  # which weights are evaluated and become the final ones: trained, average
    sample_every: int = 5  # epochs between pictures of reconstructions
    knn_every: int = 5  # epochs between k-NN evaluations, when a labelled set is given
    monitor: int = 1024  # photos whose embeddings are measured after each epoch, at most; 0 for none

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sample_every", "knn_every", "feature_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.monitor < 0:
            raise ConfigError(f"monitor must be a number of photos, or 0 for none, got {self.monitor}.")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError("mask_ratio must be a share between 0 and 1.")
        if self.attention not in ATTENTION:
            raise unknown("attention", self.attention, ATTENTION)
        self._check_features()
        self.part_size(processes=1)
        if self.size:  # empty: that of the checkpoint which training starts from
            # `arch` also rejects an unknown size and an invalid image size.
            units_from_partner(self.arch.units, self.mask_ratio, MORE_UNITS)

    def _check_features(self) -> None:
        if self.final_weights not in FINAL_WEIGHTS:
            raise unknown("final_weights", self.final_weights, FINAL_WEIGHTS)
        if self.feature_norm not in FEATURE_NORMS:
            raise unknown("feature_norm", self.feature_norm, FEATURE_NORMS)
        if self.embedding_crops not in (1, 2):
            raise ConfigError(f"embedding_crops must be 1 or 2, got {self.embedding_crops}.")
        weights = (self.pixel_weight, self.feature_weight, self.embedding_weight)
        if min(weights) < 0 or not any(weights):
            raise ConfigError(
                "pixel_weight, feature_weight and embedding_weight must be 0 or more, and not all 0, got "
                f"{', '.join(map(str, weights))}."
            )
        if not 0 <= self.ema_momentum <= self.ema_final_momentum <= 1:
            raise ConfigError(
                "ema_momentum and ema_final_momentum must be shares, the second not below the first, "
                f"got {self.ema_momentum} and {self.ema_final_momentum}."
            )
        if not self.beyond_pixels and (self.pixel_weight != 1 or self.final_weights == "average"):
            raise ConfigError(
                "pixel_weight and final_weights=average are for runs with other losses: set feature_weight too."
            )
        if self.beyond_pixels and self.shard:
            raise ConfigError("predicted features need a whole copy of the network in each process: set shard=false.")

    @property
    def beyond_pixels(self) -> bool:
        """Whether there are losses besides the paper's."""
        return self.feature_weight > 0 or self.embedding_weight > 0

    @property
    def arch(self) -> Architecture:
        """The network to train, with its decoder, unless the run starts from a checkpoint.

        Raises:
            ConfigError: for an unknown size, or an impossible input size.
        """
        if not self.size:
            raise ConfigError("training from scratch needs a size: add --set size=tiny, or another size.")
        return architecture(self.size).resized(self.image_size, self.windows)

    def part_size(self, processes: int) -> int:
        """Images per process and accumulated part: an even number, since they are mixed in pairs.

        Raises:
            ConfigError: when the batch cannot be split so.
        """
        size = super().part_size(processes)
        if size % 2:
            raise ConfigError(f"a part of {size} images cannot be mixed in pairs: choose a batch_size with even parts.")
        return size


@dataclass(frozen=True)
class DistillConfig(PretrainConfig):
    """A distillation run (distillation.py): a small network learns the features of a larger, frozen one."""

    size: str = "tiny"
    match_embedding: float = 1.0  # weight of the pooled embedding in the loss
    match_stages: float = 1.0  # weight of the feature maps of stages 3 and 4 together
    mixmim_weight: float = 0.0  # weight of MixMIM's own loss; 0: the student needs no decoder, and has none

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.match_embedding, self.match_stages, self.mixmim_weight)
        if min(weights) < 0 or not any(weights[:2]):
            raise ConfigError(
                "match_embedding, match_stages and mixmim_weight must be 0 or more, and one of the first two above 0, "
                f"got {', '.join(map(str, weights))}."
            )
        if self.shard:
            raise ConfigError("distillation needs a whole copy of the student in each process: set shard=false.")
        if self.beyond_pixels:
            raise ConfigError(
                "a distilled network has no feature_weight and embedding_weight: set mixmim_weight for the loss of "
                "pixels, match_embedding and match_stages for the teacher's features."
            )

    @property
    def arch(self) -> Architecture:
        """The student; it has a decoder if MixMIM's loss is part of the run.

        Raises:
            ConfigError: for no size or an unknown one, or an impossible input size.
        """
        if not self.size:
            raise ConfigError("the student needs a size: add --size tiny, or another size.")
        arch = super().arch
        return arch if self.mixmim_weight else dataclasses.replace(arch, decoder=None)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation for fine-tuning, on the device (timm's `rand-m9-mstd0.5-inc1`); 0 switches an operation off."""

    rand_augment_ops: int = 2  # RandAugment operations per image
    rand_augment_magnitude: float = 9.0  # of 10
    rand_augment_std: float = 0.5  # standard deviation of the magnitude
    erase: float = 0.25  # probability that a rectangle is filled with noise
    mixup: float = 0.8  # alpha of the beta distribution
    cutmix: float = 1.0  # alpha of the beta distribution
    smoothing: float = 0.1  # of labels

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            if getattr(self, option.name) < 0:
                raise ConfigError(f"augment.{option.name} must be 0 (off) or more, got {getattr(self, option.name)}.")
        if self.erase > 1 or self.smoothing >= 1:
            raise ConfigError("augment.erase and augment.smoothing must be shares between 0 and 1.")
        if self.rand_augment_magnitude > 10:
            raise ConfigError(f"augment.rand_augment_magnitude must be at most 10, got {self.rand_augment_magnitude}.")


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run (official README, main_finetune.py)."""

    size: str = ""  # the checkpoint's own if empty; required to train from scratch
    epochs: int = 100
    warmup_epochs: float = 5.0
    batch_size: int = 1024
    base_lr: float = 5e-4
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    min_crop: float = 0.08
    layer_decay: float = 0.7  # learning rate of a layer as a share of the next layer's
    layer_decay_rule: str = "official"  # which layer norm, head and downsampling belong to: official, mae, mmpretrain
    drop_path: float = 0.1  # rate of the last block; rises linearly from 0
    head_std: float = 2e-5  # of the head's initial weights on a pretrained encoder
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    evaluate_every: int = 1  # epochs between evaluations on the validation images

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_decay_rule not in LAYER_DECAY_RULES:
            raise unknown("layer_decay_rule", self.layer_decay_rule, LAYER_DECAY_RULES)
        if not 0 < self.layer_decay <= 1 or not 0 <= self.drop_path < 1:
            raise ConfigError("layer_decay and drop_path must be shares between 0 and 1.")
        if self.evaluate_every < 1:
            raise ConfigError(f"evaluate_every must be at least 1, got {self.evaluate_every}.")
