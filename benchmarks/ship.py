"""Build the shipped bundle from a pretrained checkpoint, and measure all that the docs say of it.

    python -m benchmarks.ship CHECKPOINT DATA --out BUNDLE --report benchmarks/results/ship_tiny_HARDWARE.md

CHECKPOINT is a checkpoint or a bundle; a head inside it is dropped. DATA holds clothing10, caltech99, flowers5 and
grocery, each with `train` and the part that judges it. One head is fitted to each train part and written into the
bundle. Then: k-NN and a linear probe on the embeddings, each head's accuracy and calibration, the answers to the
photos of README and docs, size, and the time until a server is ready, by turns with the bundle that is shipped now.

The photos of README and docs must not be among those that anything was trained on: they are compared by content, as
bytes and as thumbnails, with the train parts and with every folder that `--seen` names.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import torch

from benchmarks import ship_report as report
from benchmarks.provenance import about, heading
from benchmarks.ship_report import NEIGHBOURS, Measured, Task, size_of
from benchmarks.shown_photos import answers, check_never_seen, shown_photos
from export.build import Options, export_bundle
from mixmim_serve.bundle import DEFAULT_BUNDLE, WEIGHTS, Bundle, check_target
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.files import atomic_path
from mixmim_serve.fitting.head import fit_to_features
from mixmim_serve.fitting.photos import Features, Photos, features_of, numbered
from mixmim_serve.heads import Heads, write_heads
from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint
from mixmim_serve.sources import open_source
from training.evaluation.confusion import accuracy
from training.evaluation.knn import knn_accuracy
from training.evaluation.linear import linear_probe

MAX_BYTES = 16_000_000  # of the bundle
STARTS = 3  # of each server
PACKAGES = ("torch", "onnxruntime", "scikit-learn", "numpy")

TASKS = (
    Task("garments", "clothing10", "test"),  # the default head, and the one for the photos of README and docs
    Task("objects", "caltech99", "val"),
    Task("flowers", "flowers5", "val"),
    Task("groceries", "grocery", "test"),
)


def main() -> None:
    """Build, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the bundle folder to write")
    parser.add_argument("--report", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--seen", type=Path, nargs="*", default=[], help="more photos that anything was trained on")
    parser.add_argument("--name", default="tiny")
    arguments = parser.parse_args()
    check_target(arguments.out, overwrite=False)
    seen = [*(arguments.data / task.folder / "train" for task in TASKS), *arguments.seen]
    nearest = check_never_seen(shown_photos(), seen)
    bundle = without_head(arguments.checkpoint, arguments.out, arguments.name)
    engine = open_engine(bundle, "onnx", "fp32")  # the same on every machine
    measured = [measure(engine, task, arguments.data) for task in TASKS]
    heads = Heads({each.head.name: each.head for each in measured}, measured[0].head.name)
    bundle = write_heads(bundle, heads)
    bundle.verify()
    assert size_of(bundle) <= MAX_BYTES, f"the bundle has {size_of(bundle):,} bytes, more than {MAX_BYTES:,}"
    starts = start_seconds({"this bundle": bundle.path, "the one shipped now": DEFAULT_BUNDLE})
    lines = heading(f"The shipped bundle, model fingerprint {bundle.fingerprint}", about("ship", None, PACKAGES))
    shown = list(answers(engine, measured[0].head))
    for part in (report.results(measured), report.shown(shown, nearest), report.sizes(bundle, starts)):
        lines += ["", *part]
    with atomic_path(arguments.report) as path:
        path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def without_head(checkpoint: Path, out: Path, name: str) -> Bundle:
    """Export a checkpoint, or the one inside a bundle, in half precision and without the head in the network."""
    path = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
    description, weights = read_checkpoint(path)
    description = dataclasses.replace(
        description,
        arch=dataclasses.replace(description.arch, num_classes=0),
        labels=(),
        provenance={key: value for key, value in description.provenance.items() if key != "head"},
    )
    with tempfile.TemporaryDirectory() as folder:
        headless = Path(folder) / "headless.safetensors"
        kept = {key: weight for key, weight in weights.items() if not key.startswith("head.")}
        save_checkpoint(headless, kept, description)
        return export_bundle(headless, out, Options(half_weights=True, name=name)).bundle


def measure(engine: Engine, task: Task, data: Path) -> Measured:
    """Fit a task's head, and judge it and the embeddings by photos that the fit did not see."""
    train = open_part(data / task.folder / "train")
    judge = open_part(data / task.folder / task.judged_by, train.classes)
    known, queries = features_of(engine, train, mirrored=True), features_of(engine, judge)
    shared = set(known.hashes) & set(queries.hashes)
    assert not shared, f"{len(shared)} photos of {task.folder} are in train and in {task.judged_by}"
    head = fit_to_features(task.head, train, known, queries)
    head.about["provenance"]["images"]["source"] = f"{task.folder}/train"  # nothing of this machine
    head.about["accuracy"]["judged_on"] = f"{len(queries.labels):,} photos of {task.folder}'s {task.judged_by} part"
    neighbours, linear = frozen(known, queries, len(train.classes))
    print(f"{task.head}: {head.about['accuracy']}, k-NN {neighbours}, linear {linear:.1f}", flush=True)
    return Measured(task, head, len(known.labels), len(queries.labels), neighbours, linear)


def open_part(folder: Path, classes: Sequence[str] = ()) -> Photos:
    """A labelled part."""
    return numbered(open_source(str(folder)), classes)


def frozen(known: Features, queries: Features, classes: int) -> tuple[dict[int, float], float]:
    """Top-1 of k-NN for each k, and of the linear probe, in percent, with the protocols of `mixmim probe`."""
    train, train_labels = torch.from_numpy(known.values[:, 0].copy()), torch.from_numpy(known.labels)
    query, labels = torch.from_numpy(queries.values[:, 0].copy()), torch.from_numpy(queries.labels)
    found = knn_accuracy(train, train_labels, query, labels, classes, ks=NEIGHBOURS)
    probe = linear_probe(train, train_labels, classes)
    return {k: each.top1 for k, each in found.items()}, accuracy(probe.scores(query), labels).top1


def start_seconds(bundles: Mapping[str, Path]) -> dict[str, float]:
    """Median seconds until `mixmim serve` is ready, by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in bundles}
    for _ in range(STARTS + 1):
        for name, path in bundles.items():
            seconds[name].append(_start(path))
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first has certificates to write


def _start(bundle: Path) -> float:
    """Seconds until a server of this bundle is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", "from mixmim_serve.cli import main; main()", "serve", str(bundle)]
    began = time.perf_counter()
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            if server.poll() is not None or time.perf_counter() - began > 120:
                raise SystemExit(f"{bundle} cannot be served")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    return time.perf_counter() - began
            except httpx.RequestError:
                time.sleep(0.02)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
