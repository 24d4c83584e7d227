"""Images per second that one core loads for training: read, decode, crop and resize.

    python -m benchmarks.data_loading --output benchmarks/results/data_loading_epyc_202611.md

One process and one thread, JPEGs of 16 kB, 75 kB and 2 MB (one photo of examples/, enlarged, with noise added to reach
the file size), 224 px crops of 0.2 to 1 of the area as in pretraining. `small` decodes a JPEG at the smallest scale
that still covers the drawn crop, as training does; `full` decodes all of it. Both take turns over the same images and
seeds, so their ratio holds on a busy machine; rates are per CPU second.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mixmim_serve.engines.hardware import processor
from mixmim_serve.preprocess import decode, read_limited
from training.augment import RandomCrop

PHOTO = Path(__file__).parent.parent / "examples" / "shirt.jpg"
FILES = {"16 kB": (256, 192), "75 kB": (640, 480), "2 MB": (3000, 2250)}
SIZE, MIN_CROP, NEEDED_ON_16_CORES = 224, 0.2, 3000


def main() -> None:
    """Print a table, and write it with the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60, help="crops of each kind")
    parser.add_argument("--output", type=Path, help="a Markdown file; the numbers go into a .json next to it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, make_jpeg(Path(folder), name), arguments.images) for name in FILES]
    report = {"date": date.today().isoformat(), "hardware": processor(), "pillow": Image.__version__, "rows": rows}
    text = table(report)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


def make_jpeg(folder: Path, name: str) -> Path:
    """A photo with enough noise to make its JPEG about as large as its name says."""
    number, unit = name.split()
    wanted = int(number) * (1000 if unit == "kB" else 1_000_000)
    photo = np.asarray(Image.open(PHOTO).convert("RGB").resize(FILES[name], Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(0).standard_normal(photo.shape, np.float32)
    best = b""
    for strength in np.linspace(0, 40, 41):
        buffer = io.BytesIO()
        Image.fromarray((photo + strength * noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        if not best or abs(len(buffer.getvalue()) - wanted) < abs(len(best) - wanted):
            best = buffer.getvalue()
    path = folder / f"{wanted}.jpg"
    path.write_bytes(best)
    return path


def measure(name: str, path: Path, images: int) -> dict[str, float | str]:
    """Milliseconds per stage, and images per second both ways."""
    times: dict[str, list[float]] = {
        stage: [] for stage in ("read", "full decode", "full crop", "small decode", "small crop")
    }
    differences = []
    for seed in range(images + 1):
        crops = [RandomCrop(SIZE, MIN_CROP, random.Random(seed)) for _ in range(2)]  # noqa: S311
        data = timed(times["read"], lambda: read_limited(path))
        full = timed(times["full decode"], lambda data=data: decode(data))
        one = timed(times["full crop"], lambda crop=crops[0], image=full: crop(image))
        small = timed(times["small decode"], lambda data=data, crop=crops[1]: decode(data, reduction=crop.reduction))
        other = timed(times["small crop"], lambda crop=crops[1], image=small: crop(image))
        differences.append(float(np.abs(one.astype(int) - other.astype(int)).mean()))
    middle = {stage: 1000 * statistics.mean(values[1:]) for stage, values in times.items()}  # the first warms up
    rates = {
        way: 1000 / (middle["read"] + middle[f"{way} decode"] + middle[f"{way} crop"]) for way in ("full", "small")
    }
    size = path.stat().st_size
    return {"file": name, "bytes": size, **middle, **rates, "ratio": rates["small"] / rates["full"]} | {
        "difference": statistics.mean(differences)
    }


def timed(times: list[float], work: Callable[[], Any]) -> Any:
    """The result of `work`; its CPU seconds are appended to `times`."""
    began = time.process_time()
    result = work()
    times.append(time.process_time() - began)
    return result


def table(report: dict[str, object]) -> str:
    """The report as a Markdown table."""
    lines = [
        f"# Loading images for training, one core of {report['hardware']}, {report['date']}",
        "",
        f"Pillow {report['pillow']}; `python -m benchmarks.data_loading`; CPU time, {SIZE} px crops.",
        f"A step of {NEEDED_ON_16_CORES} images/s needs {NEEDED_ON_16_CORES / 16:.0f} from each of 16 cores.",
        "",
        "| file | read, ms | decode all, ms | crop, ms | decode small, ms | crop, ms | images/s, all | images/s, small "
        "| ratio | mean difference, of 255 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:  # type: ignore[attr-defined]
        values = [row["read"], row["full decode"], row["full crop"], row["small decode"], row["small crop"]]
        lines.append(
            f"| {row['file']} ({row['bytes']:,} bytes) | "
            + " | ".join(f"{value:.2f}" for value in values)
            + f" | {row['full']:.0f} | {row['small']:.0f} | {row['ratio']:.2f} | {row['difference']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
