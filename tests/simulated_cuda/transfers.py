"""Copies that the host does not wait for, between pinned memory and the simulated device, and the events that end them.

A copy to the host arrives at the last moment that CUDA allows, when the host has waited for it: until then the memory
holds what nobody meant (NaN, the least integer). A copy to the device may read the host's memory as late: whoever has
written there before the host has waited is told of it. Memory that nobody holds any more is not written or looked at,
as torch's allocator of pinned memory keeps it until copies are through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Transfers:
    """Of one device, whose work is done in the order in which it is asked for."""

    def __init__(self) -> None:
        self._pinned: dict[int, StorageWeakRef] = {}
        self._on_their_way: dict[int, Callable[[], None]] = {}
        self.begun = 0

    def pin(self, tensor: Tensor) -> Tensor:
        """Let the memory of a tensor of the host be pinned. Raises what torch raises for another's."""
        if type(tensor) is not Tensor:
            raise RuntimeError("cannot pin memory that is not the host's")
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)  # which keeps the number from being another's
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def to_host(self, target: Tensor, values: Tensor) -> None:
        """Into `target`, pinned."""
        kept, values = _if_held(target), values.clone()
        target.fill_(_garbage(target.dtype))

        def arrive() -> None:
            if (found := kept()) is not None:
                found.copy_(values)

        self._begin(arrive)

    def from_host(self, source: Tensor, where: str) -> None:
        """Out of `source`, pinned, by the line `where`."""
        kept, values = _if_held(source), source.clone()

        def compare() -> None:
            if (found := kept()) is not None and not torch.equal(_bytes(found), _bytes(values)):
                raise AssertionError(f"pinned memory was written while it was copied to the device ({where})")

        self._begin(compare)

    def finish(self, until: int | None = None) -> None:
        """The host has waited for all copies, or for those among the first `until`."""
        for number in [number for number in self._on_their_way if until is None or number < until]:
            self._on_their_way.pop(number)()

    def is_finished(self, until: int) -> bool:
        return not any(number < until for number in self._on_their_way)

    def _begin(self, end: Callable[[], None]) -> None:
        self._on_their_way[self.begun] = end
        self.begun += 1


class Event:
    """A CUDA event. One that was never recorded is there at once."""

    transfers: Transfers
    wait_for: Callable[[str], None]
    """Has the wait counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._until = 0

    def record(self, stream: Any = None) -> None:
        self._until = self.transfers.begun

    def synchronize(self) -> None:
        type(self).wait_for("event")
        self.transfers.finish(self._until)

    def query(self) -> bool:
        return self.transfers.is_finished(self._until)


def _if_held(tensor: Tensor) -> Callable[[], Tensor | None]:
    """What gives the tensor for as long as somebody holds its memory."""
    storage = StorageWeakRef(tensor.untyped_storage())
    described = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def found() -> Tensor | None:
        if storage.expired():
            return None
        dtype, offset, shape, stride = described
        memory = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)  # type: ignore[attr-defined]
        return torch.empty(0, dtype=dtype).set_(memory, offset, shape, stride)

    return found


def _garbage(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
