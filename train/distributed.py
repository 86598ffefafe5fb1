"""Several processes of one training, as ``torchrun`` starts them: who am I, and how is what each has put together.

``torchrun --nproc-per-node 2 -m fastload train photos.beton --model resnet18``. torch's own DistributedDataParallel does the
work; here is only what the loop has to know. Without ``torchrun`` all of this is one process and costs nothing.

>>> with ranks() as r: r.first, r.size
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank`` among ``size``, and the number of its GPU on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, total: int, rank: int | None = None) -> int:
        """Samples of ``rank`` (None: this one) when ``total`` are dealt out one by one, as the loader does."""
        mine = self.rank if rank is None else rank
        return total // self.size + (mine < total % self.size)

    def agree(self, value: Any) -> Any:
        """The first process's ``value``, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, by rank, in all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes; ``values`` is left as it was."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def join_rows(self, part: np.ndarray, total: int) -> np.ndarray:
        """Rows (N, C) of all processes in the order of the data, from the rows that each made of its share.

        Process r has rows r, r + size, ...; none is padded and none comes twice, so nothing is scored twice.
        """
        if self.size == 1:
            return part
        whole = np.empty((total, part.shape[1]), part.dtype)
        for rank, rows in enumerate(self.gather(part)):
            whole[rank :: self.size] = rows
        return whole

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, or stay alone. A process group that is there already is used and left."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_available() or size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    ours = not dist.is_initialized()
    if ours:
        cuda = torch.cuda.is_available() and local < torch.cuda.device_count()
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
    finally:
        if ours:
            dist.destroy_process_group()
