"""Ranks: the processes of one run that torchrun started, which train and do lm-eval's tasks together; the first does the rest.

    torchrun --nproc-per-node 8 -m qtool run recipe.yaml --out DIR        or accelerate launch, or qtool eval
All of them read one disk. Each sees its share of every batch, and sums of gradients, so that the losses are those of one
process up to the order of additions, and to products in bfloat16 that differ with the shape of a batch.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

LONGEST = timedelta(days=30)  # what the others wait for the first, which may quantize in between


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, answer: bool) -> bool:
        """The first process's answer."""
        if self.size == 1:
            return answer
        said = [answer]
        dist.broadcast_object_list(said)
        return said[0]

    def add(self, value: float, device: torch.device) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total)

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Let every process have the sum of all gradients."""
        for p in parameters if self.size > 1 else []:
            if p.grad is None:
                p.grad = torch.zeros_like(p)  # another process may have seen it
            dist.all_reduce(p.grad)

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a batch [batch, ...]."""
        return rows.tensor_split(self.size)[self.rank]


def asked_for() -> Ranks:
    """What torchrun says in the environment; one process where it did not start this."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextlib.contextmanager
def together() -> Iterator[Ranks]:
    """The processes of this run, connected inside; on GPUs each has its own."""
    ranks = asked_for()
    if ranks.size == 1 or dist.is_initialized():
        yield ranks
        return
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=LONGEST)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Let each process hold a part of every parameter, and gather a block's when it is called (FSDP)."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def unshard(model: nn.Module) -> None:
    """Let each process hold every parameter whole again; nothing where none was cut."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer, is_sharded: bool) -> dict[str, Any]:
    """What model and optimizer hold, whole; of parts, in the first process alone."""
    if not is_sharded:
        return {"student": model.state_dict(), "optimizer": optimizer.state_dict()}
    found = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"student": found[0], "optimizer": found[1]}


def restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], is_sharded: bool) -> None:
    """Give both what `full_state` told."""
    if is_sharded:
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            model, optimizer, model_state_dict=saved["student"], optim_state_dict=saved["optimizer"], options=options
        )
    else:
        model.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
