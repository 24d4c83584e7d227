"""Throughput of extraction against the bare engine, and its memory.

    python -m benchmarks.extract tiny --output benchmarks/results/extract_epyc_202611.md
    python -m benchmarks.extract tiny bundles/base --seconds 6 --rounds 3
    python -m benchmarks.extract tiny --memory 1000 10000 100000

For each bundle, JPEG size and kind of source, three measurements take turns: the engine alone on decoded images,
decoding alone (read, hash, decode, resize in the same threads), and a complete run of `mixmim extract`'s code including
its files, with engine and source already open. The table shows medians over the rounds.

On a CPU, engine and decoding share the cores, so a run cannot be as fast as the slower of the two alone: the time per
image is at least the sum of both (column `bound`: 1 / (1 / engine + 1 / decoding)). With `--device RATE` the engine is
a stand-in that takes as long as a device with that many images/s but no CPU time: all cores decode, as next to a GPU,
and the slower of the two is the bound.

`CPU` is the engine's CPU time per image divided by that of the whole run. It also holds on a busy machine, where rates
measured minutes apart do not compare.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.data_loading import FILES, make_jpeg
from benchmarks.provenance import about, heading
from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.cores import usable_cores
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.extract.lead import run
from mixmim_serve.extract.local import LocalExecutor
from mixmim_serve.extract.pipeline import BATCH, decode_small
from mixmim_serve.sources import Source, open_source

KINDS = ("folder", "tar", "parquet")
FEWEST = 3 * BATCH  # images of a run; fewer would measure mostly start and end


def main(given: Sequence[str] | None = None) -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, default=[Path("tiny")])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--sizes", nargs="*", default=list(FILES), help="JPEG sizes: " + ", ".join(FILES))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="approximate duration of the slower part alone, per round"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=float, default=0.0, help="images/s of a stand-in for the engine")
    parser.add_argument(
        "--memory", nargs="*", type=int, default=[], help="measure peak memory for these numbers of images instead"
    )
    parser.add_argument("--output", type=Path, help="a Markdown file; the numbers go into a .json next to it")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as folder:
        if arguments.memory:
            rows = [memory(Path(folder), arguments.bundles[0], images) for images in arguments.memory]
        else:
            rows = [row for bundle in arguments.bundles for row in speed(Path(folder), bundle, arguments)]
    report = about("extract", given, ("openvino", "onnxruntime", "pillow", "pyarrow")) | {"rounds": arguments.rounds}
    lines = [*heading("Extraction against the bare engine", report), f"Medians of {arguments.rounds} rounds.", ""]
    text = "\n".join(lines) + "\n" + table(rows)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
        arguments.output.with_suffix(".json").write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


def speed(folder: Path, bundle: Path, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row per JPEG size and kind of source."""
    engine = open_engine(_bundle(bundle), arguments.engine)
    if arguments.device:
        engine = Device(engine, arguments.device)
    rows = []
    for size in arguments.sizes:
        jpeg = make_jpeg(folder, size)
        pixels = np.stack([decode_small(jpeg.read_bytes(), engine.bundle.description.preprocessing).pixels] * BATCH)
        alone(engine, pixels, BATCH)  # warms up
        slower = min(alone(engine, pixels, 4 * BATCH), decoding_rate(engine, jpeg))
        images = FEWEST + int(slower * arguments.seconds) // BATCH * BATCH
        for kind in arguments.kinds:
            source = make_source(folder / f"{kind}-{jpeg.stem}-{images}", kind, jpeg, images)
            row = {"bundle": bundle.name, "engine": f"{engine.name} {engine.precision}", "JPEG": size, "source": kind}
            rows.append(row | {"images": images} | compare(engine, source, pixels, arguments.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
            shutil.rmtree(folder / f"{kind}-{jpeg.stem}-{images}")
    return rows


def compare(engine: Engine, source: Source, pixels: np.ndarray, rounds: int) -> dict[str, object]:
    """Images/s of the three measurements, taking turns."""
    count = len(source.keys)
    work: dict[str, Callable[[], float]] = {
        "engine alone": lambda: alone(engine, pixels, count),
        "decoding alone": lambda: decoding(engine, source),
        "extract": lambda: extracting(engine, source),
    }
    speeds: dict[str, list[float]] = {name: [] for name in work}
    spent: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            before = time.process_time()
            speeds[name].append(function())
            spent[name].append(time.process_time() - before)
    cpu = [one / run for one, run in zip(spent["engine alone"], spent["extract"], strict=True)]
    bounds = [
        _bound(engine, one, two) for one, two in zip(speeds["engine alone"], speeds["decoding alone"], strict=True)
    ]
    speeds |= {"bound": bounds}
    rates = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    shares = {name: [a / b for a, b in zip(speeds["extract"], speeds[name], strict=True)] for name in speeds}
    return rates | {
        "of engine": round(statistics.median(shares["engine alone"]), 3),
        "of bound": round(statistics.median(shares["bound"]), 3),
        "CPU": round(statistics.median(cpu), 3),
        "from to": f"{min(shares['bound']):.2f} to {max(shares['bound']):.2f}",
    }


def _bound(engine: Engine, one: float, two: float) -> float:
    return min(one, two) if isinstance(engine, Device) else 1 / (1 / one + 1 / two)


class Device:
    """An engine that takes time but no CPU time, like one on a GPU; it returns zeros."""

    def __init__(self, engine: Engine, rate: float) -> None:
        self.bundle, self.name, self.precision = engine.bundle, f"device of {rate:g}/s", ""
        self.version, self.hardware, self.rate = engine.version, engine.hardware, rate

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Sleep as long as the device would compute."""
        rows = len(inputs["pixels"])
        time.sleep(rows / self.rate)
        return {name: np.zeros((rows, self.bundle.arch.embedding_size), np.float32) for name in outputs}


def alone(engine: Engine, pixels: np.ndarray, images: int) -> float:
    """Images/s of the engine alone."""
    began = time.perf_counter()
    for _ in range(images // BATCH):
        engine.run("encoder", {"pixels": pixels}, ["embedding"])
    return images // BATCH * BATCH / (time.perf_counter() - began)


def decoding(engine: Engine, source: Source) -> float:
    """Images/s of reading and decoding, with as many threads."""

    def load(index: int) -> None:
        data = source.read(index)
        decode_small(data, engine.bundle.description.preprocessing)
        hashlib.sha256(data).hexdigest()

    began = time.perf_counter()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(load, range(len(source.keys))):
            pass
    return len(source.keys) / (time.perf_counter() - began)


def decoding_rate(engine: Engine, jpeg: Path) -> float:
    """Approximate images/s of decoding on all cores, from one image decoded several times."""
    data, repeats = jpeg.read_bytes(), 5
    began = time.perf_counter()
    for _ in range(repeats):
        decode_small(data, engine.bundle.description.preprocessing)
    return repeats * usable_cores() / (time.perf_counter() - began)


def extracting(engine: Engine, source: Source) -> float:
    """Images/s of a complete run."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as out:
        job = ExtractJob(engine.bundle.path, source.name, out)
        began = time.perf_counter()
        summary = run(job, executor=partial(LocalExecutor, engine=engine))
        assert summary.rows == len(source.keys)
        return summary.rows / (time.perf_counter() - began)


def make_source(root: Path, kind: str, jpeg: Path, images: int) -> Source:
    """A source with many copies of one photo: links, members or rows."""
    root.mkdir(parents=True)
    makers: dict[str, Callable[[Path, Path, int], None]] = {"folder": _folder, "tar": _tar, "parquet": _parquet}
    makers[kind](root, jpeg, images)
    return open_source(root)


def _folder(root: Path, jpeg: Path, images: int) -> None:
    for number in range(images):
        below = root / f"{number // 1000:04d}"
        below.mkdir(exist_ok=True)
        os.link(jpeg, below / f"{number:08d}.jpg")


def _tar(root: Path, jpeg: Path, images: int) -> None:
    data = jpeg.read_bytes()
    with tarfile.open(root / "photos.tar", "w") as tar:
        for number in range(images):
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _parquet(root: Path, jpeg: Path, images: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = jpeg.read_bytes()
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(root / "photos.parquet", schema, use_dictionary=False, compression="NONE") as writer:
        for start in range(0, images, 100):  # a row group, as Hugging Face writes them
            writer.write_table(pa.table({"image": [data] * min(100, images - start)}, schema=schema))


def memory(folder: Path, bundle: Path, images: int) -> dict[str, object]:
    """Peak memory of a process that extracts this many 16 kB images from a tar shard."""
    root = folder / str(images)
    root.mkdir()
    _tar(root, make_jpeg(folder, "16 kB"), images)
    code = (
        "import json, resource, sys, time; from pathlib import Path; from mixmim_serve.extract.job import ExtractJob\n"
        "from mixmim_serve.extract.lead import run\n"
        "began = time.perf_counter(); done = run(ExtractJob(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000\n"
        "print(json.dumps({'rows': done.rows, 'peak MB': round(peak), 'seconds': round(time.perf_counter() - began)}))"
    )
    command = [sys.executable, "-c", code, str(_bundle(bundle)), str(root), str(folder / f"out-{images}")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(root)
    row = {"bundle": bundle.name, "images": images} | json.loads(ended.stdout)
    print(row, file=sys.stderr, flush=True)
    return row


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _bundle(path: Path) -> Path:
    return DEFAULT_BUNDLE.parent / path if not path.exists() else path


if __name__ == "__main__":
    main()
