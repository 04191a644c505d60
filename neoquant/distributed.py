"""Several processes that share one piece of work, as torchrun starts them.

`torchrun --nproc-per-node 4 -m neoquant eval ...`: every process reads the same text and makes the same batches; each
scores every n-th one, and all of them end with the whole result. `quantize --calibration` shares the calibration
samples likewise.

Whoever fails says why and exits; the others find that out when they next exchange something, and end as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from neoquant.errors import LostProcessError, RequestError

PATIENCE = timedelta(days=7)
"""How long a process waits for the others, which may have much more to do; that one has ended is noticed at once."""


class ProcessGroup(NamedTuple):
    """This process's rank, from 0, and the number of processes; the same among those of its machine.

    What exchanges something is called by every process, in the same order, and waits for the others. It raises
    LostProcessError where one of them has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def share(self, count: int) -> range:
        """The numbers of those of `count` things that are this process's: one stretch, as long as the others' or one
        longer."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _exchanging():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any, rank: int = 0) -> Any:
        """The value of the process of that rank; what the others give does not matter."""
        if self.size == 1:
            return value
        values = [value if rank == self.rank else None]
        with _exchanging():
            dist.broadcast_object_list(values, rank)
        return values[0]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, which all have of the same shape, type and kind of device; `tensor` may be
        overwritten."""
        if self.size == 1:
            return tensor
        self.wait()  # on the CPU: a GPU that waits for a process that has ended cannot be interrupted
        with _exchanging():
            here = tensor if tensor.device.type == "cpu" or _has_nccl() else tensor.cpu()
            here = here.contiguous()
            dist.all_reduce(here)
            return here.to(tensor.device)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            with _exchanging():
                dist.all_reduce(torch.zeros(1))

    def require_equal(self, key: str) -> None:
        """Raise RequestError in every process unless all of them give the same key."""
        keys = self.all_gather(key)
        other = next((rank for rank, theirs in enumerate(keys) if theirs != keys[0]), None)
        if other is not None:
            raise RequestError(
                f"process {other} works on something else than process 0: all need the same models, text and versions"
            )


SINGLE_PROCESS = ProcessGroup()


def is_shared() -> bool:
    """Whether this process was started as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def process_group(*, cuda: bool = False) -> Iterator[ProcessGroup]:
    """The process group that torchrun's environment variables describe; one process where there are none.

    `cuda`: whether tensors on GPUs are to be exchanged, by NCCL; what lies on the CPU always is, by Gloo.

    Raises RequestError where the variables describe a group that cannot be initialized.
    """
    if not is_shared():
        yield SINGLE_PROCESS
        return
    try:
        nccl = cuda and torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        size = os.environ["WORLD_SIZE"]
        raise RequestError(f"WORLD_SIZE is {size}, but its processes cannot be joined: {error}") from None
    try:
        local = (
            int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        )
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), *local)
    except LostProcessError:
        raise
    except BaseException:
        speaks_first()  # before the others find out that this process has gone
        raise
    finally:
        dist.destroy_process_group()


@cache
def speaks_first() -> bool:
    """Whether no other process of the group has asked this before: what ends all of them is said once.

    torchrun itself keeps count. Without it there is nobody left to ask once a process has ended, so every one speaks.
    """
    if not is_shared() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    run = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=False, timeout=timedelta(seconds=5)
        )
        return int(store.add(f"neoquant/{run}/spoke", 1)) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


@contextmanager
def _exchanging() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
        raise LostProcessError(f"another process of this run has ended, or cannot be reached ({reason})") from error


def _has_nccl() -> bool:
    return "nccl" in dist.get_backend_config()
