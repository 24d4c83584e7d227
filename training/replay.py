"""Runs a step again that gave a non-finite gradient and was saved (nonfinite.py)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixmim_serve.errors import DataError
from mixmim_serve.settings import from_dict
from training.augment import step_seed
from training.config import DistillConfig, FinetuneConfig, PretrainConfig
from training.data import Batch
from training.distillation import Distillation, read_teacher
from training.finetuning import Finetuning
from training.pretraining import Pretraining
from training.start import Start, read_start
from training.task import Objective, Task


def replay(run: Path, rank: int = 0) -> list[str]:
    """Run the saved step again in bf16 and in float32; one line per part says where it stops being finite.

    Raises:
        DataError: when the run saved no such step, or its teacher is not the same any more.
    """
    folder = run / "nonfinite"
    if not (folder / "report.json").is_file():
        raise DataError(f"{folder} holds no saved step: only a run that stopped at a non-finite gradient has one.")
    report = json.loads((folder / "report.json").read_text())
    tensors = load_file(folder / f"batch-rank{rank}.safetensors")
    task = rebuild(run, read_start(folder / "weights.safetensors"))
    lines = [f"step {report['step'] + 1}, {len(report['images'])} images, seed {report['seed']}"]
    for bf16 in (True, False):
        for part in range(report["parts"]):
            batch = Batch(**{name: tensors[f"{part}.{name}"] for name in Batch._fields[:-1]}, unreadable=())
            mask_seed = step_seed(report["seed"], report["step"], rank)
            seed = step_seed(report["seed"], report["step"], rank, part)
            finding = first_nonfinite(task.objective, task.inputs(batch, mask_seed, seed), seed, bf16)
            lines.append(f"{'bf16' if bf16 else 'float32'}, part {part + 1}: {finding}")
    return lines


def rebuild(run: Path, saved: Start) -> Task:
    """The run's task on the CPU, with the saved weights."""
    saved_run = json.loads((run / "config.json").read_text())
    task: Task
    if saved_run["task"] == Pretraining.name:
        config = dataclasses.replace(from_dict(PretrainConfig, saved_run["config"]), size="")
        task = Pretraining(config, None, start=saved)
    elif saved_run["task"] == Distillation.name:
        teacher = read_teacher(Path(saved_run["origin"]["teacher"]["path"]))
        task = Distillation(from_dict(DistillConfig, saved_run["config"]), None, teacher)
        if task.start != saved_run["start"]:
            raise DataError(f"{teacher.path} is not the teacher that {run} began with: put that one back in its place.")
    else:
        tuning = dataclasses.replace(from_dict(FinetuneConfig, saved_run["config"]), size="")
        task = Finetuning(tuning, saved.description.labels, saved, None)
    task.objective.train().model.load_state_dict(saved.weights)
    if (objective := run / "nonfinite" / "objective.pt").is_file():
        task.objective.load_resume_state(torch.load(objective, map_location="cpu", weights_only=True))
    return task


def first_nonfinite(objective: Objective, inputs: tuple[Tensor, ...], seed: int, bf16: bool) -> str:
    """In words: the first non-finite weight or module output, the number of non-finite gradients, and the loss."""
    bad = [name for name, weight in objective.model.named_parameters() if not weight.isfinite().all()]
    if bad:
        return f"the weights of {bad[0]} are not finite before the step"
    outputs: list[str] = []
    hooks = [module.register_forward_hook(_watch(name, outputs)) for name, module in objective.named_modules()]
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = objective(*inputs)
    for hook in hooks:
        hook.remove()
    objective.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [
        name
        for name, weight in objective.named_parameters()
        if weight.grad is not None and not weight.grad.isfinite().all()
    ]
    where = f"first in the output of {outputs[0]}" if outputs else "all outputs are finite"
    return f"loss {loss.item():.6g}, {where}, {len(gradients)} gradients not finite"


def _watch(name: str, outputs: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            outputs.append(name or "the loss")

    return hook
