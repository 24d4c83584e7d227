"""One pretraining step, ours against MixMIM written directly from the paper (benchmarks/plain.py).

    python -m benchmarks.train_step --sizes tiny base --output benchmarks/results/train_step_epyc_202611.md

A step is: uint8 pixels to the device, normalise, draw a mask, forward, backward, AdamW. Variants: `plain` (eager,
AdamW with one kernel per tensor and operation, `loss.item()` in every step), `eager` and `compiled` (ours). Each
variant runs in its own process, so it has its own peak memory; the processes take turns, A B C A B C, so that other
work on the machine affects all alike. A ratio compares turns of one round. On a CPU compare the CPU seconds too: they
hardly change when other processes use the cores, provided that waiting threads sleep (OMP_WAIT_POLICY=PASSIVE).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import PlainMixMIM
from benchmarks.provenance import command, commit
from mixmim_serve.config import Preprocessing
from mixmim_serve.engines.hardware import processor
from mixmim_serve.model import MixMIM
from mixmim_serve.model.mixmim import random_units
from mixmim_serve.model.normalize import Normalize
from training.config import PretrainConfig
from training.optim import build_optimizer, parameter_groups
from training.pretraining import Pretraining

BATCH_SIZES = {"cpu": {"tiny": 64, "base": 8}, "cuda": {"tiny": 512, "base": 256}}
OTHER_SIZES = 8  # batch size for the others
MATMUL_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}

Step = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    size: str
    batch_size: int
    device: str
    amp: bool = True  # bf16 autocast
    warmup: int = 2  # steps before the first turn, the first of which compiles
    steps: int = 1  # timed steps of a turn

    @property
    def config(self) -> PretrainConfig:
        """The recipe at this batch size."""
        return PretrainConfig(size=self.size, batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Cost per step in one turn."""

    seconds: float
    cpu_seconds: float  # of all threads
    peak_bytes: int  # above the process's memory before it built the model


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every size, print and write the table."""
    options = parse(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    report: dict[str, Any] = {
        **environment(device),
        "command": command("train_step", arguments),
        "settings": [],
        "rows": [],
    }
    rates = [matmul_rates(device)]
    timed: list[tuple[Setting, dict[str, list[Turn]]]] = []
    for size in options.sizes:
        batch_size = options.batch_size or BATCH_SIZES[device].get(size, OTHER_SIZES)
        setting = Setting(size, batch_size, device, not options.no_amp, options.warmup, options.steps)
        timed.append(
            (setting, take_turns({name: VARIANTS[name] for name in options.variants}, setting, options.repeats))
        )
        report["settings"].append(dataclasses.asdict(setting))
        rates.append(matmul_rates(device))
    # The fastest of several: other programs can only slow it down.
    report["matmul"] = {name: max(rate[name] for rate in rates) for name in rates[0]}
    for setting, turns in timed:
        report["rows"] += summarize(setting, turns, report["matmul"])
    text = markdown(report)
    print(text)
    if options.output:
        options.output.write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"])
    parser.add_argument("--batch-size", type=int, help=f"default by size: {BATCH_SIZES}")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=7, help="rounds; each variant takes one turn per round")
    parser.add_argument("--steps", type=int, default=1, help="timed steps per turn; use 10 or more on a GPU")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-amp", action="store_true", help="float32 instead of bf16 autocast")
    parser.add_argument("--output", type=Path, help="a Markdown file; the numbers go into a .json next to it")
    return parser.parse_args(arguments)


# The steps


def plain_step(setting: Setting) -> Step:
    """A step in the style of research code."""
    config = setting.config
    inputs = make_inputs(setting)
    torch.manual_seed(0)
    model = PlainMixMIM(config.arch)
    model.load_state_dict(MixMIM(config.arch).state_dict())
    model.to(setting.device).train()
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, foreach=False)

    def step() -> float:
        pixels_BCHW, from_partner_MU = inputs()
        optimizer.zero_grad()
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.amp):
            loss = model(pixels_BCHW, from_partner_MU)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def our_step(setting: Setting, *, compiled: bool) -> Step:
    """A step as in `training.trainer.Trainer.train_step`, including the gradient norm and its check."""
    config = setting.config
    inputs = make_inputs(setting)
    task = Pretraining(config, None)
    task.to(torch.device(setting.device))
    objective = task.objective.train()
    optimizer = build_optimizer(task.parameter_groups(), config)
    optimizer.found_inf = torch.zeros((), device=setting.device)  # type: ignore[attr-defined]
    forward = torch.compile(objective) if compiled else objective

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.amp):
            loss: Tensor = forward(*inputs())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([p.grad for p in objective.parameters() if p.grad is not None])
        optimizer.found_inf.logical_or_(~norm.isfinite())  # type: ignore[attr-defined]
        optimizer.step()
        return loss.detach()

    return step


def make_inputs(setting: Setting) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns a step's pixels and mask on the device; the same for all variants."""
    arch, ratio, device = setting.config.arch, setting.config.mask_ratio, torch.device(setting.device)
    masks = torch.Generator().manual_seed(0)
    normalize = Normalize(Preprocessing.evaluation(arch.image_size)).to(device)
    shape = (setting.batch_size, arch.image_size, arch.image_size, 3)
    pixels_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if device.type == "cuda":
        pixels_BHWC = pixels_BHWC.pin_memory()

    def inputs() -> tuple[Tensor, Tensor]:
        mask = random_units(arch.units, ratio, masks)
        return normalize(pixels_BHWC.to(device, non_blocking=True)), mask.to(device, non_blocking=True)

    return inputs


