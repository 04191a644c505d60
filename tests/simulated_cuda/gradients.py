"""`torch.autograd.grad` on the simulated device: torch's own nodes, called one after the other from Python.

torch's engine would ask the driver for the device's streams, and there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, *, allow_unused: bool = False, **others: Any
) -> tuple[Tensor | None, ...]:
    """Of `outputs`, weighted with `grad_outputs`, at `inputs`. Raises RuntimeError where one of these has none."""
    assert not others["create_graph"] and not others["is_grads_batched"], "that is not simulated"
    outputs, inputs = _listed(outputs), _listed(inputs)
    weights = map(torch.ones_like, outputs) if grad_outputs is None else _listed(grad_outputs)
    with torch.no_grad():
        found = _gradients(outputs, inputs, list(weights))
    if any(gradient is None for gradient in found) and not allow_unused:
        raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph.")
    return tuple(found)


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor | None]:
    edges = [_edge(tensor) for tensor in outputs]
    sums: dict[Any, dict[int, Tensor]] = {}  # of each node: the gradient at each of its outputs
    for (node, slot), gradient in zip(edges, given, strict=True):
        _add(sums.setdefault(node, {}), slot, gradient)
    found: dict[tuple[Any, int], Tensor] = {}
    wanted = [_edge(tensor) for tensor in inputs]
    for node in _in_order([edge[0] for edge in edges]):
        gradients = sums.pop(node, {})
        for slot, gradient in gradients.items():
            if (node, slot) in wanted:
                found[node, slot] = gradient
        if not gradients or _is_leaf(node):
            continue
        made = node(*map(gradients.get, range(len(node._input_metadata))))
        made = made if isinstance(made, tuple) else (made,)
        for (following, slot), gradient in zip(node.next_functions, made, strict=True):
            if following is not None and gradient is not None:
                _add(sums.setdefault(following, {}), slot, gradient)
    return [found.get(edge) for edge in wanted]


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """The node that made a tensor, or takes the gradient of a leaf, and which of its outputs it is."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _add(to: dict[int, Tensor], slot: int, gradient: Tensor) -> None:
    to[slot] = to[slot] + gradient if slot in to else gradient


def _is_leaf(node: Any) -> bool:
    return bool(node.name() == "torch::autograd::AccumulateGrad")


def _in_order(roots: Sequence[Any]) -> list[Any]:
    """All nodes below the roots, those first that were made last, as torch's engine takes them (so sums are in its
    order); then the leaves."""
    found, stack = set(roots), list(roots)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None and following not in found:
                found.add(following)
                stack.append(following)
    return sorted(found, key=lambda node: (_is_leaf(node), -node._sequence_nr()))
