"""Pretraining as a task: MixMIM's loss, pictures of reconstructions, k-NN accuracy along the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixmim_serve.config import Preprocessing, units_from_partner
from mixmim_serve.description import Description
from mixmim_serve.errors import ImageError
from mixmim_serve.model import MixMIM
from mixmim_serve.model.mixmim import random_units
from mixmim_serve.model.normalize import Normalize
from mixmim_serve.panel import draw_panel
from mixmim_serve.preprocess import normalize, preprocess
from mixmim_serve.sources import Source
from training.config import PretrainConfig
from training.data import Batch
from training.distributed import World
from training.evaluation.labelled import Labelled, evaluate_knn
from training.optim import parameter_groups
from training.start import SCRATCH
from training.task import Objective

PAIRS = 4  # image pairs in a picture of reconstructions


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
    """The task; `model` can be a variant of MixMIM (benchmarks/ablation.py)."""

    name = "pretrain"
    classes: tuple[str, ...] = ()
    start = SCRATCH

    def __init__(
        self,
        config: PretrainConfig,
        samples: Source | None,
        labelled: tuple[Labelled, Labelled] | None = None,
        model: type[MixMIM] = MixMIM,
    ) -> None:
        self.config, self.samples, self.labelled = config, samples, labelled
        torch.manual_seed(config.seed)
        self.model = model(config.arch)
        self.objective: Objective = PretrainObjective(self.model, config.mask_ratio)
        self.preprocessing = Preprocessing.evaluation(config.arch.image_size)
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """See `Task`."""
        self.device = device
        self.objective.to(device)
        self.normalize = Normalize(self.preprocessing).to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Task`."""
        return parameter_groups(self.model, self.config.weight_decay)

    def inputs(self, batch: Batch, mask_seed: int, seed: int) -> tuple[Tensor, ...]:
        """Normalised pixels, and one mask per step and process (as in the official code)."""
        generator = torch.Generator().manual_seed(mask_seed)
        mask = random_units(self.config.arch.units, self.config.mask_ratio, generator)
        return self.normalize(batch.pixels_on(self.device)), mask.to(self.device, non_blocking=True)

    def describe(self, provenance: Mapping[str, Any]) -> Description:
        """See `Task`."""
        return Description(self.config.arch, self.preprocessing, provenance=provenance)

    def evaluate(self, epochs: int, world: World) -> dict[str, float]:
        """k-NN accuracy on the labelled set, if one was given."""
        if self.labelled is None or not self.config.due(epochs, self.config.knn_every):
            return {}
        return evaluate_knn(self.model, self.preprocessing, *self.labelled, world, self.config.workers)

    def pictures(self, epochs: int) -> dict[str, Image.Image]:
        """Sample images, mixed in pairs and reconstructed, one row per pair."""
        if self.samples is None or not self.config.due(epochs, self.config.sample_every):
            return {}
        pixels = sample_pixels(self.samples, self.preprocessing)
        if len(pixels) < 2:
            return {}
        a, b = (torch.from_numpy(np.stack(half)).to(self.device) for half in (pixels[::2], pixels[1::2]))
        mask = random_units(self.config.arch.units, self.config.mask_ratio, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            output = self.model.reconstruct(a, b, mask.to(self.device))
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


def sample_pixels(source: Source, preprocessing: Preprocessing) -> list[np.ndarray]:
    """An even number of readable images, spread over the source: normalised float32 (3, size, size)."""
    samples: list[np.ndarray] = []
    count = len(source.keys)
    for index in range(0, count, max(1, count // (4 * PAIRS))):
        try:
            samples.append(normalize(preprocess(source.read(index), preprocessing), preprocessing))
        except ImageError:
            continue
        if len(samples) == 2 * PAIRS:
            break
    return samples[: len(samples) // 2 * 2]