VARIANTS: dict[str, Callable[[Setting], Step]] = {
    "plain": plain_step,
    "eager": functools.partial(our_step, compiled=False),
    "compiled": functools.partial(our_step, compiled=True),
}


# Turns


def take_turns(variants: dict[str, Callable[[Setting], Step]], setting: Setting, rounds: int) -> dict[str, list[Turn]]:
    """Each variant's turns, one per round."""
    with workers(variants, setting) as connections:
        turns: dict[str, list[Turn]] = {name: [] for name in variants}
        for number in range(rounds):
            for name, connection in connections.items():
                turns[name].append(ask(connection))
                print(f"{setting.size} round {number + 1} {name}: {turns[name][-1].seconds:.3f} s", file=sys.stderr)
        return turns


@contextmanager
def workers(variants: dict[str, Callable[[Setting], Step]], setting: Setting) -> Iterator[dict[str, Connection]]:
    """One process per variant, warmed up one after the other."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    try:
        for name, variant in variants.items():
            connections[name], theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, variant, setting), daemon=True))
            processes[-1].start()
            theirs.close()
            ask(connections[name], "warmed up")
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.join(10)


def ask(connection: Connection, request: str = "turn") -> Any:
    """The worker's answer.

    Raises:
        RuntimeError: with the worker's traceback, when it failed.
    """
    connection.send(request)
    answer = connection.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def work(connection: Connection, variant: Callable[[Setting], Step], setting: Setting) -> None:
    """Build the step, then take a turn on each request."""
    try:
        held = resident_bytes()
        step = variant(setting)
        for _ in range(setting.warmup):
            step()
        while True:
            request = connection.recv()
            connection.send(take_turn(step, setting, held) if request == "turn" else None)
    except EOFError:
        return
    except Exception:
        connection.send(traceback.format_exc())


def take_turn(step: Step, setting: Setting, held: int) -> Turn:
    """Timed steps after an untimed one, since memory was released after the last turn."""
    step()
    synchronize(setting.device)
    forget_peak(setting.device)
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(setting.steps):
        step()
    synchronize(setting.device)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    peak = peak_bytes(setting.device, held)
    if setting.device == "cuda":
        torch.cuda.empty_cache()  # the variants share the device
    return Turn(seconds / setting.steps, cpu_seconds / setting.steps, peak)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: str) -> None:
    """Restart peak-memory tracking, to exclude the compiler."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_bytes(device: str, held: int) -> int:
    """Peak memory since `forget_peak`: of the allocator on a GPU, of the process above `held` on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM") - held


def resident_bytes() -> int:
    """Resident memory of this process."""
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    """A size from /proc/self/status, or the process's peak where that does not exist."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kibibytes = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return 1024 * int(kibibytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


