"""On a CPU, nothing is copied or delayed; on GPUs see tests/simulated_cuda."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from neoquant.model.transfers import on_host, to_device


def test_groups_of_the_cpu_are_given_as_they_come() -> None:
    happened: list[str] = []

    def made() -> Iterator[list[torch.Tensor]]:
        for number in range(3):
            happened.append(f"made {number}")
            yield [torch.tensor([number])] * number

    groups = made()
    for number, group in enumerate(on_host(groups)):
        happened.append(f"given {len(group)}")
        assert [int(tensor) for tensor in group] == [number] * number
    assert happened == ["made 0", "given 0", "made 1", "given 1", "made 2", "given 2"]


def test_tensors_of_the_cpu_are_not_copied() -> None:
    group = [torch.rand(2), torch.rand(3)]
    (found,) = on_host([group])
    assert found is group
    assert to_device(group[0], torch.device("cpu")) is group[0]
