"""Every engine on this machine's GPU: exports bundles of `tiny` and `base`, then runs `mixmim bench`.

    python -m benchmarks.engines_gpu [--base CHECKPOINT]

`tiny` is the shipped model; `base` has random weights unless a checkpoint is given. Writes JSON and charts into
benchmarks/results, named after the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from export.build import Options, export_bundle
from mixmim_serve.bundle import DEFAULT_BUNDLE, WEIGHTS, Bundle
from mixmim_serve.cli.bench import bench
from mixmim_serve.config import Preprocessing, architecture
from mixmim_serve.description import Description
from mixmim_serve.engines.hardware import gpu_name
from mixmim_serve.engines.tensorrt_library import MODULES
from mixmim_serve.errors import MixMIMError
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import save_checkpoint

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("fp32", "fp16")


def random_checkpoint(path: Path, size: str = "base") -> Path:
    """A checkpoint with random weights, which run as fast as trained ones."""
    torch.manual_seed(0)
    arch = architecture(size)
    description = Description(
        arch, Preprocessing.evaluation(arch.image_size), (), {"made_by": "benchmarks.engines_gpu"}
    )
    save_checkpoint(path, build_model(arch).state_dict(), description)
    return path


def runtimes_here() -> list[str]:
    """Each installed TensorRT runtime that compiles the shipped model for this GPU."""
    runtimes = []
    for runtime in MODULES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                export_bundle(DEFAULT_BUNDLE / WEIGHTS, Path(folder) / "tiny", Options(("fp16",), (runtime,)))
            except MixMIMError as error:
                print(f"no {runtime}: {error}")
            else:
                runtimes.append(runtime)
    return runtimes


def full_bundle(checkpoint: Path, target: Path, runtimes: Sequence[str]) -> Bundle:
    """A bundle with both precisions, and engines for these runtimes."""
    return export_bundle(checkpoint, target, Options(PRECISIONS, ("onnx", *runtimes))).bundle


def main() -> None:
    """Export, benchmark, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a checkpoint to measure as base")
    options = parser.parse_args()
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-")
    if not gpu:
        parser.error("the CUDA driver finds no GPU")
    month = datetime.date.today().strftime("%Y%m")
    runtimes = runtimes_here()
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or random_checkpoint(Path(folder) / "base.safetensors")
        for name, checkpoint in (("tiny", DEFAULT_BUNDLE / WEIGHTS), ("base", base)):
            bundle = full_bundle(checkpoint, Path(folder) / name, runtimes)
            bench(bundle.path, [1, 8, 32], 3.0, 2, RESULTS / f"bench_{name}_{gpu}_{month}.json")


if __name__ == "__main__":
    main()
