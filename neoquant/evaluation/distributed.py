"""Several processes that share an evaluation: which batches are whose, and putting together what they counted.

`torchrun --nproc-per-node 4 -m neoquant eval ...` starts them. Every process reads the same text and cuts the same
batches; each scores every n-th one, and all of them end with the whole result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from neoquant.errors import RequestError


class Team(NamedTuple):
    """This process's number, from 0, and how many there are."""

    rank: int = 0
    size: int = 1

    def share(self, value: Any) -> list[Any]:
        """What every process gave, by rank: each calls this once, and waits for the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, key: str) -> None:
        """Raise RequestError in every process where they do not all give the same key."""
        keys = self.share(key)
        other = next((rank for rank, theirs in enumerate(keys) if theirs != keys[0]), None)
        if other is not None:
            raise RequestError(
                f"process {other} evaluates something else than process 0: all need the same models, text and versions"
            )


ALONE = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """The team that torchrun's environment variables describe, of one process where there are none.

    Raises RequestError where they say that there is a team that cannot be joined.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield ALONE
        return
    try:
        dist.init_process_group("gloo")  # what is exchanged lies on the CPU
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"WORLD_SIZE is {size}, but its processes cannot be joined: {error}") from None
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
