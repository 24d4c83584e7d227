"""What POST /anomaly adds to the network's time per photo, by the size of the coreset.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.anomaly_speed tiny --output benchmarks/results/anomaly_speed_EPYC.md

The network alone and the comparison with the normal photos run in turns, on the same engine outputs, in batches of 1, 8
and 32 photos, measured in CPU time of all threads, which other work on the machine changes little (set
OPENBLAS_NUM_THREADS=1: threads that wait count too). The references are random vectors of the true sizes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.provenance import about, heading
from mixmim_serve.anomaly.calibrate import DIMENSIONS
from mixmim_serve.anomaly.calibration import About, Calibration
from mixmim_serve.anomaly.detector import Detector
from mixmim_serve.anomaly.memory import AROUND, Memory
from mixmim_serve.anomaly.nearest import References
from mixmim_serve.anomaly.patches import STAGE, Whitening
from mixmim_serve.cli.common import bundle_path
from mixmim_serve.engines import Engine, identity, open_engine
from mixmim_serve.files import atomic_path

SIZES = (1_000, 3_000, 10_000, 30_000)
BATCHES = (1, 8, 32)
PHOTOS = 1_000  # normal ones, whose embeddings are compared too
ROUNDS = 15


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engine = open_engine(bundle_path(arguments.bundle))
    title = f"Milliseconds of CPU time per photo, {engine.bundle.name} on {engine.name} {engine.precision}"
    lines = [*heading(title, about("anomaly_speed", None, ("numpy",))), "",
             f"Median (fastest to slowest) of {ROUNDS} rounds; {PHOTOS:,} normal photos.", "",
             f"| photos in a batch | network | {' | '.join(f'{size:,} patches' for size in SIZES)} |",
             "|---|---|" + "---|" * len(SIZES)]  # fmt: skip
    for batch in BATCHES:
        lines.append(row(engine, batch))
        print(lines[-1], flush=True)
    if arguments.output:
        with atomic_path(arguments.output) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


def row(engine: Engine, batch: int) -> str:
    """The times of one batch size."""
    size = engine.bundle.arch.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)
    detectors = [random_detector(engine, patches) for patches in SIZES]
    outputs = engine.run("encoder", {"pixels": pixels}, detectors[0].outputs)
    works: list[Callable[[], object]] = [lambda: engine.run("encoder", {"pixels": pixels}, detectors[0].outputs)]
    works += [lambda detector=detector: detector.verdicts(outputs) for detector in detectors]  # type: ignore[misc]
    times = np.array([[timed(work) for work in works] for _ in range(ROUNDS + 2)])[2:] * 1e3 / batch
    cells = [f"{np.median(column):.2f} ({column.min():.2f} to {column.max():.2f})" for column in times.T]
    return f"| {batch} | {' | '.join(cells)} |"


def random_detector(engine: Engine, patches: int) -> Detector:
    """A detector with random references of true sizes."""
    rng = np.random.default_rng(0)
    arch = engine.bundle.arch
    dims = dict(zip(("stage1", "stage2", "stage3", "stage4"), arch.dims, strict=True))
    full = dims[STAGE]

    def vectors(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    kept, embedding = min(DIMENSIONS, full), arch.embedding_size
    memory = Memory(
        References(vectors(patches, kept)),
        rng.integers(0, patches, (patches, AROUND)).astype(np.int32),
        Whitening(vectors(embedding), vectors(embedding, embedding)),
        References(vectors(PHOTOS, embedding)),
    )
    known = About(**identity(engine), engine=engine.name, photos=PHOTOS, stage=STAGE, rate=0.01)
    parts, folds = np.abs(vectors(PHOTOS, 2)), np.zeros(PHOTOS, np.float32)
    whiten = Whitening(vectors(full), vectors(full, kept))
    return Detector(Calibration(known, memory, whiten, parts, folds, vectors(4), vectors(0)))


def timed(work: Callable[[], object]) -> float:
    """Seconds of CPU time, of all threads, of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
