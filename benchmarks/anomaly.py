"""How well scores tell defective solar cells, and cells of another kind, from good ones (elpv): AUROC of each.

    tar xf elpv.tar -C /tmp && python -m benchmarks.anomaly /tmp/elpv runs/anomaly --seeds 3 --output RESULTS.md

Normal photos are mono/train/good. Defects: mono/test/good against mono/test/defect. Drift: mono/test/good against poly.
Three kinds of models: the bundle (`shipped`; a seed changes the parts and the patches of its calibration), the bundle
pretrained further on the normal photos (`continued`, one run per seed, some minutes each; training beside other work is
slower), and its network with random weights (`untrained`). `--bundle` takes another bundle, `--continued RUN...` runs
that exist. The folder keeps bundles, runs and the result of each model and seed: the same command goes on where it was
stopped, and writes the table again after each result.

The data's licence is non-commercial and share-alike: keep runs and bundles of this benchmark to yourself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from benchmarks.provenance import about, heading
from mixmim_serve.anomaly.calibrate import Options, calibrate
from mixmim_serve.anomaly.calibration import store
from mixmim_serve.anomaly.detector import Detector, open_detector
from mixmim_serve.anomaly.memory import PART_NAMES
from mixmim_serve.anomaly.nearest import References
from mixmim_serve.anomaly.patches import Floats, patch_features
from mixmim_serve.anomaly.photos import run_photos
from mixmim_serve.bundle import DEFAULT_BUNDLE, GOLDEN, Bundle, open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.files import atomic_path
from mixmim_serve.preprocess import Pixels, preprocess
from mixmim_serve.runs import checkpoint_of
from mixmim_serve.sources import open_source
from mixmim_serve.tasks import partner_of, score_image

GROUPS = {
    "normal": ("mono/train/good",),
    "good": ("mono/test/good",),
    "defects": ("mono/test/defect",),
    "drift": ("poly/test/good", "poly/test/defect"),
}
RATES = (0.01, 0.05)
MODELS = ("shipped", "continued", "untrained")
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
OUTPUTS = ("embedding", "stage4")
PLAIN = ("reconstruction (/score)", "embeddings, 3 nearest", "stage 4, farthest patch")
OURS = (*(f"{name} of /anomaly" for name in PART_NAMES), "/anomaly")

Scores = Mapping[str, Mapping[str, Floats]]  # by score, then by group


@dataclasses.dataclass(frozen=True)
class Photos:
    """What the network gives for the photos of one group."""

    pixels: list[Pixels]  # as every route but /anomaly sees them
    outputs: Mapping[str, Floats]  # for the whole photo


def main() -> None:
    """Measure what is missing, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the unpacked folder elpv")
    parser.add_argument("work", type=Path, help="keeps bundles, runs and results")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--continued", nargs="*", type=Path, default=[], help="checkpoints or runs, one per seed")
    parser.add_argument("--patches", type=int, default=Options().patches)
    parser.add_argument("--output", type=Path, help="a .md file; the same as .json lies beside it")
    arguments = parser.parse_args()
    results = read_results(arguments.work)
    for model in arguments.models:
        for seed in range(arguments.seeds):
            name = f"{model} {seed}"
            if name not in results:
                bundle = bundle_of(model, seed, arguments)
                results[name] = measure(bundle, arguments.data, Options(arguments.patches, seed=seed))
                keep_results(arguments.work, results)
                print(name, json.dumps(results[name]["auroc"]), flush=True)
            write_report(results, arguments.output)


def bundle_of(model: str, seed: int, arguments: argparse.Namespace) -> Bundle:
    """The bundle of a model and seed, made if it is missing."""
    if model == "shipped":
        return open_bundle(arguments.bundle)
    target = arguments.work / f"{model}-{seed}-bundle"
    if not target.exists():
        from export.build import export_bundle

        if model == "untrained":
            checkpoint = untrained(arguments.bundle, arguments.work / f"untrained-{seed}.safetensors", seed)
        else:
            given = dict(enumerate(arguments.continued)).get(seed)
            checkpoint, _ = checkpoint_of(given or pretrain(arguments, seed))
        export_bundle(checkpoint, target)
    return open_bundle(target)


