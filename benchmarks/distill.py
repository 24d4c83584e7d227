"""Does a larger teacher make a small network better? `tiny` distilled against `tiny` pretrained alone.

    python -m benchmarks.distill photos data --out runs/distill --epochs 25 --teacher-epochs 25 --seeds 0 1 2

First a larger network is pretrained on the same photos (`TEACHER`, at tiny's 128 px; `--teacher` takes a checkpoint,
bundle or run instead). Then, with each seed, `tiny` is pretrained alone (`tiny-cpu`) and distilled
(`tiny-distill-cpu`), for as many epochs. A distilled step costs more, so `tiny` alone also gets as many epochs as
cost what distillation costs: seconds of all cores per image, measured once, taking turns, in OUT/cost.json. The
teacher's own training is in none of the budgets. Frozen features are judged by 10 nearest neighbours and a linear
probe on the val and test parts of clothing10 and caltech99's val; so is the teacher.

`--only` takes some of the variants, `--limit` some of the photos. Finished runs are skipped, interrupted ones resume;
OUT/results.md and OUT/results.json are rewritten after each, with hardware, versions and command.
"""

from __future__ import annotations

import benchmarks.sleeping  # noqa: F401

# isort: split
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from benchmarks.cost import epochs_at_equal_cost
from benchmarks.learning import SETS, Photos, record
from benchmarks.provenance import about, heading
from benchmarks.runs import EVALUATED, figures, folder_of, frozen, parser, trained, write_table
from mixmim_serve.config import Architecture, DecoderConfig
from mixmim_serve.files import atomic_path
from mixmim_serve.sources import Source, open_source
from training.config import PretrainConfig
from training.distillation import Distillation, read_teacher
from training.pretraining import Pretraining
from training.recipes import tiny_cpu, tiny_distill_cpu
from training.start import Start
from training.task import Task

# Twice tiny's width, base's depths: 23 M parameters with its decoder, tiny has 6 M.
TEACHER = Architecture(64, (2, 2, 18, 2), (2, 4, 8, 16), 128, decoder=DecoderConfig(128, 4, 4))
ALONE, DISTILLED, BESIDE, LONGER = "alone", "distilled", "distilled, MixMIM beside", "alone, equal cost"
VARIANTS: dict[str, dict[str, Any]] = {
    ALONE: {},
    DISTILLED: {},
    LONGER: {},
    BESIDE: {"mixmim_weight": 1.0},
}
TAUGHT = "teacher"


@dataclasses.dataclass(frozen=True)
class TeacherConfig(PretrainConfig):
    """The recipe of `tiny-cpu` for `TEACHER`."""

    @property
    def arch(self) -> Architecture:
        """The teacher's network; `size` is not read."""
        return TEACHER


def main() -> None:
    """Run what is missing, and write the table after each run."""
    options = parser(__doc__, VARIANTS, epochs=25)
    options.add_argument("--teacher", type=Path, help="a trained teacher, in place of one that is trained here")
    options.add_argument("--teacher-epochs", type=int, default=25, help="epochs of the teacher's training")
    options.add_argument("--batch-size", type=int, default=128, help="of every run")
    options.add_argument("--limit", type=int, default=0, help="train on so many of the photos, spread evenly")
    options.add_argument("--sets", nargs="+", default=[photos.name for photos in SETS], help="to judge on")
    arguments = options.parse_args()
    out, batch = arguments.out, arguments.batch_size
    source = some_of(open_source(arguments.images), arguments.limit)
    sets = [photos for photos in EVALUATED if photos.name in arguments.sets]
    path = arguments.teacher or trained_teacher(out, source, arguments.teacher_epochs, batch)
    teacher = read_teacher(path)
    record(out / f"{TAUGHT}-0" / "judged.json", judge, path, arguments.data, sets)
    for seed in arguments.seeds or [0, 1, 2]:
        for name in arguments.only:
            epochs = arguments.epochs
            if name == LONGER:
                epochs = longer(out, source, teacher, epochs, batch)
            run = folder_of(out, name, seed)
            trained(task_of(name, source, teacher, epochs, seed, batch), source, run)
            record(run / "judged.json", judge, run, arguments.data, sets)
            report(out)


def trained_teacher(out: Path, source: Source, epochs: int, batch: int) -> Path:
    """The run of the teacher, trained if it is not yet."""
    recipe = dataclasses.asdict(dataclasses.replace(tiny_cpu().with_epochs(epochs), keep_every=1000, batch_size=batch))
    config = TeacherConfig(**recipe)
    trained(Pretraining(config, source), source, out / "teacher")
    return Path(out / "teacher")


def task_of(
    name: str, source: Source | None, teacher: Start, epochs: int, seed: int, batch: int, **changes: Any
) -> Task:
    """A variant with a seed; without `source` it writes no pictures and takes no measures."""
    common = {"seed": seed, "batch_size": batch, "keep_every": 1000} | changes
    if name in (ALONE, LONGER):
        return Pretraining(dataclasses.replace(tiny_cpu().with_epochs(epochs), **common), source)
    config = dataclasses.replace(tiny_distill_cpu().with_epochs(epochs), **common, **VARIANTS[name])
    return Distillation(config, source, teacher)


def longer(out: Path, source: Source, teacher: Start, epochs: int, batch: int) -> int:
    """Epochs of `tiny` alone at the cost of so many of distillation."""
    tasks = {
        name: functools.partial(task_of, name, None, teacher, epochs, 0, batch, workers=0)
        for name in (ALONE, DISTILLED, BESIDE)
    }
    return epochs_at_equal_cost(out / "cost.json", tasks, dict.fromkeys(tasks, source), DISTILLED, epochs)[ALONE]


def some_of(source: Source, limit: int) -> Source:
    """At most `limit` of a folder's photos, spread evenly; 0 for all."""
    if not 0 < limit < len(source.keys):
        return source
    count = len(source.keys)
    rows = [number * count // limit for number in range(limit)]
    keys = tuple(source.keys[row] for row in rows)
    labels = tuple(source.labels[row] for row in rows) if source.labels else None
    return dataclasses.replace(source, keys=keys, labels=labels)  # type: ignore[type-var]


def judge(run: Path, data: Path, sets: list[Photos]) -> dict[str, float]:
    """Top-1 in percent of frozen features, and figures of the run's log if there is one."""
    checkpoint = read_teacher(run).path
    measured = frozen(checkpoint, data, sets, knn_only=False)
    measured = {name: value for name, value in measured.items() if "-shot" not in name}
    if not (run / "metrics.jsonl").is_file():
        return measured
    epochs = json.loads((run / "config.json").read_text())["config"]["epochs"]
    return measured | {"epochs": epochs} | figures(run)


def report(out: Path) -> None:
    """Write the table, below hardware, versions and command."""
    write_table(out, [TAUGHT, *VARIANTS], "tiny")
    facts = about("distill", None, ["torch"])
    text = "\n".join([*heading("Distillation", facts), "", (out / "results.md").read_text()])
    results = json.loads((out / "results.json").read_text())
    cost = json.loads((out / "cost.json").read_text()) if (out / "cost.json").exists() else {}
    if cost:
        listed = ", ".join(f"{name} {each:.4f}" for name, each in cost["seconds per image"].items())
        text += f"\nSeconds of all cores per image, without torch.compile: {listed}.\n"
    content = json.dumps(facts | {"cost": cost, "results": results}, indent=2) + "\n"
    for path, written in ((out / "results.md", text), (out / "results.json", content)):
        with atomic_path(path) as temporary:
            temporary.write_text(written)


if __name__ == "__main__":
    main()
