"""A CUDA device that is not there, with a GPU's discipline: tensors that say `cuda:0` over ordinary memory.

- What mixes them with tensors on the CPU raises what CUDA raises; 0-dimensional ones may be mixed, as there.
- Their address and their numpy view cannot be had; a generator must lie where it draws.
- Counted, with the line of neoquant that asks for them: launches, points at which the host waits for the device, and
  copies from the host, which wait for what was launched before them. Copies between pinned memory and the device need
  not, and then count as transfers: see `transfers`.

An operation counts as one launch, unless all that it gives lies in memory that it was given (a view) or is not yet
written (an allocation). In inference mode torch hands composite operations over in one piece: they count once.
A CUDA graph records the operations that reach the device and repeats them on the same memory; recording changes
nothing, and what waits or copies from the host meanwhile raises.
Nothing here says how long anything takes. Gradients are computed by `torch.autograd.grad` alone: see `gradients`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import neoquant
from neoquant.grids import load_bitsandbytes
from neoquant.triton import running
from simulated_cuda.gradients import grad
from simulated_cuda.guard import load_guard
from simulated_cuda.transfers import Event, Transfers

CUDA = torch.device("cuda", 0)
MEMORY = 80 << 30
PACKAGE = str(Path(neoquant.__file__).parent)
aten = torch.ops.aten

WAITING = {
    f"aten::{name}"
    for name in (
        "item", "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique",
        "_unique2", "unique_consecutive", "bincount", "linalg_cholesky", "cholesky", "linalg_inv", "linalg_solve",
        "inverse", "linalg_eigh", "linalg_lstsq", "multinomial",
    )
}  # fmt: skip
ALLOCATING = {f"aten::{name}" for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")}
INDEXING = {f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")}


class OnDevice(torch.Tensor):
    """A tensor on the simulated device; `memory` is what it holds."""

    memory: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> OnDevice:
        with torch.inference_mode(False):
            like = torch.empty_strided(memory.shape, memory.stride(), dtype=memory.dtype, device="meta")
            made: OnDevice = torch.Tensor._make_subclass(  # type: ignore[attr-defined]
                cls, like, memory.requires_grad, dispatch_device=True, device_for_backend_keys=CUDA
            )
        made.memory = memory
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the simulated device, which is no longer there")

    def data_ptr(self) -> int:
        raise AssertionError("the address of a CUDA tensor was handed out")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo: Any) -> OnDevice:
        made = OnDevice(self.memory.clone())
        made._is_param = getattr(self, "_is_param", False)  # type: ignore[attr-defined]
        memo[id(self)] = made
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.memory})"


class Counts:
    """What the device was asked for, by the line of neoquant that asked."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        """From the host's memory."""
        self.transfers: Counter[str] = Counter()
        """Either way, which the host does not wait for."""
        self.under_way = Transfers()
        self.recording: Graph | None = None

        self.current = 0
        """The number of the current device; others than 0 have nothing to do."""

    def reset(self) -> None:
        for counter in (self.launches, self.waits, self.copies, self.transfers):
            counter.clear()

    def wait(self, what: str) -> None:
        """The host waits for all that the device was asked for."""
        self.wait_for(what)
        self.under_way.finish()

    def wait_for(self, what: str) -> None:
        """The host waits for a part of it."""
        self._refuse_in_graphs(what)
        self.waits[f"{where()} ({what})"] += 1

    def copy(self) -> None:
        """Something comes from the host's memory, and the host waits until it is there."""
        self._refuse_in_graphs("copy from the host")
        self.copies[where()] += 1
        self.under_way.finish()

    def send(self, source: torch.Tensor) -> None:
        """Something comes from the host's pinned memory, perhaps later."""
        self._refuse_in_graphs("transfer from the host")
        self.transfers[where()] += 1
        self.under_way.from_host(source, where())

    def fetch(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Values of the device's come into the host's pinned memory, perhaps later."""
        self._refuse_in_graphs("transfer to the host")
        self.transfers[where()] += 1
        self.under_way.to_host(target, values)

    def require_current(self, what: str) -> None:
        """For what looks at the current device instead of that of its tensors."""
        if self.current != 0:
            raise RuntimeError(f"{what} on cuda:{self.current}, the current device, and the tensors lie on cuda:0")

    def _refuse_in_graphs(self, what: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing ({what}, {where()})")

    def totals(self) -> tuple[int, int, int]:
        """Launches, waits, copies from the host."""
        return self.launches.total(), self.waits.total(), self.copies.total()


class Graph:
    """A CUDA graph: what it was told of, in order."""

    counts: Counts

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.generators: list[torch.Generator] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        states = [generator.get_state() for generator in self.generators]
        self.counts.require_current("a graph records")
        self.counts.recording = self
        try:
            yield
        finally:
            self.counts.recording = None
        for memory, before in self._before.values():
            memory.copy_(before)  # what is recorded is not done
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def will_write(self, tree: Any) -> None:
        """An operation is about to write to some of these."""
        for leaf in tree_flatten(tree)[0]:
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._before:
                    self._before[storage._cdata] = storage, storage.clone()

    def note(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any, writes: bool) -> None:
        """An operation on bare memory, and what it gave."""
        flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        given = {leaf.untyped_storage()._cdata for leaf in flat}
        results = [leaf for leaf in tree_flatten(made)[0] if isinstance(leaf, torch.Tensor)]
        new = [leaf.untyped_storage()._cdata not in given for leaf in results]
        if not writes and not any(new):
            return  # a view: it stays one

        def again() -> None:
            repeated = [leaf for leaf in tree_flatten(function(*args, **kwargs))[0] if isinstance(leaf, torch.Tensor)]
            for to, from_, is_new in zip(results, repeated, new, strict=True):
                if is_new:
                    to.copy_(from_)

        self.work.append(again)

    def replay(self) -> None:
        self.counts.launches[where()] += 1
        for again in self.work:
            again()


class Dispatch(TorchDispatchMode):
    """Runs every operation of torch on the memory of its tensors, by the device's rules."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        wanted = kwargs.get("device")
        if name == "prim::device":
            return CUDA
        if name == "aten::_has_compatible_shallow_copy_type":  # asked by Module.to
            return False
        if name == "aten::to":
            return self._convert(func, args, kwargs)
        if name == "aten::_to_copy" and wanted is not None:
            return self._transfer(func, args, kwargs)
        if name == "aten::copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            return self._copy_across(func, args[0], args[1], bool((*args, kwargs.get("non_blocking"))[2]))
        if kwargs.get("pin_memory"):
            return self.counts.under_way.pin(func(*args, **{**kwargs, "pin_memory": False}))
        if wanted is not None and not is_cuda(wanted):
            return func(*bare(args), **bare(kwargs))
        if is_cuda(wanted):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        elif not ours:
            return func(*args, **kwargs)
        if ours:
            self._check(func, name, args, kwargs, tensors)
        graph, writes = self.counts.recording, func._schema.is_mutable
        if graph is not None and writes:
            graph.will_write(bare((args, kwargs)))
        made = func(*bare(args), **bare(kwargs))
        if graph is not None and name not in ALLOCATING:
            graph.note(func, bare(args), bare(kwargs), made, writes)
        self._count(func, name, ours, made)
        known = {id(tensor.memory): tensor for tensor in ours}

        def lay(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else OnDevice(leaf)

        return tree_map(lay, made)

    def _convert(self, func: Any, args: Any, kwargs: Any) -> Any:
        """aten::to, which inference mode does not take apart."""
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        like = named.get("other")
        source = args[0]
        device = torch.device(named.get("device") or (source if like is None else like).device)
        dtype = named.get("dtype") or (source if like is None else like).dtype
        if device.type == source.device.type and dtype == source.dtype and not named.get("copy"):
            return source
        options = {"dtype": dtype, "device": device, "non_blocking": bool(named.get("non_blocking"))}
        return self._transfer(aten._to_copy.default, (source,), options)

    def _transfer(self, func: Any, args: Any, kwargs: Any) -> Any:
        (source,) = args
        made = func(*bare(args), **{**kwargs, "device": torch.device("cpu")})
        if not is_cuda(kwargs["device"]):
            if isinstance(source, OnDevice) and kwargs.get("non_blocking"):
                self.counts.fetch(self.counts.under_way.pin(made), made)  # torch makes it pinned
            elif isinstance(source, OnDevice):
                self.counts.wait("to the CPU")
            return made
        if isinstance(source, OnDevice):
            self.counts.launches[where()] += 1
            if self.counts.recording is not None:
                options = {**kwargs, "device": torch.device("cpu")}
                self.counts.recording.note(func, bare(args), options, made, False)
        elif kwargs.get("non_blocking") and self.counts.under_way.is_pinned(source):
            self.counts.send(source)
        else:
            self.counts.copy()
        return OnDevice(made)

    def _copy_across(self, func: Any, to: Any, source: Any, non_blocking: bool) -> Any:
        """aten::copy_ between the host and the device."""
        from_host = isinstance(to, OnDevice)
        pinned = non_blocking and self.counts.under_way.is_pinned(source if from_host else to)
        if not pinned:
            self.counts.copy() if from_host else self.counts.wait("copy_ to the CPU")
        elif from_host:
            self.counts.send(source)
        self.counts.launches[where()] += 1
        func(bare(to), bare(source))
        if pinned and not from_host:
            self.counts.fetch(to, to)
        return to

    def _check(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        """Raise what CUDA raises for tensors of two devices, and count what waits."""
        strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
        generator = kwargs.get("generator")
        if generator is not None and not is_cuda(PLACES.get(generator._cdata, "cpu")):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        graph = self.counts.recording
        if graph is not None and generator is not None and generator._cdata not in {g._cdata for g in graph.generators}:
            raise RuntimeError("a generator that is not registered with the graph draws while it is recorded")
        if name in INDEXING:
            if not isinstance(args[0], OnDevice):
                raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
            indices = [index for index in args[1] if index is not None]
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8):
                    self.counts.wait("boolean index")
                elif not isinstance(index, OnDevice):
                    self.counts.copy()
            if {id(stranger) for stranger in strangers} - set(map(id, indices)):
                raise RuntimeError(TWO_DEVICES.format(func))
        elif strangers:
            raise RuntimeError(TWO_DEVICES.format(func))
        elif name in WAITING or (name == "aten::repeat_interleave" and "Tensor" in func._overloadname):
            self.counts.wait(name)

    def _count(self, func: Any, name: str, ours: list[OnDevice], made: Any) -> None:
        if name in ALLOCATING:
            return
        made = [leaf for leaf in tree_flatten(made)[0] if isinstance(leaf, torch.Tensor)]
        given = {tensor.memory.untyped_storage()._cdata for tensor in ours}
        is_view = made and not func._schema.is_mutable and all(t.untyped_storage()._cdata in given for t in made)
        if not is_view:
            self.counts.launches[where()] += 1


TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({})"


class Functions(TorchFunctionMode):
    """What torch decides before it dispatches: where numbers become a tensor, how to attend, which device `cuda` is."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args, kwargs = tuple(map(numbered, args)), {name: numbered(value) for name, value in kwargs.items()}
        if func in (torch.tensor, torch.as_tensor):
            return self._from_numbers(func, args, kwargs)
        if func is torch.autograd.grad and any(isinstance(leaf, OnDevice) for leaf in tree_flatten(args)[0]):
            return grad(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnDevice):
            return func(args[0], _indices(args[1]))
        return func(*args, **kwargs)

    def _from_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(args[0], OnDevice) and kwargs.get("device") is None:
            return args[0] if func is torch.as_tensor else args[0].clone()
        if not is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        made = args[0] if isinstance(args[0], OnDevice) else func(*args, **{**kwargs, "device": "cpu"})
        return made.to(CUDA)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor)]
        if not any(isinstance(tensor, OnDevice) for tensor in tensors):
            return func(*args, **kwargs)
        if not all(isinstance(tensor, OnDevice) for tensor in tensors):
            raise RuntimeError("Expected query, key, value, and attn_mask on the same device")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _differentiable_attention(*args, **kwargs)
        self.counts.launches[where()] += 1
        made = func(*bare(args), **bare(kwargs))
        if self.counts.recording is not None:
            self.counts.recording.note(func, bare(args), bare(kwargs), made, False)
        return OnDevice(made)


def _differentiable_attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None
) -> Any:
    """By the operation that a CPU takes, whose gradient is one operation too, but for dropout."""
    if dropout_p:
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
    options = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale}
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)[0]


class Generator(torch.Generator):
    """A generator that knows where it was made to lie; its numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        PLACES[made._cdata] = torch.device(device)  # torch hands over another Python object of the same generator
        return made

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self


PLACES: dict[int, torch.device] = {}


class Stream:
    """All work is done at once, so that nothing waits for another stream's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


def where() -> str:
    """The innermost line of neoquant that is running; of a program of Triton, the one that asks for it."""
    frame = sys._getframe(1)
    while frame is not None and (
        not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename == running.__file__
    ):
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere" if frame is None else f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def numbered(value: Any) -> Any:
    """`cuda` as `cuda:0`: torch asks the driver, which is not there."""
    if isinstance(value, torch.device) and value.type == "cuda" and value.index is None:
        return CUDA
    return CUDA if isinstance(value, str) and value == "cuda" else value


def _indices(index: Any) -> Any:
    """Lists of numbers as tensors, which torch would make below every mode."""
    if isinstance(index, list):
        return torch.tensor(index).to(CUDA)
    return tuple(map(_indices, index)) if isinstance(index, tuple) else index


def bare(tree: Any) -> Any:
    """The memory of every tensor of the device in a tree of arguments."""
    return tree_map(lambda leaf: leaf.memory if isinstance(leaf, OnDevice) else leaf, tree)


def patches(counts: Counts, capability: tuple[int, int]) -> Iterator[Any]:
    """What asks the driver or the runtime."""
    properties = SimpleNamespace(
        name="simulated", total_memory=MEMORY, major=capability[0], minor=capability[1], multi_processor_count=132
    )
    answers: Mapping[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: counts.current,
        "device": partial(current, counts),
        "mem_get_info": lambda device=0: (MEMORY, MEMORY),
        "get_device_name": lambda device=None: "simulated",
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),
        "max_memory_allocated": lambda device=None: MEMORY // 2,
        "synchronize": lambda device=None: counts.wait("synchronize"),
        "Stream": Stream,
        "Event": type("Event", (Event,), {"transfers": counts.under_way, "wait_for": staticmethod(counts.wait_for)}),
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": type("CUDAGraph", (Graph,), {"counts": counts}),
        "graph": lambda graph, **kwargs: graph.recorded(),
    }
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, answer)
    yield mock.patch.object(torch, "Generator", Generator)
    library = type(load_bitsandbytes().cextension.lib)
    yield mock.patch.object(library, "compiled_with_cuda", True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield mock.patch.object(running, "launch", partial(interpret, counts))
    else:
        yield mock.patch.object(running, "lacking", lambda: "Triton compiles nothing for a simulated device")
    yield mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(CUDA))
    pinned = counts.under_way
    yield mock.patch.object(torch.Tensor, "is_pinned", lambda tensor, device=None: pinned.is_pinned(tensor))
    yield mock.patch.object(
        torch.Tensor,
        "pin_memory",
        lambda tensor, device=None: tensor if pinned.is_pinned(tensor) else pinned.pin(tensor.clone()),
    )


@contextmanager
def current(counts: Counts, device: Any) -> Iterator[None]:
    """Within it, another device is the current one."""
    before = counts.current
    index = device if isinstance(device, int) else torch.device(device).index
    counts.current = before if index is None else index
    try:
        yield
    finally:
        counts.current = before


def interpret(counts: Counts, program: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: Any) -> None:
    """Run a program of Triton in its interpreter: one launch."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice):
            raise ValueError(f"Pointer argument ({name}) cannot be accessed from Triton (cpu tensor?)")
    counts.require_current("Triton launches")
    counts.launches[where()] += 1

    def work(**arguments: Any) -> None:
        with torch._C._DisableTorchDispatch():
            program[grid](**arguments, **options)

    memory = bare(arguments)
    if counts.recording is not None:
        counts.recording.will_write(memory)
        counts.recording.note(work, (), memory, None, True)
    work(**memory)


@contextmanager
def simulate(capability: tuple[int, int] = (9, 0)) -> Iterator[Counts]:
    """Within it, there is one CUDA device of this compute capability. Raises NoCompilerError."""
    load_guard()
    load_bitsandbytes()  # within, it would look for a driver
    counts = Counts()
    former = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for patch in patches(counts, capability):
            stack.enter_context(patch)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's class changes as it moves
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, former)
        stack.enter_context(Dispatch(counts))
        stack.enter_context(Functions(counts))
        yield counts
        counts.under_way.finish()
