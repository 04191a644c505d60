"""Layers on a quantized weight, which are buffers and a kernel, and on a plain one that stays as it is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neoquant import native
from neoquant.kernels import Kernel, State, choose, operators
from neoquant.native import products
from neoquant.tensor import QuantizedTensor


class QuantLinear(nn.Module):
    """x[..., I] -> [..., O], computed in x's type or in `compute_dtype`, like the `nn.Linear` it stands for.

    The weight's tensors are buffers in the kernel's arrangement. They move with `.to(device)` but are never cast:
    `.half()` and `.to(dtype)` leave them as they are stored. A layer that was given no kernel takes the fastest of
    another kind of device that it is moved to. Gradients flow to x, not to the weight.
    """

    is_given_kernel = False

    def __init__(
        self,
        q: QuantizedTensor,
        bias: Tensor | None = None,
        kernel: Kernel | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """`q` and `bias`[O] on the device the layer is to live on; `kernel` None is the fastest there.

        `compute_dtype` is what x, bias and result are cast to in between, as bitsandbytes does; None leaves x as it is.
        """
        super().__init__()
        self.compute_dtype = compute_dtype
        self.out_features, self.in_features = q.shape
        self.grid, self.dtype = q.grid, q.dtype
        self.is_given_kernel = kernel is not None
        self.kernel = kernel or choose(q.grid, q.shape, q.codes.device, q.order is not None)
        for name, tensor in self.kernel.pack(q).items():
            self.register_buffer(name, tensor)
        self._describe()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def ordered(self) -> bool:
        """Whether the weight has an activation order."""
        return "order" in self._buffers

    @property
    def qweight(self) -> Tensor:
        """One of the tensors that hold the weight, which tells where it lies; the name is the one PEFT looks for."""
        return next(iter(self.state.values()))

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it was given, bit for bit."""
        return self.kernel.unpack(self.state, self.grid, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        inside = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(inside.dtype)
        if torch.compiler.is_compiling() or inside.is_meta:
            y: Tensor = operators.linear(inside, list(self.state.values()), self.described, bias)
        else:
            y = self.kernel.linear(inside, self.state, self.grid, self.shape, bias)
        return y.to(x.dtype)

    def set_activations(self, activations: str) -> None:
        """What may be done to x: "exact" is nothing, "int8" rounds it in runs of inputs, which is faster."""
        device = next(iter(self.state.values())).device
        self._take(choose(self.grid, self.shape, device, self.ordered, activations))

    def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, ids[...] -> dtype[..., I]."""
        if torch.compiler.is_compiling() or ids.is_meta:
            rows: Tensor = operators.embedding(ids, list(self.state.values()), self.described, dtype)
            return rows
        return self.kernel.embedding(ids, self.state, self.grid, self.shape, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.grid}, kernel={self.kernel.name}"

    @property
    def state(self) -> State:
        """What the kernel holds of the weight, by its names."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        stored, former = self.state, self.qweight.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own is not typed
        for name, tensor in self.state.items():
            if tensor.dtype != stored[name].dtype:  # fn casts: move the stored bits instead
                self._buffers[name] = stored[name].to(tensor.device)
        self._choose_again(former)
        return self

    def _choose_again(self, former: torch.device) -> None:
        """Behind a move from `former`: take the fastest kernel of another kind of device, unless one was given that
        runs there too; elsewhere, one that can run where the one held cannot."""
        device = self.qweight.device
        moved = former.type not in ("meta", device.type) and not self.is_given_kernel
        refused = self.kernel.refuse(self.grid, self.shape, device, self.ordered)
        if device.type == "meta" or not (moved or refused):
            return
        self._take(choose(self.grid, self.shape, device, self.ordered, self.kernel.activations))

    def _take(self, kernel: Kernel) -> None:
        """Hand the weight to another kernel; one that holds it alike takes it as it lies."""
        held, self.kernel, former = self.state, kernel, self.kernel
        if isinstance(kernel, type(former)) or isinstance(former, type(kernel)):
            self._describe()
            return
        q = former.unpack(held, self.grid, self.shape, self.dtype)
        for name in held:
            del self._buffers[name]
        for name, tensor in kernel.pack(q).items():
            self.register_buffer(name, tensor)
        self._describe()

    def _describe(self) -> None:
        """What operators are told of the layer, while it is compiled."""
        self.described = operators.describe(self.kernel, list(self.state), self.grid, self.shape)


class StoredLinear(nn.Linear):
    """A plain layer that computes in x's type whatever type its weight is held in, half of float32's memory for one.

    The values are those of the weight cast to x's type, but where the native library runs, nothing is cast beforehand.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        """`weight`[O, I] and `bias`[O] are taken as they are."""
        nn.Module.__init__(self)  # a weight of nn.Linear's own would be drawn first
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.dtype != self.weight.dtype and self._is_native_for(x):
            y = products.multiply(x.reshape(-1, x.shape[-1]), products.plain(self.weight.detach()), bias)
            return y.view(*x.shape[:-1], self.out_features)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    def _is_native_for(self, x: Tensor) -> bool:
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[-1] != self.in_features:
            return False
        return not (torch.is_grad_enabled() or is_traced()) and is_native(self.weight)


class StoredEmbedding(nn.Embedding):
    """Rows in the type that the model is cast to, of a table [V, C] that is held in another."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0  # what nn.Embedding looks at
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = weight
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.get_buffer("like").dtype)


def is_traced() -> bool:
    """Whether somebody writes down or takes over what is done (a compiler, a counter, tensors without values), which
    must then be torch's own operations."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_hooked(module: nn.Module) -> bool:
    """Whether it has hooks, or a `forward` of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__


def is_native(weight: Tensor) -> bool:
    """Whether the native library multiplies with this plain weight where it lies."""
    kind = weight.dtype in (torch.float32, torch.float16, torch.bfloat16) and weight.device.type == "cpu"
    return kind and weight.is_contiguous() and native.active().library is not None


class QuantEmbedding(nn.Module):
    """ids[...] -> rows [..., C] of a quantized table, like the `nn.Embedding` it stands for.

    `table` is the same weight as a linear layer, C -> V: a tied head is that very layer, so that it is held once. Rows
    come in the type that the model is cast to.
    """

    def __init__(self, q: QuantizedTensor, dtype: torch.dtype, kernel: Kernel | None = None) -> None:
        """`q`[V, C] on the device the layer is to live on; `dtype` of the rows; `kernel` None is the fastest there."""
        super().__init__()
        self.table = QuantLinear(q, kernel=kernel)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=q.codes.device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table.embedding(ids, self.get_buffer("like").dtype)
