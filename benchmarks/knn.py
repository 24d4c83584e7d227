"""k-nearest-neighbour accuracy of a bundle's embeddings on labelled folders: DATA/train/CLASS, DATA/val/CLASS.

    python -m benchmarks.knn tiny data/clothing10 --untrained

Cosine similarity, votes weighted by exp(similarity / 0.07) (the protocol of DINO, arXiv 2104.14294). `--untrained`
also measures the same network with random weights, exported and run in the same way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from mixmim_serve.bundle import WEIGHTS, open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.engines.hardware import processor
from mixmim_serve.extract.pipeline import run_files
from mixmim_serve.sources.names import list_images
from mixmim_serve.tasks import Floats
from training.evaluation.knn import knn_accuracy

NEIGHBOURS = (1, 5, 10, 20)


def main() -> None:
    """Print a JSON report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle folder, or tiny")
    parser.add_argument("data", type=Path, help="a folder with train/CLASS and val/CLASS")
    parser.add_argument("--untrained", action="store_true", help="also measure the untrained network")
    arguments = parser.parse_args()
    bundle = Path(arguments.bundle)
    if not bundle.exists():
        bundle = Path(__file__).parent.parent / "mixmim_serve" / "bundles" / arguments.bundle
    report = {
        "date": date.today().isoformat(),
        "hardware": processor(),
        "onnxruntime": onnxruntime.__version__,
        "data": str(arguments.data.name),
        "fingerprint": open_bundle(bundle).fingerprint,
        "trained": measure(open_engine(bundle, "onnx"), arguments.data),
    }
    if arguments.untrained:
        with tempfile.TemporaryDirectory() as folder:
            report["untrained"] = measure(open_engine(untrained_bundle(bundle, Path(folder))), arguments.data)
    print(json.dumps(report, indent=2))


def measure(engine: Engine, data: Path) -> dict[str, float]:
    """Top-1 accuracy in percent for each number of neighbours."""
    train, train_labels = embed_folder(engine, data / "train")
    val, val_labels = embed_folder(engine, data / "val")
    classes, numbers = np.unique(np.concatenate([train_labels, val_labels]), return_inverse=True)
    labels_N, labels_M = torch.from_numpy(numbers).split([len(train), len(val)])
    train_ND, val_MD = torch.from_numpy(train), torch.from_numpy(val)
    accuracies = knn_accuracy(train_ND, labels_N, val_MD, labels_M, len(classes), ks=NEIGHBOURS)
    counts = {"train": len(train), "val": len(val)}
    return {f"k={k}": round(accuracy.top1, 2) for k, accuracy in accuracies.items()} | counts


def embed_folder(engine: Engine, folder: Path) -> tuple[Floats, np.ndarray]:
    """Embeddings and class names of every readable image."""
    results = [result for result in run_files(engine, list_images(folder), ["embedding"]) if not result.error]
    vectors = np.stack([result.outputs["embedding"] for result in results])
    labels = np.array([result.path.relative_to(folder).parts[0] for result in results])
    return vectors, labels


def untrained_bundle(bundle: Path, folder: Path) -> Path:
    """The bundle's network with random weights (seed 0), exported in the same way."""
    from export.build import Options, export_bundle
    from mixmim_serve.model import build_model
    from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint

    description, _ = read_checkpoint(bundle / WEIGHTS)
    torch.manual_seed(0)
    weights = build_model(description.arch).state_dict()
    save_checkpoint(folder / "untrained.safetensors", weights, dataclasses.replace(description, provenance={}))
    options = Options(half_weights=True)
    return export_bundle(folder / "untrained.safetensors", folder / "bundle", options).bundle.path


if __name__ == "__main__":
    main()
