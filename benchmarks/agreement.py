"""Do all engines and precisions predict the same classes? Top-1 of every engine against torch in float32.

    python -m benchmarks.agreement tiny data/clothing10/test

The bundle needs a head whose labels are the folder names. fp16 and bf16 graphs are measured too if the bundle has them
(`mixmim export ... --precision fp32 --precision fp16 --precision bf16`).
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np

from mixmim_serve.bundle import open_bundle
from mixmim_serve.cli.common import bundle_path
from mixmim_serve.engines import open_engine
from mixmim_serve.engines.hardware import processor
from mixmim_serve.errors import MixMIMError
from mixmim_serve.extract.pipeline import run_files
from mixmim_serve.heads import read_heads
from mixmim_serve.sources.names import list_images

CONTENDERS = [("torch", "fp32"), ("torch", "bf16")] + [
    (kind, precision) for kind in ("onnx", "openvino") for precision in ("fp32", "fp16", "bf16")
]


def main() -> None:
    """Print a JSON report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle folder, or tiny")
    parser.add_argument("data", type=Path, help="a folder of CLASS/photo")
    parser.add_argument("--head", default="", help="the head to judge; default: the bundle's default")
    arguments = parser.parse_args()
    bundle = open_bundle(bundle_path(arguments.bundle))
    head = read_heads(bundle).choose(arguments.head)
    paths = list_images(arguments.data)
    truth = np.array([head.classes.index(path.relative_to(arguments.data).parts[0]) for path in paths])
    rows, reference = [], None
    for kind, precision in CONTENDERS:
        try:
            engine = open_engine(bundle, kind, precision)
            logits = np.stack([head.logits(result.outputs) for result in run_files(engine, paths, head.inputs)])
        except MixMIMError as error:
            print(f"{kind} {precision}: {error}")
            continue
        guesses = logits.argmax(axis=1)
        reference = guesses if reference is None else reference
        rows.append(
            {
                "engine": engine.name,
                "precision": precision,
                "top1": round(100 * float((guesses == truth).mean()), 2),
                "agreement": round(100 * float((guesses == reference).mean()), 2),
                "differ": int((guesses != reference).sum()),
            }
        )
    about = {"date": date.today().isoformat(), "hardware": processor(), "fingerprint": bundle.fingerprint}
    about["head"] = head.name
    print(json.dumps(about | {"photos": len(paths), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
