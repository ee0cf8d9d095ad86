"""Data parallel by `torchrun`: every rank holds the model and the policy, and takes its part of
each batch. Means over the ranks make gradients and rewards equal, and so all that follows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    count: int = 1

    @property
    def part(self) -> slice:
        """Which samples of a batch are this rank's."""
        return slice(self.rank, None, self.count)

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over the ranks into tensors of all of them, in place."""
        given = list(tensors)
        if self.count == 1 or not given:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in given])
        dist.all_reduce(flat)
        for t, part in zip(given, torch.split(flat, [t.numel() for t in given]), strict=True):
            t.copy_(part.reshape(t.shape) / self.count)

    def mean_of(self, *values: float) -> tuple[float, ...]:
        """Means over the ranks of numbers."""
        held = torch.tensor(values, dtype=torch.float64)
        self.mean([held])
        return tuple(held.tolist())


def leads() -> bool:
    """Is this the process that writes files?"""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started (gloo), or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
