"""Fine-tuning as a task: a classifier from a pretrained encoder, or from scratch as a baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mixmim_serve.config import Architecture, Preprocessing, architecture
from mixmim_serve.description import Description
from mixmim_serve.errors import ConfigError
from mixmim_serve.model import Encoder
from mixmim_serve.model.blocks import Block
from training.config import FinetuneConfig
from training.data import Batch
from training.device_augment import DeviceAugment
from training.distributed import World
from training.evaluation.labelled import Labelled, evaluate_classifier
from training.optim import parameter_groups
from training.start import SCRATCH, Start
from training.task import Objective


class FinetuneObjective(Objective):
    """Cross-entropy with soft targets."""

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_BCHW: Tensor, targets_BC: Tensor) -> Tensor:
        """The loss, a scalar; float32 even under autocast."""
        logits_BC = self.model(pixels_BCHW).logits_BC
        return F.cross_entropy(logits_BC.float(), targets_BC)


class Finetuning:
    """The task. The checkpoint stores the class names, so it can be exported and served at once.

    Raises:
        ConfigError: when `start` has another size than requested, or neither a start nor a size is given.
        CheckpointError: when `start` lacks weights.
    """

    name = "finetune"

    def __init__(
        self, config: FinetuneConfig, classes: tuple[str, ...], start: Start | None, val: Labelled | None
    ) -> None:
        self.config, self.classes, self.val = config, classes, val
        self.start = start.identity if start else SCRATCH
        self.origin: Mapping[str, Any] = start.origin() if start else {}
        torch.manual_seed(config.seed)
        self.arch = classifier(config, len(classes), start)
        self.objective: Objective = FinetuneObjective(build_classifier(self.arch, config, start))
        self.preprocessing = Preprocessing.evaluation(self.arch.image_size)
        if start:
            original = start.description.preprocessing
            self.preprocessing = dataclasses.replace(self.preprocessing, mean=original.mean, std=original.std)
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """See `Task`."""
        self.device = device
        self.objective.to(device)
        self.augment = DeviceAugment(self.config.augment, self.preprocessing, len(self.classes), device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups with layer decay."""
        config = self.config
        return parameter_groups(
            self.objective.model, config.weight_decay, config.layer_decay, config.layer_decay_rule, self.arch.depths
        )

    def inputs(self, batch: Batch, mask_seed: int, seed: int) -> tuple[Tensor, ...]:
        """Augmented pixels and soft targets."""
        return self.augment(batch.pixels_on(self.device), batch.labels_B, seed)

    def describe(self, provenance: Mapping[str, Any]) -> Description:
        """The description with the class names."""
        return Description(self.arch, self.preprocessing, self.classes, provenance)

    def evaluate(self, epochs: int, world: World) -> dict[str, float]:
        """Top-1 and top-5 on the validation images; not of the untrained head."""
        if self.val is None or not epochs or not self.config.due(epochs, self.config.evaluate_every):
            return {}
        result = evaluate_classifier(self.objective.model, self.preprocessing, self.val, world, self.config.workers)
        return {"val_top1": result.accuracy.top1, "val_top5": result.accuracy.top5}

    def pictures(self, epochs: int) -> dict[str, Image.Image]:
        """No pictures: `mixmim evaluate` draws the confusion matrix."""
        return {}


def classifier(config: FinetuneConfig, classes: int, start: Start | None) -> Architecture:
    """Architecture of the start's encoder, or of a named size, with a head and at the run's input size.

    Raises:
        ConfigError: when neither is given, or the start has another size than requested.
    """
    if start is None and not config.size:
        raise ConfigError("training from scratch needs a size: add --set size=tiny, or another size.")
    arch = start.description.arch if start else architecture(config.size)
    if start:
        start.check_size(config.size)
    arch = arch.resized(config.image_size, config.windows)
    return dataclasses.replace(arch, decoder=None, num_classes=classes)


def build_classifier(arch: Architecture, config: FinetuneConfig, start: Start | None) -> Encoder:
    """A pretrained encoder, resized to the input size if needed, or an untrained one; new head, stochastic depth."""
    model = Encoder(arch)
    if start:
        model.load_state_dict(start.weights_for(dataclasses.replace(arch, num_classes=0)), strict=False)
        # A near-zero head spares the pretrained encoder the noise of random weights. An untrained encoder needs that
        # noise: without it `tiny` predicts the class frequencies for its first 470 steps (docs/results.md).
        nn.init.trunc_normal_(model.head.weight, std=config.head_std)
    set_drop_path(model, config.drop_path)
    return model


def set_drop_path(model: Encoder, rate: float) -> None:
    """Set the stochastic-depth rate, rising linearly from 0 in the first block to `rate` in the last."""
    blocks = [module for module in model.layers.modules() if isinstance(module, Block)]
    for number, block in enumerate(blocks):
        block.drop_path = rate * number / max(1, len(blocks) - 1)
