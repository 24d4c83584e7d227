"""How batch size and the other images of a batch change an embedding, and how many batch sizes change memory.

    python -m benchmarks.batch_sizes tiny --output benchmarks/results/batch_sizes_epyc_202611.json

Each engine and setting runs in its own process. Embeddings are of real photos, shifted to get enough of them. Memory is
the resident set after calls with 1 to 32 images in random order, as in a server; speed covers all these sizes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from mixmim_serve.cli.common import bundle_path
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.engines.buckets import run_in_buckets
from mixmim_serve.engines.hardware import processor
from mixmim_serve.errors import MixMIMError
from mixmim_serve.preprocess import preprocess

ENGINES = (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
LARGEST = 32
CALLS = 300
ROUNDS = 6
TRIES = 6  # other batches and rows, for each size
EXAMPLES = Path(__file__).parent.parent / "examples"

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def embedder(engine: Engine, bucketed: bool) -> Embed:
    """A function from images to embeddings, in batches of any size or in buckets."""

    def direct(inputs: Any) -> dict[str, NDArray[Any]]:
        return engine.run("encoder", inputs, ["embedding"])

    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        inputs = {"pixels": pixels}
        return (run_in_buckets(direct, inputs) if bucketed else direct(inputs))["embedding"]

    return embed


def photos(engine: Engine, count: int) -> NDArray[np.uint8]:
    """Distinct images: the examples, shifted."""
    paths = sorted(EXAMPLES.glob("*.jpg"))
    originals = [preprocess(path.read_bytes(), engine.bundle.description.preprocessing) for path in paths]
    shifted = [np.roll(originals[n % len(paths)], 5 * (n // len(paths)), axis=1) for n in range(count)]
    return np.stack(shifted)


def equality(embed: Embed, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Largest differences: to the image alone, by size; and within one size, in other batches and rows."""
    alone = np.concatenate([embed(image[None]) for image in images[:LARGEST]])
    others, random = images[LARGEST:], np.random.default_rng(0)
    to_alone, within = [], []
    for size in range(1, LARGEST + 1):
        first = embed(images[:size])
        to_alone.append(float(np.abs(first - alone[:size]).max()))
        worst = 0.0
        for _ in range(TRIES):
            batch = others[random.choice(len(others), size)]
            row = random.integers(size)
            batch[row] = images[0]
            worst = max(worst, float(np.abs(embed(batch)[row] - first[0]).max()))
        within.append(worst)
    return {"largest_value": float(np.abs(alone).max()), "to_alone": to_alone, "within_size": within}


def memory(embed: Embed, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Memory in MB after opening, and after some numbers of calls."""
    process = psutil.Process()
    embed(images[:1])
    after = {"opened": process.memory_info().rss / 1e6}
    for number, size in enumerate(np.random.default_rng(0).integers(1, LARGEST + 1, CALLS), 1):
        embed(images[:size])
        if number in (CALLS // 10, CALLS // 3, CALLS):
            after[f"{number} calls"] = process.memory_info().rss / 1e6
    return {"mb": after}


def speed(engine: Engine, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Images/s when all sizes are equally frequent and warm: best call of each size, taking turns."""
    ways = {"as it comes": embedder(engine, False), "bucketed": embedder(engine, True)}
    best = {name: np.full(LARGEST, np.inf) for name in ways}
    random = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for index in random.permutation(LARGEST):
            for name, embed in ways.items():
                began = time.perf_counter()
                embed(images[: index + 1])
                best[name][index] = min(best[name][index], time.perf_counter() - began)
    total = LARGEST * (LARGEST + 1) / 2
    return {"images_per_second": {name: float(total / seconds.sum()) for name, seconds in best.items()}}


def measure(what: str, bundle: Path, kind: str, precision: str) -> dict[str, Any]:
    """One measurement, in its own process."""
    engine = open_engine(bundle, kind, precision)
    images = photos(engine, 3 * LARGEST)
    if what == "equality":
        return equality(embedder(engine, False), images)
    if what == "speed":
        return speed(engine, images)
    return memory(embedder(engine, what == "bucketed"), images)


def main() -> None:
    """Run all measurements, print summaries, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "ENGINE", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        try:
            print(json.dumps(measure(options.one[0], bundle_path(options.bundle), *options.one[1:])))
        except MixMIMError as error:
            print(json.dumps({"error": str(error)}))
        return
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.batch_sizes {options.bundle.name}",
        "hardware": processor(),
        "versions": {name: version(name) for name in ("mixmim-serve", "onnxruntime", "openvino")},
    }
    for kind, precision in ENGINES:
        rows = report[f"{kind} {precision}"] = {}
        for what in ("equality", "as it comes", "bucketed", "speed"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.batch_sizes",
                str(options.bundle),
                "--one",
                what,
                kind,
                precision,
            ]
            rows[what] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{kind} {precision}, {what}: {_summary(rows[what])}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def _summary(row: dict[str, Any]) -> str:
    if "mb" in row:
        return ", ".join(f"{mb:.0f} MB {when}" for when, mb in row["mb"].items())
    if "images_per_second" in row:
        return ", ".join(f"{rate:.0f} images/s {name}" for name, rate in row["images_per_second"].items())
    if "error" in row:
        return str(row["error"])
    return (
        f"to the image alone {max(row['to_alone']):.1e} at most, within one size {max(row['within_size']):.1e}, "
        f"largest value {row['largest_value']:.2f}"
    )


if __name__ == "__main__":
    main()
