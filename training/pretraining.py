"""Pretraining as a task: MixMIM's loss, pictures of reconstructions, k-NN accuracy along the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixmim_serve.config import Architecture, DecoderConfig, Preprocessing, architecture, size_name, units_from_partner
from mixmim_serve.description import Description
from mixmim_serve.errors import ImageError
from mixmim_serve.model import MixMIM
from mixmim_serve.model.mixmim import random_units
from mixmim_serve.model.normalize import Normalize
from mixmim_serve.panel import draw_panel
from mixmim_serve.preprocess import normalize, preprocess
from mixmim_serve.sources import Source
from training.config import MORE_UNITS, PretrainConfig
from training.data import Batch
from training.distributed import World
from training.evaluation.labelled import Labelled, evaluate_knn
from training.evaluation.monitor import Monitor
from training.feature_targets import FeatureObjective
from training.optim import parameter_groups
from training.start import SCRATCH, Start
from training.task import Objective

PAIRS = 4  # image pairs in a picture of reconstructions
MEASUREMENTS = 100  # of the embeddings in a run, about: with few images an epoch takes seconds
# Settings that the paper does not have.
BEYOND = {"attention", "pixel_weight", "feature_weight", "feature_blocks", "feature_norm", "embedding_weight"}
BEYOND |= {"embedding_crops", "ema_momentum", "ema_final_momentum", "final_weights"}


class PretrainObjective(Objective):
    """The reconstruction loss."""

    def __init__(self, model: MixMIM, mask_ratio: float) -> None:
        super().__init__()
        self.model: MixMIM = model
        self.partner_units = units_from_partner(model.arch.units, mask_ratio)

    def forward(self, pixels_BCHW: Tensor, from_partner_MU: Tensor) -> Tensor:
        """The loss, a scalar."""
        return self.model.pretrain(pixels_BCHW, from_partner_MU, self.partner_units).loss


class Pretraining:
    """The task, from random weights or from `start`; `model` can be a variant of MixMIM (benchmarks/ablation.py).

    Raises:
        ConfigError: when `start` does not fit the configuration, or neither a start nor a size is given.
        CheckpointError: when `start` lacks weights.
    """

    name = "pretrain"
    classes: tuple[str, ...] = ()

    def __init__(
        self,
        config: PretrainConfig,
        samples: Source | None,
        labelled: tuple[Labelled, Labelled] | None = None,
        model: type[MixMIM] = MixMIM,
        *,
        start: Start | None = None,
        new_decoder: bool = False,
    ) -> None:
        self.config, self.samples, self.labelled = config, samples, labelled
        torch.manual_seed(config.seed)
        self.arch = continued(config, start) if start else config.arch
        self.model = model(self.arch)
        self.preprocessing = Preprocessing.evaluation(self.arch.image_size)
        self.start: str = SCRATCH
        self.origin: Mapping[str, Any] = {}
        if start:
            self.load(start, new_decoder)
        self.model.attends_across = config.attention == "across"
        self.objective: Objective = (
            FeatureObjective(self.model, config)
            if config.beyond_pixels
            else PretrainObjective(self.model, config.mask_ratio)
        )
        self.monitor: Monitor | None = None
        if samples is not None and config.monitor:
            self.monitor = Monitor(samples, self.preprocessing, config.monitor)
        self.to(torch.device("cpu"))

    def load(self, start: Start, new_decoder: bool) -> None:
        """Take the checkpoint's encoder, its decoder if it has one that is wanted, and its scale of pixels.

        Raises:
            CheckpointError: when it lacks weights.
        """
        whole = start.description.arch.decoder is not None and not new_decoder
        taken = dataclasses.replace(self.arch, decoder=self.arch.decoder if whole else None)
        self.model.load_state_dict(start.weights_for(taken), strict=whole)
        original = start.description.preprocessing
        self.preprocessing = dataclasses.replace(self.preprocessing, mean=original.mean, std=original.std)
        parts = "encoder and decoder" if whole else "encoder"
        self.start = start.identity if whole else f"{start.identity} (encoder)"
        own = start.description.arch
        without = {"class_token": "left out"} if own.class_token else {}
        self.origin = start.origin() | {"taken": parts, "image_size": own.image_size} | without

    @property
    def loaded(self) -> str:
        """In words: what was taken from the checkpoint that the run starts from; empty without one."""
        if not self.origin:
            return ""
        line = f"starts from {self.origin['name']}: {self.origin['taken']}"
        if self.origin["taken"] == "encoder":
            line += ", with a new decoder"
        if self.origin.get("class_token"):
            line += ", without its class token"
        if self.origin["image_size"] != self.arch.image_size:
            line += f", resized from {self.origin['image_size']} to {self.arch.image_size} px"
        return line

    def to(self, device: torch.device) -> None:
        """See `Task`."""
        self.device = device
        self.objective.to(device)
        self.normalize = Normalize(self.preprocessing).to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Task`."""
        return parameter_groups(self.objective, self.config.weight_decay)

    def inputs(self, batch: Batch, mask_seed: int, seed: int) -> tuple[Tensor, ...]:
        """Normalised pixels, and one mask per step and process (as in the official code)."""
        generator = torch.Generator().manual_seed(mask_seed)
        mask = random_units(self.arch.units, self.config.mask_ratio, generator)
        return self.normalize(batch.pixels_on(self.device)), mask.to(self.device, non_blocking=True)

    def describe(self, provenance: Mapping[str, Any]) -> Description:
        """See `Task`."""
        return Description(self.arch, self.preprocessing, provenance={**provenance, **method(self.config)})

    def evaluate(self, epochs: int, world: World) -> dict[str, float]:
        """k-NN accuracy on the labelled set, if one was given, and measures of fixed photos (`Monitor`).

        Before the first epoch too: what the run starts from is what it has to beat.
        """
        if not (epochs or self.monitor):
            return {}
        metrics = {}
        if self.labelled is not None and self.config.due(epochs, self.config.knn_every):
            metrics = evaluate_knn(self.objective.kept, self.preprocessing, *self.labelled, world, self.config.workers)
        # The first process alone, unless the network is split over all: then each has to take part in its forward pass.
        if self.monitor and (world.main or self.config.shard) and self.measures(epochs):
            metrics |= self.monitor.measure(self.objective.kept, self.normalize, self.device, epochs)
        return metrics

    def measures(self, epochs: int) -> bool:
        """Whether the monitor measures after so many epochs: about `MEASUREMENTS` times, and at kept checkpoints."""
        every = -(-self.config.epochs // MEASUREMENTS)
        return self.config.due(epochs, every) or self.config.due(epochs, self.config.keep_every)

    def pictures(self, epochs: int) -> dict[str, Image.Image]:
        """Reconstructions of sample images, and the nearest neighbours of fixed photos at each kept checkpoint."""
        pictures: dict[str, Image.Image] = {}
        if self.samples is not None and epochs and self.config.due(epochs, self.config.sample_every):
            pictures |= self.reconstructions(self.samples)
        if self.monitor and self.config.due(epochs, self.config.keep_every):
            neighbours = self.monitor.neighbours(epochs)
            pictures |= {"neighbours": neighbours} if neighbours else {}
        return pictures

    def reconstructions(self, samples: Source) -> dict[str, Image.Image]:
        """Sample images, mixed in pairs and reconstructed, one row per pair; {} without a readable pair."""
        pixels = sample_pixels(samples, self.preprocessing)
        if len(pixels) < 2:
            return {}
        a, b = (torch.from_numpy(np.stack(half)).to(self.device) for half in (pixels[::2], pixels[1::2]))
        mask = random_units(self.arch.units, self.config.mask_ratio, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            output = cast(MixMIM, self.objective.kept).reconstruct(a, b, mask.to(self.device))
        arrays = {
            "image_a": a,
            "image_b": b,
            "mixed": output.mixed,
            "reconstruction_a": output.image_a,
            "reconstruction_b": output.image_b,
        }
        rows = [
            draw_panel({name: values[row].float().cpu().numpy() for name, values in arrays.items()}, self.preprocessing)
            for row in range(len(a))
        ]
        picture = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
        for number, row in enumerate(rows):
            picture.paste(row, (0, number * row.height))
        return {"reconstructions": picture}


def method(config: PretrainConfig) -> dict[str, Any]:
    """For provenance: the settings in which a run's method is not the paper's; {} if there are none."""
    paper = dataclasses.asdict(PretrainConfig())
    changed = {name: value for name, value in dataclasses.asdict(config).items() if name in BEYOND}
    changed = {name: value for name, value in changed.items() if value != paper[name]}
    return {"method": changed} if changed else {}


def continued(config: PretrainConfig, start: Start) -> Architecture:
    """The checkpoint's network at the run's input size, with its own decoder or a new one.

    Without its head, and without a class token, which would see both images.

    Raises:
        ConfigError: when the checkpoint has another size than requested, or too few units for the mask.
    """
    start.check_size(config.size)
    arch = start.description.arch.resized(config.image_size, config.windows)
    decoder, name = arch.decoder, size_name(arch).partition("@")[0]
    if decoder is None:
        decoder = DecoderConfig() if name == "custom" else architecture(name).decoder
    units_from_partner(arch.units, config.mask_ratio, MORE_UNITS)
    return dataclasses.replace(arch, decoder=decoder, num_classes=0, class_token=False)


def sample_pixels(source: Source, preprocessing: Preprocessing, wanted: int = 2 * PAIRS) -> list[np.ndarray]:
    """Up to `wanted`, an even number of readable images, spread over the source: normalised (3, size, size)."""
    samples: list[np.ndarray] = []
    count = len(source.keys)
    for index in range(0, count, max(1, count // (2 * wanted))):
        try:
            samples.append(normalize(preprocess(source.read(index), preprocessing), preprocessing))
        except ImageError:
            continue
        if len(samples) == wanted:
            break
    return samples[: len(samples) // 2 * 2]
