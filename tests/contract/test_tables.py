"""What every quantizer, grid, format and kernel must hold. Runs over the tables: a new entry needs no edit here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import DTYPES, KINDS, make_weight

from neoquant.errors import FormatError, RequestError
from neoquant.formats import FORMATS, Format, choose, detect
from neoquant.grids import Affine, Grid, legal_pairs, make_grid
from neoquant.kernels import KERNELS, Kernel
from neoquant.kernels import choose as choose_kernel
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import QUANTIZERS
from neoquant.tensor import QuantizedTensor

SHAPES = [(1, 1), (3, 5), (24, 24), (96, 24), (32, 96), (64, 129), (130, 64), (48, 1024)]
GRIDS = [make_grid(bits, name) for bits, name in legal_pairs()]
VARIANTS = [Affine(4, 16), Affine(3, -1, True), Affine(4, 16, float_zero=True), Affine(8, 64, float_zero=True)]
DEVICES = ["cpu", "cuda"]


def grid_id(grid: Grid) -> str:
    return "-".join(str(value) for value in grid.describe().values())


def reading(format: Format, grid: Grid) -> Format:
    """The format as it reads a checkpoint that holds layers on this grid."""
    return format.configured(format.config({"layer": grid}, []))


def label(value: object) -> str:
    """An axis' value in the name of a test; a bool is `has_order`."""
    if isinstance(value, bool):
        return "ordered" if value else ""
    if isinstance(value, Grid):
        return grid_id(value)
    if isinstance(value, Format | Kernel):
        return value.name
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def legal(refuse: Callable[..., str | None], **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize over the combinations of the axes that are not refused; those on cuda are marked `gpu`."""
    cases = []
    for values in itertools.product(*axes.values()):
        if refuse(*values) is None:
            name = "-".join(filter(None, map(label, values)))
            cases.append(pytest.param(*values, id=name, marks=[pytest.mark.gpu] if "cuda" in values else []))
    return pytest.mark.parametrize(list(axes), cases)


def rounding(quantizer: str, grid: Grid, shape: tuple[int, int] = (32, 96)) -> str | None:
    """Why the quantizer does not round to this grid, or None; the same for every shape."""
    return QUANTIZERS[quantizer]().refuse(grid)


def storing(grid: Grid, format: Format, shape: tuple[int, int] = (32, 96)) -> str | None:
    """Why the format does not store such a weight, or None."""
    return format.refuse(grid, shape)


def rounding_and_storing(quantizer: str, grid: Grid, format: Format, shape: tuple[int, int]) -> str | None:
    return rounding(quantizer, grid) or storing(grid, format, shape)


def running(
    grid: Grid, kernel: Kernel, shape: tuple[int, int] = (32, 96), device: str = "cpu", has_order: bool = False
) -> str | None:
    """Why the kernel does not run such a weight, or None."""
    return kernel.refuse(grid, shape, torch.device(device), has_order)


ROUNDED: dict[str, Iterable[Any]] = {"quantizer": QUANTIZERS, "grid": GRIDS + VARIANTS}
STORED: dict[str, Iterable[Any]] = {"grid": GRIDS + VARIANTS, "format": FORMATS.values()}
RUN: dict[str, Iterable[Any]] = {"grid": GRIDS + VARIANTS, "kernel": KERNELS.values()}

every_grid = pytest.mark.parametrize("grid", GRIDS + VARIANTS, ids=grid_id)


def quantize(
    quantizer: str, grid: Grid, shape: tuple[int, int], dtype: torch.dtype = torch.float16, kind: str = "normal"
) -> QuantizedTensor:
    """A weight on a grid. For a quantizer that needs calibration, the layer has seen random inputs."""
    w = make_weight(shape, dtype, kind)
    chosen = QUANTIZERS[quantizer]()
    seen: Any = chosen.observer(shape[1])
    assert chosen.needs_calibration == (seen is not None)
    if seen is not None:
        seen.add(make_weight((64, shape[1]), torch.float32, "normal", 7))
    return chosen.quantize(w, grid, seen)


def ordered(q: QuantizedTensor) -> QuantizedTensor:
    """The same codes in an activation order that turns the columns round."""
    return QuantizedTensor(q.codes, q.grid, q.params, torch.arange(q.shape[1] - 1, -1, -1, dtype=torch.int32), q.dtype)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_names_are_keys() -> None:
    for table in (QUANTIZERS, FORMATS, KERNELS):
        assert all(entry.name == name for name, entry in table.items())
    assert all(grid.name == name and grid.bits == bits for grid, (bits, name) in zip(GRIDS, legal_pairs(), strict=True))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_round_to_some_grids_and_refuse_others_with_a_reason(quantizer: str) -> None:
    refused = {grid: reason for grid in GRIDS + VARIANTS if (reason := rounding(quantizer, grid))}
    for grid, reason in refused.items():
        with pytest.raises(RequestError) as caught:
            quantize(quantizer, grid, (32, 96))
        assert caught.value.message == reason and "\n" not in reason
    assert len(refused) < len(GRIDS + VARIANTS)


@legal(rounding, **ROUNDED, shape=SHAPES)
def test_quantizers_give_what_the_grid_holds(quantizer: str, grid: Grid, shape: tuple[int, int]) -> None:
    for dtype, kind in itertools.product(DTYPES, KINDS):
        q = quantize(quantizer, grid, shape, dtype, kind)
        assert (q.shape, q.grid, q.dtype) == (shape, grid, dtype)
        assert q.dequantize().isfinite().all()
        assert q.equals(quantize(quantizer, grid, shape, dtype, kind)), "two runs, the same bits"


@legal(rounding, **ROUNDED)
def test_quantizers_come_close(quantizer: str, grid: Grid) -> None:
    w = make_weight((96, 1024), torch.float16, "normal").float()
    q = quantize(quantizer, grid, (96, 1024))
    error = ((q.dequantize(torch.float32) - w).norm() / w.norm()).item()
    assert error < 2.0 ** (1.5 - grid.bits), "a wrong table, scale or block gives several times as much"


@pytest.mark.parametrize("format", FORMATS.values(), ids=label)
def test_formats_store_some_weights_and_refuse_others_with_a_reason(format: Format) -> None:
    refused = 0
    for grid, shape in itertools.product(GRIDS + VARIANTS, SHAPES):
        if reason := format.refuse(grid, shape):
            refused += 1
            with pytest.raises(FormatError) as caught:
                format.encode(quantize("nearest", grid, shape))
            assert caught.value.message == reason and "\n" not in reason
    assert refused < len(GRIDS + VARIANTS) * len(SHAPES)


@legal(rounding_and_storing, quantizer=QUANTIZERS, **STORED, shape=SHAPES)
def test_formats_give_back_every_bit(quantizer: str, grid: Grid, format: Format, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        q = quantize(quantizer, grid, shape, dtype)
        tensors = format.encode(q)
        reader = reading(format, grid)
        assert reader.decode(tensors, shape, dtype).equals(q)
        assert same_tensors(format.encode(reader.decode(tensors, None, dtype)), tensors)


@legal(storing, **STORED, shape=SHAPES)
def test_layouts_foretell_what_is_stored(grid: Grid, format: Format, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        tensors = format.encode(quantize("nearest", grid, shape, dtype))
        layout = format.layout(grid, shape, dtype)
        assert layout.keys() == tensors.keys()
        for suffix, (stored_dtype, stored_shape) in layout.items():
            found = tensors[suffix]
            assert found.dtype == stored_dtype
            spare = torch.Size(stored_shape).numel() - found.numel()
            assert (tuple(found.shape) == stored_shape) or (found.dim() == 1 and 0 < spare < 24), suffix


@legal(storing, **STORED)
def test_formats_hold_an_order_or_refuse_it(grid: Grid, format: Format) -> None:
    q = ordered(quantize("nearest", grid, (32, 96)))
    if not format.holds_order:
        with pytest.raises(FormatError, match="cannot hold an activation order"):
            format.encode(q)
        return
    tensors = format.encode(q)
    found = reading(format, grid).decode(tensors)  # a group's inputs may come back in another order
    assert torch.equal(found.dequantize(), q.dequantize()) and same_tensors(format.encode(found), tensors)


@legal(storing, **STORED)
def test_formats_are_recognized_and_refuse_each_other(grid: Grid, format: Format) -> None:
    tensors = format.encode(quantize("nearest", grid, (32, 96)))
    layer = "transformer.h.1.mlp.c_fc"
    names = [layer + suffix for suffix in tensors] + [f"{layer}.bias", "transformer.h.11.mlp.c_fc.weight"]
    config = {"quantization_config": format.config({layer: grid}, [])}
    for said in (config, {}):
        found = detect(said, names)
        assert found is not None and found.name == format.name
    assert format.quantized(names) == {layer: list(tensors)}
    for other in FORMATS.values():
        if other is not format:
            assert not other.quantized(names)
            with pytest.raises(FormatError):
                reading(other, Affine()).decode(tensors)


@legal(storing, **STORED)
def test_damaged_tensors_are_refused(grid: Grid, format: Format) -> None:
    shape = (32, 96)
    tensors = format.encode(quantize("nearest", grid, shape))
    format = reading(format, grid)
    with pytest.raises(FormatError, match=r"stored weight is \[32, 96\], the model's is \[96, 32\]"):
        format.decode(tensors, (96, 32))
    with pytest.raises(FormatError, match="unknown surprise"):
        format.decode({**tensors, ".surprise": torch.ones(1)})
    for suffix, tensor in tensors.items():
        if suffix not in (".weight_format", ".g_idx"):  # some files lack them
            with pytest.raises(FormatError):
                format.decode({name: value for name, value in tensors.items() if name != suffix})
        with pytest.raises(FormatError):
            format.decode({**tensors, suffix: torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])})
        with pytest.raises(FormatError):
            format.decode({**tensors, suffix: tensor.to(torch.float64)})


@every_grid
def test_something_stores_and_something_runs_every_grid(grid: Grid) -> None:
    for shape in SHAPES:
        assert choose({"layer": (grid, shape)}).refuse(grid, shape) is None
        for has_order in (False, True):
            kernel = choose_kernel(grid, shape, torch.device("cpu"), has_order)
            assert kernel.refuse(grid, shape, torch.device("cpu"), has_order) is None


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=label)
def test_kernels_run_some_weights_and_refuse_others_with_a_reason(kernel: Kernel) -> None:
    axes = (GRIDS + VARIANTS, [kernel], SHAPES, DEVICES, [False, True])
    reasons = {running(*values) for values in itertools.product(*axes)}
    assert all(reason is None or (reason and "\n" not in reason) for reason in reasons)
    if None not in reasons:
        pytest.skip(f"{kernel.name} does not run on this machine: {', '.join(filter(None, reasons))}")


@legal(running, **RUN, shape=SHAPES, device=DEVICES, has_order=[False, True])
def test_kernels_agree_with_double_precision(
    grid: Grid, kernel: Kernel, shape: tuple[int, int], device: str, has_order: bool
) -> None:
    q = quantize("nearest", grid, shape)
    q = (ordered(q) if has_order else q).to(device)
    bias = make_weight((1, shape[0]), torch.float16, "normal", 3)[0].to(device)
    layer = QuantLinear(q, bias, kernel)
    w = q.dequantize(torch.float64)
    for dtype in DTYPES:
        for rows in ((), (1,), (2, 3)):
            x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(5)).to(device, dtype)
            y = layer(x)
            assert (y.shape, y.dtype) == ((*rows, shape[0]), dtype)
            exact = x.double() @ w.T + bias.double()
            # every product and sum is off by at most one unit: sqrt(I) of them on average
            length = x.double().norm(dim=-1, keepdim=True) * w.norm(dim=1) + bias.double().abs()
            bound = 4 * torch.finfo(dtype).eps * shape[1] ** 0.5 * length
            assert ((y.double() - exact).abs() <= bound).all()


@legal(running, **RUN, shape=SHAPES, device=DEVICES, has_order=[False, True])
def test_kernels_look_rows_up(grid: Grid, kernel: Kernel, shape: tuple[int, int], device: str, has_order: bool) -> None:
    q = quantize("nearest", grid, shape)
    q = (ordered(q) if has_order else q).to(device)
    state = kernel.pack(q)
    for ids in (torch.randint(0, shape[0], (2, 7)), torch.tensor(shape[0] - 1), torch.empty(0, 3, dtype=torch.int64)):
        for dtype in DTYPES:
            rows = kernel.embedding(ids.to(device), state, grid, shape, dtype)
            assert rows.dtype == dtype and torch.equal(rows, q.dequantize(dtype)[ids.to(device)])
    for outside in (-1, shape[0]) if device == "cpu" else ():  # a GPU's assertion ends the process
        with pytest.raises(IndexError, match=f"ids are 0 to {shape[0] - 1}, got {outside} to {outside}"):
            kernel.embedding(torch.tensor([outside], device=device), state, grid, shape, torch.float32)


@legal(running, **RUN, shape=SHAPES, device=DEVICES)
def test_layers_keep_every_bit(grid: Grid, kernel: Kernel, shape: tuple[int, int], device: str) -> None:
    q = quantize("nearest", grid, shape, torch.bfloat16).to(device)
    layer = QuantLinear(q, torch.ones(shape[0], device=device), kernel)
    for moved in (layer, layer.half(), layer.to(torch.float64), layer.to("cpu"), layer.to(device)):
        assert moved.quantized.to(device).equals(q)
    again = QuantLinear(
        quantize("nearest", grid, shape, torch.bfloat16, "zero").to(device), torch.zeros(shape[0]), kernel
    )
    again.load_state_dict(layer.state_dict())
    assert again.quantized.equals(q)


@legal(running, **RUN)
def test_gradients_flow_to_the_input(grid: Grid, kernel: Kernel) -> None:
    layer = QuantLinear(quantize("nearest", grid, (32, 96)), None, kernel)
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], layer.quantized.dequantize(torch.float32).sum(0), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
