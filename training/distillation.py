"""Distillation as a task: a small network learns the features of a larger, frozen one, the teacher.

Both see the same crop, each at its own input size and scale of pixels (arXiv 2106.05237 calls that a consistent
teacher). What is matched: the pooled embedding, and the feature maps of stages 3 and 4, the student's projected
linearly to the teacher's channels (the hints of FitNets, arXiv 1412.6550). The teacher's channels are standardised with
their mean and deviation over some of the images, so that none outweighs the others; each part of the loss is then the
share of the teacher's variance that the student does not explain: 1 for one that always gives the mean, 0 for an equal
one. (arXiv 2205.14141 whitens the targets for the same reason, but each token over its channels.)

The teacher stays outside of the objective: it has no gradients, no optimiser, no place in a checkpoint, and is not
compiled.

Shape suffixes as in `model/encoder.py`, and E for the teacher's channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mixmim_serve.bundle import CONFIG, WEIGHTS, open_bundle
from mixmim_serve.config import size_name, units_from_partner
from mixmim_serve.errors import CheckpointError
from mixmim_serve.model import Encoder, EncoderOutput, MixMIM, build_model
from mixmim_serve.model.mixmim import random_units
from mixmim_serve.model.normalize import Normalize
from mixmim_serve.runs import is_run
from mixmim_serve.sources import Source
from training.config import DistillConfig
from training.data import Batch
from training.evaluation.labelled import Labelled
from training.pretraining import Pretraining, sample_pixels
from training.start import SCRATCH, Start, read_start
from training.task import MeanReadings

PARTS = ("embedding", "stage3", "stage4")
SAMPLES = 128  # images that the teacher's means and deviations are taken from
SAMPLES_AT_ONCE = 16
DEAD = 0.01  # of the mean variance, added to each channel's: noise in nearly constant channels is not enlarged


class DistillObjective(MeanReadings):
    """The mismatch of the student's features and the teacher's, and with `mixmim_weight` MixMIM's loss beside it.

    MixMIM's loss takes a second pass of the student: the first sees whole photos, as it will after training, and a
    mixture has no embedding of a whole photo.
    """

    def __init__(self, model: Encoder, teacher: Encoder, config: DistillConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.larger_size = max(model.arch.image_size, teacher.arch.image_size)
        self.partner_units = units_from_partner(model.arch.units, config.mask_ratio)
        own, theirs = widths(model), widths(teacher)
        self.projections = nn.ModuleDict({part: nn.Linear(own[part], theirs[part]) for part in PARTS})
        for weight in self.projections.parameters():
            nn.init.zeros_(weight)  # a run begins with the teacher's mean, whatever the untrained features' scale
        for part in PARTS:
            self.register_buffer(f"{part}_mean", torch.zeros(theirs[part]))
            self.register_buffer(f"{part}_scale", torch.ones(theirs[part]))
        self.log_means_of([f"distill_{part}" for part in PARTS] + ["mixmim_loss"] * bool(config.mixmim_weight))

    @property
    def crop_size(self) -> int:
        """The larger of both input sizes; the other network sees the crop reduced."""
        return self.larger_size

    def forward(self, pixels_BCHW: Tensor, from_partner_MU: Tensor, *targets: Tensor) -> Tensor:
        """The loss, a scalar; `targets` are the teacher's features in the order of `PARTS`."""
        own = matched(self.model(pixels_BCHW))
        losses = [self.mismatch(part, own[part], target) for part, target in zip(PARTS, targets, strict=True)]
        loss = self.config.match_embedding * losses[0] + self.config.match_stages * (losses[1] + losses[2]) / 2
        if self.config.mixmim_weight:
            model = cast(MixMIM, self.model)
            losses.append(model.pretrain(pixels_BCHW, from_partner_MU, self.partner_units).loss)
            loss = loss + self.config.mixmim_weight * losses[-1]
        self.note(losses)
        return loss

    def mismatch(self, part: str, own: Tensor, target: Tensor) -> Tensor:
        """Mean square of the student's error in standardised channels; both (B, D) and (B, E), or with H, W behind.

        Maps of different grids are averaged over areas of the coarser one. Float32, even under autocast.
        """
        mean_E, scale_E = self.get_buffer(f"{part}_mean"), self.get_buffer(f"{part}_scale")
        if own.dim() == 4:
            grid = min(own.shape[-1], target.shape[-1])
            own, target = (area_average(each.float(), grid).permute(0, 2, 3, 1) for each in (own, target))
        predicted = self.projections[part](own).float()
        mismatch: Tensor = (predicted - (target.float() - mean_E) / scale_E).square().mean()
        return mismatch

    def standardise(self, features: Mapping[str, Tensor]) -> None:
        """Take the channels' means and deviations from features (N, E) of the teacher, by part."""
        for part, values_NE in features.items():
            variance_E, mean_E = torch.var_mean(values_NE, dim=0, correction=0)
            # A teacher of constant features has no variance at all.
            scale_E = (variance_E + DEAD * variance_E.mean()).sqrt().clamp_min(1e-6)
            self.get_buffer(f"{part}_mean").copy_(mean_E)
            self.get_buffer(f"{part}_scale").copy_(scale_E)

    def resume_state(self) -> dict[str, Any]:
        """See `Objective`: projections, means and deviations, sums for the log."""
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}
        return own | {"sums": self.sums}

    def load_resume_state(self, state: Mapping[str, Any]) -> None:
        """See `Objective`."""
        self.load_state_dict({**self.state_dict(), **{name: state[name] for name in state if name != "sums"}})
        self.sums.copy_(state["sums"])


