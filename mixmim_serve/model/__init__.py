"""The network in torch: encoder, pretraining model, checkpoints."""

from mixmim_serve.config import Architecture
from mixmim_serve.model.encoder import Encoder, EncoderOutput
from mixmim_serve.model.mixmim import MixMIM, PretrainingOutput, Reconstruction


def build_model(arch: Architecture) -> Encoder:
    """The network for an architecture: `MixMIM` where it has a decoder, else `Encoder`."""
    return MixMIM(arch) if arch.decoder else Encoder(arch)


__all__ = ["Encoder", "EncoderOutput", "MixMIM", "PretrainingOutput", "Reconstruction", "build_model"]
