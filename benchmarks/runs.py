"""What the scripts that train several networks share: resumable runs, how they are judged, and one table of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.learning import ALONE, Photos, record, tuned
from mixmim_serve.description import Description
from mixmim_serve.files import atomic_path
from mixmim_serve.model import Encoder
from mixmim_serve.model.checkpoint import save_checkpoint
from mixmim_serve.sources import Source
from training.evaluation.compare import few_shot, knn
from training.evaluation.confusion import accuracy
from training.evaluation.embed import run_network
from training.evaluation.labelled import Labelled
from training.evaluation.linear import linear_probe
from training.evaluation.probe import Embedded
from training.start import read_start
from training.task import Task
from training.trainer import train

SHOTS = 5  # images per class of a few-shot classifier
VAL = (Photos("clothing10", "val"), Photos("caltech99", "val"))
EVALUATED = (Photos("clothing10", "val"), Photos("clothing10", "test"), Photos("caltech99", "val"))


def parser(doc: str | None, names: Iterable[str], epochs: int) -> argparse.ArgumentParser:
    """The options that all of these scripts have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("images", help="images to pretrain on")
    found.add_argument("data", type=Path, help="folder of the labelled sets")
    found.add_argument("--out", type=Path, required=True, help="folder for the runs")
    found.add_argument("--epochs", type=int, default=epochs)
    found.add_argument("--seeds", nargs="+", type=int, help="of each variant")
    found.add_argument("--only", nargs="+", choices=list(names), default=list(names), metavar="VARIANT")
    return found


def slug(name: str) -> str:
    """A variant's name as part of a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def folder_of(out: Path, name: str, seed: int) -> Path:
    """The run folder of a variant with a seed."""
    return out / f"{slug(name)}-{seed}"


def trained(task: Task, source: Source, run: Path) -> Path:
    """The final checkpoint of a run, which begins, goes on or has ended."""
    console = Console(stderr=True, log_path=False)
    final = train(task, source, run, console, resume=(run / "config.json").exists())
    if final is None:
        raise SystemExit("stopped; the same command resumes")
    return final


def average_of(run: Path) -> Path | None:
    """A checkpoint of the average of weights that gave a run's feature targets; None without features."""
    (last,) = (run / "checkpoints").glob("*.state.pt")
    average = torch.load(last, map_location="cpu", weights_only=True)["objective"].get("average")
    if average is None:
        return None
    path = run / "average.safetensors"
    save_checkpoint(path, average, read_start(run / "final.safetensors").description)
    return path


def plain_encoder(checkpoint: Path) -> tuple[Encoder, Description]:
    """The encoder alone, for whole images, of any checkpoint or variant of MixMIM."""
    start = read_start(checkpoint)
    arch = dataclasses.replace(start.description.arch, decoder=None, num_classes=0)
    model = Encoder(arch)
    model.load_state_dict({name: start.weights[name] for name in model.state_dict()})
    return model.to(ALONE.device).eval(), dataclasses.replace(start.description, arch=arch, labels=())


def frozen(
    checkpoint: Path, data: Path, sets: Sequence[Photos] = EVALUATED, *, knn_only: bool = True
) -> dict[str, float]:
    """Top-1 in percent of frozen features on each set: k-NN, and unless `knn_only` linear probe and few-shot."""
    model, description = plain_encoder(checkpoint)

    def embed(part: Labelled) -> Embedded:
        outputs = run_network(model, part.source, description.preprocessing, ALONE, workers=1)
        return Embedded(outputs.values_NX, part.labels_of(outputs))

    known: dict[str, Embedded] = {}
    measured: dict[str, float] = {}
    for photos in sets:
        train_part, other = photos.open(data)
        if photos.name not in known:
            known[photos.name] = embed(train_part)
        reference, queries, on = known[photos.name], embed(other), f"{photos.name} {photos.evaluated}"
        measured[f"{on}, k-NN"] = knn(reference, queries, len(train_part.classes))
        if not knn_only:
            head = linear_probe(reference.features_ND, reference.labels_N, len(train_part.classes))
            measured[f"{on}, linear"] = accuracy(head.scores(queries.features_ND), queries.labels_N).top1
            measured[f"{on}, {SHOTS}-shot"], _ = few_shot(reference, queries, SHOTS)
    return measured


def tuned_all(
    checkpoint: Path, data: Path, sets: Sequence[Photos], run: Path, epochs: int, seed: int
) -> dict[str, float]:
    """Top-1 in percent on each set after fine-tuning on its train part, below RUN; {} for no epochs."""
    measured: dict[str, float] = {}
    for photos in sets if epochs else ():
        path = run / f"tuned-{photos.name}.json"
        start = read_start(checkpoint)
        record(path, tuned, start, *photos.open(data), path.with_suffix(""), epochs, seed)
        measured[f"{photos.name} {photos.evaluated}, fine-tuned"] = json.loads(path.read_text())["fine-tuned"]
    return measured


def figures(run: Path) -> dict[str, float]:
    """From a run's log: mean of the last five losses, median images/s, and of features the targets' spread."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    found = {
        "loss": statistics.mean(line["loss"] for line in steps[-5:]),
        "images/s": statistics.median(line["rate"] for line in steps),
    }
    return found | ({"target std": steps[-1]["target_std"]} if "target_std" in steps[-1] else {})


def write_table(out: Path, names: Iterable[str], what: str = "variant") -> None:
    """Write what is finished to OUT/results.json, and as means and deviations over the seeds to OUT/results.md."""
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name in names:
        for path in sorted(out.glob(f"{slug(name)}-[0-9]*/judged.json")):
            seed = int(path.parent.name.rpartition("-")[2])
            results.setdefault(name, {})[seed] = json.loads(path.read_text())
    columns = list(dict.fromkeys(key for runs in results.values() for values in runs.values() for key in values))
    table = [f"| {what} | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in results.items():
        cells = [spread([values[key] for values in runs.values() if key in values]) for key in columns]
        table.append(f"| {name} | {', '.join(map(str, sorted(runs)))} | {' | '.join(cells)} |")
    for path, text in ((out / "results.md", "\n".join(table)), (out / "results.json", json.dumps(results, indent=2))):
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n")
    print("\n".join(table), flush=True)


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several."""
    if not values:
        return ""
    digits = 1 if statistics.mean(values) >= 10 else 3
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
