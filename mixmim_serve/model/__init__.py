"""The network in torch: encoder, pretraining model, checkpoints."""

from mixmim_serve.config import Architecture
from mixmim_serve.model.encoder import Encoder, EncoderOutput
from mixmim_serve.model.mixmim import MixMIM, PretrainingOutput, Reconstruction


def build_model(arch: Architecture) -> Encoder:
    """An untrained network: `MixMIM` if the architecture has a decoder, else `Encoder`."""
    return MixMIM(arch) if arch.decoder else Encoder(arch)


__all__ = ["Encoder", "EncoderOutput", "MixMIM", "PretrainingOutput", "Reconstruction", "build_model"]
