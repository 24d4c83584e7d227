"""Short pretraining runs of `tiny-cpu`, each with one setting changed, judged by nearest neighbours.

    python -m benchmarks.search photos data --out runs/search --epochs 5
    python -m benchmarks.search photos data --out runs/search --epochs 5 --seeds 1 2 --only "as it is" "rate 4e-3"

Every run sees the same images in the same order for as many epochs; `images` of other sizes and other batches change
steps or time. The measure is the top-1 of k-NN (k = 10, cosine, DINO's weights) on the val parts of clothing10 and
caltech99 under DATA, with their train parts as neighbours: the test parts stay unseen. `--only NAME` runs some of
them, `--seeds 0 1 2` each with several seeds. Finished runs are skipped, interrupted ones resume; the table is
written to OUT/results.md and OUT/results.json after each.
"""

from __future__ import annotations

import benchmarks.sleeping  # noqa: F401

# isort: split
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import record
from benchmarks.runs import VAL, figures, folder_of, frozen, parser, trained, write_table
from mixmim_serve.config import Architecture
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.pretraining import Pretraining
from training.recipes import tiny_cpu


@dataclass(frozen=True)
class DecoderDepth(PretrainConfig):
    """A run whose decoder has another number of blocks."""

    decoder_depth: int = 4

    @property
    def arch(self) -> Architecture:
        """The network to train."""
        arch = super().arch
        if arch.decoder is None:
            raise ValueError(f"{self.size} has no decoder.")
        return dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, depth=self.decoder_depth))


# What each run changes of `tiny-cpu`.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rate 1e-3": {"base_lr": 1e-3},
    "rate 4e-3": {"base_lr": 4e-3},
    "batch 64": {"batch_size": 64},
    "batch 256": {"batch_size": 256},
    "mask 0.4": {"mask_ratio": 0.4},
    "mask 0.6": {"mask_ratio": 0.6},
    "crop 0.08": {"min_crop": 0.08},
    "crop 0.4": {"min_crop": 0.4},
    "decoder of 2": {"decoder_depth": 2},
    "decoder of 1": {"decoder_depth": 1},
    "160 px": {"image_size": 160},
}


def main() -> None:
    """Run what is missing, then write the table."""
    arguments = parser(__doc__, VARIANTS, epochs=5).parse_args()
    source = open_source(arguments.images)
    for seed in arguments.seeds or [0]:
        for name in arguments.only:
            run = folder_of(arguments.out, name, seed)
            trained(Pretraining(configuration(name, arguments.epochs, seed), source), source, run)
            record(run / "judged.json", judge, run, arguments.data)
            write_table(arguments.out, VARIANTS, "changed")


def configuration(name: str, epochs: int, seed: int) -> PretrainConfig:
    """The recipe with one setting changed."""
    changes = VARIANTS[name]
    base = dataclasses.asdict(tiny_cpu().with_epochs(epochs)) | {"seed": seed, "keep_every": 1000}
    return (DecoderDepth if "decoder_depth" in changes else PretrainConfig)(**base | changes)


def judge(run: Path, data: Path) -> dict[str, float]:
    """Top-1 in percent on each set, the last losses, and images/s."""
    return frozen(run / "final.safetensors", data, VAL) | figures(run)


if __name__ == "__main__":
    main()