def untrained(bundle: Path, target: Path, seed: int) -> Path:
    """A checkpoint of the bundle's network with random weights."""
    import torch

    from mixmim_serve.bundle import WEIGHTS
    from mixmim_serve.model import build_model
    from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint

    description, _ = read_checkpoint(bundle / WEIGHTS)
    arch = dataclasses.replace(description.arch, num_classes=0)
    torch.manual_seed(seed)
    said = dataclasses.replace(description, arch=arch, labels=(), provenance={})
    save_checkpoint(target, build_model(arch).state_dict(), said)
    return target


def pretrain(arguments: argparse.Namespace, seed: int) -> Path:
    """A run of continued pretraining on the normal photos, at low priority; an unfinished one is resumed."""
    run = Path(arguments.work) / f"continued-{seed}"
    data = arguments.data / GROUPS["normal"][0]
    command = [
        sys.executable,
        "-c",
        "from mixmim_serve.cli import main; main()",
        "pretrain",
        data,
        "--from",
        arguments.bundle,
        "--out",
        run,
    ]
    command += ["--set", f"seed={seed}", *(["--resume"] if run.exists() else [])]
    subprocess.run(["nice", "-n", "10", *map(str, command)], check=True, env=os.environ | QUIET)
    return run


def measure(bundle: Bundle, data: Path, options: Options) -> dict[str, Any]:
    """AUROC of every score, and what the alarm does at each rate."""
    with tempfile.TemporaryDirectory() as folder:
        copied = bundle.copy(Path(folder))
        engine = open_engine(copied)
        source = open_source(data / GROUPS["normal"][0])
        engine.bundle = store(copied, calibrate(engine, source, options)[0])
        detector = open_detector(engine)
        groups = {name: read(engine, data, folders) for name, folders in GROUPS.items()}
        scores = plain_scores(engine, groups) | our_scores(detector, groups)
        return {
            "engine": f"{engine.name} {engine.precision}",
            "fingerprint": bundle.fingerprint,
            "auroc": {
                name: {what: auroc(each, what) for what in ("defects", "drift")} for name, each in scores.items()
            },
            "alarms": {str(rate): alarms(Detector(detector.calibration, rate), groups) for rate in RATES},
        }


def read(engine: Engine, data: Path, folders: Sequence[str]) -> Photos:
    """The photos in these folders, and what the network gives for them."""
    sources = [open_source(data / folder) for folder in folders]
    own = engine.bundle.description.preprocessing
    pixels = [preprocess(source.read(index), own) for source in sources for index in range(len(source.keys))]
    parts = [group.outputs for source in sources for group in run_photos(engine, source, OUTPUTS)]
    return Photos(pixels, {name: np.concatenate([outputs[name] for outputs in parts]) for name in OUTPUTS})


def plain_scores(engine: Engine, groups: Mapping[str, Photos]) -> dict[str, dict[str, Floats]]:
    """What a user could do without a calibration."""
    partner = partner_of(load_file(engine.bundle.path / GOLDEN)) if "reconstruct" in engine.bundle.graphs else None
    vectors = References(unit(groups["normal"].outputs["embedding"]))
    bank = References(unit(places(groups["normal"])).reshape(-1, engine.bundle.arch.dims[-1]))
    asked = {name: photos for name, photos in groups.items() if name != "normal"}

    def farthest(photos: Photos) -> Floats:
        each = unit(places(photos))
        return bank.nearest(each.reshape(-1, each.shape[-1]))[0].reshape(len(each), -1).max(axis=1)

    def reconstruction(photos: Photos) -> Floats:
        assert partner is not None
        return np.array([score_image(engine, pixels, partner).mean() for pixels in photos.pixels])

    scores: dict[str, Callable[[Photos], Floats]] = {
        PLAIN[1]: lambda photos: vectors.mean_distance(unit(photos.outputs["embedding"]), 3),
        PLAIN[2]: farthest,
    }
    if partner is not None:
        scores = {PLAIN[0]: reconstruction, **scores}
    return {name: {group: score(photos) for group, photos in asked.items()} for name, score in scores.items()}


