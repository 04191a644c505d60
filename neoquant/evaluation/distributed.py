"""Several processes that share an evaluation, as torchrun starts them.

`torchrun --nproc-per-node 4 -m neoquant eval ...`: every process reads the same text and makes the same batches; each
scores every n-th one, and all of them end with the whole result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from neoquant.errors import RequestError


class ProcessGroup(NamedTuple):
    """This process's rank, from 0, and the number of processes."""

    rank: int = 0
    size: int = 1

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank. Each process calls this once, and waits for the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def require_equal(self, key: str) -> None:
        """Raise RequestError in every process unless all of them give the same key."""
        keys = self.all_gather(key)
        other = next((rank for rank, theirs in enumerate(keys) if theirs != keys[0]), None)
        if other is not None:
            raise RequestError(
                f"process {other} evaluates something else than process 0: all need the same models, text and versions"
            )


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The process group that torchrun's environment variables describe; one process where there are none.

    Raises RequestError where the variables describe a group that cannot be initialized.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield SINGLE_PROCESS
        return
    try:
        dist.init_process_group("gloo")  # what is exchanged lies on the CPU
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"WORLD_SIZE is {size}, but its processes cannot be joined: {error}") from None
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
