"""Copies between the host and a GPU for which neither waits.

An ordinary copy waits until the GPU has done all that it was asked for before, and meanwhile nobody asks it for more.
Copies of pinned memory take their turn among the GPU's work instead. On a CPU nothing is copied or delayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. What comes from the host may be changed or let go of at once."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch holds pinned memory until copies of it are through


def on_host(made: Iterable[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
    """The groups of tensors of `made` in the host's memory, in their order.

    A group on a GPU is yielded once the next one was asked for: whoever takes it works while the GPU computes that one.
    Groups on the CPU are yielded as they come. All tensors of a group lie on one device.
    """
    before: _UnderWay | None = None
    for group in made:
        if not group or group[0].device.type != "cuda":
            yield group
            continue
        begun = _UnderWay(group)
        if before is not None:
            yield before.arrived()
        before = begun
    if before is not None:
        yield before.arrived()


class _UnderWay:
    """Tensors of a GPU on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
        self._event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def arrived(self) -> list[Tensor]:
        self._event.synchronize()
        return self._copies
