"""One process or many (`torchrun`), on one machine or several: DDP, or FSDP2 when a model outgrows a device."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mixmim_serve.model.blocks import Block
from training.config import RunConfig

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
SETTLE = 0.5  # seconds that `join_world` waits before it destroys the process group


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and this one's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes; overwrites `values`."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; every process must call this."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor)

    def wait(self) -> None:
        """Block until every process has called this."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """The process group that torchrun started, or this process alone."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # a process that exits while another still communicates with it can crash that one
        # gloo's thread takes the interpreter's lock once more after each collective. If DDP's reducer destroys the
        # group before that, as the interpreter exits, the destructor holds the lock and waits for the thread forever
        # (torch 2.13). Nothing signals that the thread is done; while asleep, this one does not hold the lock.
        time.sleep(SETTLE)
    finally:
        dist.destroy_process_group()


def wrap(objective: nn.Module, world: World, config: RunConfig) -> nn.Module:
    """The module to call: the objective, wrapped in DDP or with its `model` in FSDP2. Parameters keep their names."""
    if config.checkpoint_activations:
        for block in _blocks(objective):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    if config.shard and world.size > 1:
        model = objective.get_submodule("model")
        for block in _blocks(model):
            fully_shard(block)
        fully_shard(model)
        for method in ("pretrain", "reconstruct"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
        return objective
    if world.size > 1:
        ids = [world.device] if world.device.type == "cuda" else None
        # Our buffers are constants, so they need no broadcast; newer versions of torch renamed the option.
        options = inspect.signature(DistributedDataParallel).parameters
        broadcast = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        no_broadcast: dict[str, Any] = {broadcast: False}
        return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True, **no_broadcast)
    return objective


@contextlib.contextmanager
def synchronized(module: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients only in the last accumulated part."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    for child in module.children():
        if isinstance(child, FSDPModule):
            child.set_requires_gradient_sync(last)
    yield


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the model's own names, gathered if sharded; every process must call this."""
    weights: dict[str, Any] = get_model_state_dict(model, options=GATHERED) if _sharded(model) else model.state_dict()
    return weights


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, gathered if sharded; every process must call this."""
    if not _sharded(model):
        return optimizer.state_dict()
    return dict(get_optimizer_state_dict(model, optimizer, options=GATHERED))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The inverse of `gather_weights`."""
    if _sharded(model):
        set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `gather_optimizer`."""
    if _sharded(model):
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)


def _sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _blocks(module: nn.Module) -> list[Block]:
    return [child for child in module.modules() if isinstance(child, Block)]
