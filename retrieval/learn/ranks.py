"""Several processes that train one model: each reads a share of every batch, then all take the same step.

Every process draws the same batch, encodes its share of the rows and gathers the vectors of the others. Each then computes the
whole loss, whose gradient reaches only the vectors that the process made itself, so the sum of the weights' gradients over
processes is that of one process. torch's DDP wrapper averages and expects one forward pass per step; here there are many.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from retrieval.device import checked_device

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """This process in the group that `joined` opened, or alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def shares(self, lengths: Ints) -> list[Ints]:
        """Positions of the rows that each process encodes: every world-th in order of length, so that all work alike."""
        if self.world == 1:
            return [np.arange(len(lengths))]
        order = np.argsort(lengths, kind="stable")
        return [order[rank :: self.world] for rank in range(self.world)]

    def gather(self, own: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The vectors [sum(sizes), D] of all processes, in order of rank; gradients flow into this one's part only."""
        if self.world == 1:
            return own
        padded = functional.pad(own.detach(), (0, 0, 0, max(sizes) - len(own))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([own if rank == self.rank else part[: sizes[rank]] for rank, part in enumerate(parts)])

    def sum_gradients(self, weights: Iterable[torch.Tensor]) -> None:
        """Afterwards every process holds the sum of all gradients of each trained weight."""
        if self.world == 1:
            return
        for weight in weights:
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                distributed.all_reduce(weight.grad)

    def same(self, values: torch.Tensor) -> torch.Tensor:
        """The first process's values, written into `values` everywhere: rounding must not let processes part ways."""
        if self.world > 1:
            distributed.broadcast(values, 0)
        return values

    def agreed(self, value: float) -> float:
        """The first process's value."""
        return float(self.same(torch.tensor(value, dtype=torch.float64))) if self.world > 1 else value

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            distributed.barrier()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over processes; then all of them must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(value: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """Of a value this process's part, if `example` is spread over processes and has its shape; otherwise the value."""
    if not isinstance(example, DTensor) or value.shape != example.shape:
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Opens the process group that torchrun describes in the environment (none without torchrun), and closes it afterwards.

    Raises DeviceMissing."""
    checked_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks.here()
    finally:
        distributed.destroy_process_group()