# The report


def summarize(setting: Setting, turns: dict[str, list[Turn]], matmul: dict[str, float]) -> list[dict[str, Any]]:
    """One row per variant; a ratio above 1 means that the variant is faster than `plain`."""
    flops = flops_per_image(setting) * setting.batch_size
    peak = matmul["bfloat16" if setting.amp else "float32"]
    reference = turns.get("plain", next(iter(turns.values())))
    rows = []
    for name, own in turns.items():
        seconds = statistics.median(turn.seconds for turn in own)
        row = {
            "size": setting.size,
            "batch_size": setting.batch_size,
            "variant": name,
            "seconds": spread([turn.seconds for turn in own]),
            "ratio": spread([theirs.seconds / ours.seconds for theirs, ours in zip(reference, own, strict=True)]),
            "cpu_seconds": spread([turn.cpu_seconds for turn in own]),
            "cpu_ratio": spread([a.cpu_seconds / b.cpu_seconds for a, b in zip(reference, own, strict=True)]),
            "images_per_second": round(setting.batch_size / seconds, 2),
            "model_tflops_per_second": round(flops / seconds / 1e12, 4),
            "share_of_matmul": round(flops / seconds / 1e12 / peak, 4),
            "peak_gigabytes": round(max(turn.peak_bytes for turn in own) / 1e9, 3),
        }
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, minimum, maximum."""
    return tuple(round(value, 4) for value in (statistics.median(values), min(values), max(values)))  # type: ignore[return-value]


def flops_per_image(setting: Setting) -> int:
    """Floating-point operations of forward and backward pass, as torch counts them in the plain version.

    Two operations per multiplication. Scores between the two images count, since the paper's formulation computes
    them; recomputation does not.
    """
    arch = setting.config.arch
    with torch.device("meta"):
        model = PlainMixMIM(arch)
        pixels_BCHW = torch.empty(2, 3, arch.image_size, arch.image_size)
        from_partner_MU = torch.empty(1, arch.units, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        model(pixels_BCHW, from_partner_MU).backward()
    return counter.get_total_flops() // 2


def matmul_rates(device: str, repeats: int = 10) -> dict[str, float]:
    """TFLOP/s of this machine's fastest square matrix product, by type."""
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rates[name] = max(matmul_rate(device, dtype, side, repeats) for side in MATMUL_SIDES[device])
    return rates


def matmul_rate(device: str, dtype: torch.dtype, side: int, repeats: int) -> float:
    """TFLOP/s of the fastest of `repeats` products."""
    a = torch.randn(side, side, device=device).to(dtype)
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - began)
    return round(2 * side**3 / min(times[1:]) / 1e12, 3)


def environment(device: str) -> dict[str, Any]:
    """Date, commit, hardware and versions of the measurement."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    where = ", ".join(f"{key} {report[key]}" for key in ("hardware", "threads", "python", "torch", "commit"))
    rates = ", ".join(f"{name} {rate}" for name, rate in report["matmul"].items())
    lines = [
        f"# One pretraining step, {report['date']}",
        "",
        f"Command: `{report['command']}`",
        f"Where: {where}.",
        f"Fastest matrix product of this machine: {rates} TFLOP/s.",
        "Median (least to most) over rounds; a ratio compares turns of one round, above 1 is faster than `plain`.",
        "",
        "| size, batch | variant | s per step | times plain | CPU s per step | images/s | model TFLOP/s "
        "| of the matrix product | peak memory, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [table_row(row) for row in report["rows"]]
    return "\n".join(lines) + "\n"


def table_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [
        f"{row['size']}, {row['batch_size']}",
        row["variant"],
        show(row["seconds"], 3),
        show(row["ratio"], 2),
        show(row["cpu_seconds"], 3),
        f"{row['images_per_second']:.1f}",
        f"{row['model_tflops_per_second']:.3f}",
        f"{100 * row['share_of_matmul']:.0f} %",
        f"{row['peak_gigabytes']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def show(values: Sequence[float], digits: int) -> str:
    """Median and spread."""
    median, least, most = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({least} to {most})"


if __name__ == "__main__":
    main()