def our_scores(detector: Detector, groups: Mapping[str, Photos]) -> dict[str, dict[str, Floats]]:
    """The score of /anomaly, and the distances that it is made of."""
    scores: dict[str, dict[str, Floats]] = {name: {} for name in OURS}
    calibration = detector.calibration
    for group, photos in groups.items():
        if group == "normal":
            continue
        features = calibration.whiten(patch_features(photos.outputs, calibration.about.stage))
        parts = calibration.memory.distances(features, photos.outputs["embedding"]).parts
        combined = np.array([verdict.score for verdict in detector.verdicts(photos.outputs)])
        for name, values in zip(OURS, (*parts.T, combined), strict=True):
            scores[name][group] = values
    return scores


def alarms(detector: Detector, groups: Mapping[str, Photos]) -> dict[str, Any]:
    """Share of photos beyond the threshold by group, and what the calibration expected of normal ones."""
    beyond = {
        name: float(np.mean([not verdict.normal for verdict in detector.verdicts(photos.outputs)]))
        for name, photos in groups.items()
        if name != "normal"
    }
    check = detector.held_out_check()
    return {"beyond": beyond, "held out": {"count": check.count, "photos": check.total, "interval": check.interval}}


def places(photos: Photos) -> Floats:
    """Stage 4 as (photos, places, D)."""
    maps = photos.outputs["stage4"]
    return maps.reshape(*maps.shape[:2], -1).transpose(0, 2, 1)


def unit(vectors: Floats) -> Floats:
    """Scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def auroc(scores: Mapping[str, Floats], what: str) -> float:
    """Of a group against good photos of the test part."""
    good, other = scores["good"], scores[what]
    return round(float(roc_auc_score([0] * len(good) + [1] * len(other), np.concatenate([good, other]))), 4)


def read_results(work: Path) -> dict[str, Any]:
    """What was measured before."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def keep_results(work: Path, results: Mapping[str, Any]) -> None:
    """Write all results, atomically."""
    with atomic_path(work / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def write_report(results: Mapping[str, Any], output: Path | None) -> None:
    """The tables as Markdown, and the results as JSON."""
    facts = about("anomaly", None, ("numpy", "scikit-learn", "torch"))
    text = "\n".join(report(results, facts)) + "\n"
    if output is None:
        return
    with atomic_path(output) as temporary:
        temporary.write_text(text)
    with atomic_path(output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"about": facts, "results": results}, indent=1) + "\n")


def report(results: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Markdown: AUROC as mean and range over seeds, and shares beyond the threshold."""
    by_model = {model: [found for name, found in results.items() if name.split()[0] == model] for model in MODELS}
    shown = {model: found for model, found in by_model.items() if found}
    counts = ", ".join(f"{model} {len(found)}" for model, found in shown.items())
    lines = [*heading("AUROC on solar cells (elpv)", facts), "", f"Mean (range) over seeds: {counts}.", ""]
    for what in ("defects", "drift"):
        lines += [f"| {what} | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
        for score in (*PLAIN, *OURS):
            cells = [spread([run["auroc"][score][what] for run in found if score in run["auroc"]])
                     for found in shown.values()]  # fmt: skip
            lines.append(f"| {score} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["Photos beyond the threshold of /anomaly, mean (range), and the held-out check of seed 0:", ""]
    lines += ["| model | rate | good | defects | drift | held-out normal photos |", "|---|---|---|---|---|---|"]
    for model, found in shown.items():
        for rate in map(str, RATES):
            cells = [spread([run["alarms"][rate]["beyond"][group] for run in found])
                     for group in ("good", "defects", "drift")]  # fmt: skip
            check = found[0]["alarms"][rate]["held out"]
            low, high = check["interval"]
            held_out = f"{check['count']} of {check['photos']} ({low:.3f} to {high:.3f})"
            lines.append(f"| {model} | {rate} | {' | '.join(cells)} | {held_out} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean, and the range if there are several."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