class Distillation(Pretraining):
    """The task: a student from random weights, a frozen teacher; else as in pretraining.

    Raises:
        ConfigError: when the configuration names no student.
        CheckpointError: when the teacher lacks weights.
    """

    name = "distill"

    def __init__(
        self,
        config: DistillConfig,
        samples: Source | None,
        teacher: Start,
        labelled: tuple[Labelled, Labelled] | None = None,
    ) -> None:
        self.teacher, self.teacher_preprocessing = frozen(teacher), teacher.description.preprocessing
        super().__init__(config, samples, labelled, cast(type[MixMIM], build_model))
        objective = DistillObjective(self.model, self.teacher, config)
        self.start = f"{SCRATCH}, teacher {teacher.identity}"
        size = size_name(teacher.description.arch)
        about = {"path": str(teacher.path.absolute()), "size": size, "image_size": self.teacher.arch.image_size}
        self.origin = {"teacher": teacher.origin() | about}
        if samples is not None:
            objective.standardise(self.teacher_features(samples))
        self.objective = objective
        self.to(torch.device("cpu"))

    @property
    def loaded(self) -> str:
        """In words: the teacher."""
        about = self.origin["teacher"]
        return (
            f"learns from {about['name']}: {about['size']} at {about['image_size']} px, "
            f"{self.teacher.arch.embedding_size} numbers in its embedding"
        )

    def to(self, device: torch.device) -> None:
        """See `Task`."""
        super().to(device)
        self.teacher.to(device)
        self.teacher_normalize = Normalize(self.teacher_preprocessing).to(device)

    def inputs(self, batch: Batch, mask_seed: int, seed: int) -> tuple[Tensor, ...]:
        """The student's pixels, a mask for MixMIM's loss, and the teacher's features of the same crops."""
        generator = torch.Generator().manual_seed(mask_seed)
        mask = random_units(self.arch.units, self.config.mask_ratio, generator)
        pixels_BHWC = batch.pixels_on(self.device)
        own_BCHW = self.normalize(reduced(pixels_BHWC, self.arch.image_size))
        theirs_BCHW = self.teacher_normalize(reduced(pixels_BHWC, self.teacher.arch.image_size))
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            features = matched(self.teacher(theirs_BCHW))
        return own_BCHW, mask.to(self.device, non_blocking=True), *(features[part].float() for part in PARTS)

    def reconstructions(self, samples: Source) -> dict[str, Image.Image]:
        """As in pretraining; {} without MixMIM's loss, which alone trains a decoder."""
        return super().reconstructions(samples) if self.arch.decoder else {}

    def teacher_features(self, source: Source) -> dict[str, Tensor]:
        """The teacher's features of images spread over the source, one row per image or token, by part."""
        pixels = sample_pixels(source, self.teacher_preprocessing, SAMPLES)
        rows: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for first in range(0, len(pixels), SAMPLES_AT_ONCE):
            pixels_BCHW = torch.from_numpy(np.stack(pixels[first : first + SAMPLES_AT_ONCE]))
            with torch.no_grad():
                features = matched(self.teacher(pixels_BCHW))
            for part, values in features.items():
                rows[part].append(values.flatten(2).transpose(1, 2).flatten(0, 1) if values.dim() == 4 else values)
        return {part: torch.cat(values) for part, values in rows.items() if values}


def matched(output: EncoderOutput) -> dict[str, Tensor]:
    """What is compared, in the order of `PARTS`: embedding (B, D), maps of stages 3 and 4 (B, D, H, W)."""
    return dict(zip(PARTS, (output.embedding_BD, *output.stages_BDHW[2:]), strict=True))


def widths(encoder: Encoder) -> dict[str, int]:
    """The channels of what is compared, found with an empty image: families of networks count them differently."""
    was_training, size = encoder.training, encoder.arch.image_size
    with torch.no_grad():
        features = matched(encoder.eval()(torch.zeros(1, 3, size, size)))
    encoder.train(was_training)
    return {part: values.shape[1] for part, values in features.items()}


def frozen(teacher: Start) -> Encoder:
    """The teacher's encoder without decoder and head, in evaluation mode and without gradients.

    Raises:
        CheckpointError: when it lacks weights.
    """
    arch = dataclasses.replace(teacher.description.arch, decoder=None, num_classes=0)
    encoder = build_model(arch)
    encoder.load_state_dict(teacher.weights_for(arch))
    return encoder.eval().requires_grad_(False)


def reduced(pixels_BHWC: Tensor, size: int) -> Tensor:
    """The same pictures (B, size, size, 3), bicubic and antialiased as the loader's; unchanged if they have that size.

    A reduced picture has whole values in [0, 255] as well, but is float32.
    """
    if pixels_BHWC.shape[1] == size:
        return pixels_BHWC
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float()
    resized_BCHW = F.interpolate(pixels_BCHW, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized_BCHW.round().clamp(0, 255).permute(0, 2, 3, 1)


def area_average(map_BDHW: Tensor, grid: int) -> Tensor:
    """The map averaged over areas to (B, D, grid, grid), which is not finer; it invents no detail."""
    return map_BDHW if map_BDHW.shape[-1] == grid else F.adaptive_avg_pool2d(map_BDHW, grid)


def read_teacher(path: Path) -> Start:
    """A checkpoint, a bundle with its weights, or a finished run. A bundle is verified.

    Raises:
        CheckpointError: when there are no weights, or they are damaged.
        BundleError: when the bundle was altered: its fingerprint is not that of its weights.
    """
    if path.is_dir() and (path / CONFIG).is_file() and not is_run(path):
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(
                f"{path} is a bundle without {WEIGHTS}, and a teacher needs its weights: export it again from its "
                "checkpoint, or give that checkpoint."
            )
        open_bundle(path).verify()
    return read_start(path)
