"""Normalisation on the device: the first step of every graph, of the torch engine and of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmim_serve.config import Preprocessing


class Normalize(nn.Module):
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W), bit-equal to `mixmim_serve.preprocess.normalize`.

    Folding the 255 into mean and std would save one operation and change the last bits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        """The network's input. The cast comes first because TensorRT can only cast bytes."""
        values: Tensor = (pixels_BHWC.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        return values
