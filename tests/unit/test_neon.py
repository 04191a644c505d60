"""The products on aarch64, which a cross compiler and an emulator stand for."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weights import make_weight

from neoquant import native
from neoquant.grids import Affine, Codebook, Int8Rows, TrellisGrid
from neoquant.kernels import Cpu, ReferenceInt8
from neoquant.kernels.native_weight import native_weight
from neoquant.native import products
from neoquant.quantizers import Nearest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "neoquant" / "native"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
GRIDS = [
    Codebook(), Codebook("fp4", 32, False), Int8Rows(), Affine(2, 16), Affine(3, 64, True), Affine(3, -1),
    Affine(4, 32), Affine(4, 128, True), Affine(8, 64), Affine(8, -1, True),
    Affine(3, 32, float_zero=True), Affine(8, 64, float_zero=True),
    TrellisGrid(16), TrellisGrid(-1), TrellisGrid(16, 3), TrellisGrid(-1, 3),
]  # fmt: skip
SHAPES = [(5, 200), (37, 96), (8, 1160), (3, 45)]
COUNTS = (1, 2, 3, 4, 5, 13)
TABLES = ("codes", "table", "levels", "absmax", "stored", "nested", "nested_table", "offset", "scb", "scales", "zeros")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build("products_driver.c", tmp_path_factory.mktemp("aarch64") / "driver")


@pytest.fixture(scope="module")
def between(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build("between_driver.c", tmp_path_factory.mktemp("aarch64") / "between")


def build(driver: str, path: Path) -> list[str]:
    """Compile a driver with the library; the command that runs it."""
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    sources = [*sorted(NATIVE.glob("*.c")), HERE / driver]
    flags = ["-O1", "-std=gnu11", "-ffp-contract=off", "-Wall", "-Werror", "-static", "-pthread", f"-I{NATIVE}"]
    subprocess.run([COMPILER, *flags, "-o", str(path), *map(str, sources), "-lm"], check=True)
    return [EMULATOR, str(path)]


def message(isa: str, int8: bool, x: Tensor, w: products.Weight, bias: Tensor | None) -> bytes:
    s = w.struct
    step = struct.unpack("<I", struct.pack("<f", s.level_step))[0]
    said = (native.ISAS.index(isa), 2, int8, len(x), w.rows, w.columns)
    said += (s.groups, s.kind, s.bits, s.group_bits, step, s.plain, s.half_zeros, s.multiplier)
    arrays = [w.tensors.get(name) for name in TABLES] + [x, bias]
    raw = [
        b"" if array is None else array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for array in arrays
    ]
    return struct.pack("<14q", *said) + framed(raw)


def framed(arrays: list[bytes]) -> bytes:
    return b"".join(struct.pack("<q", len(data)) + data for data in arrays)


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("isa", ["portable", "neon"])
def test_products_on_aarch64(driver: list[str], isa: str, int8: bool) -> None:
    cases, sent = [], b""
    for grid, shape, count in itertools.product(GRIDS, SHAPES, COUNTS):
        if int8 and isinstance(grid, Codebook) and shape[1] % 8:  # CpuInt8 refuses it, also where it could run
            continue
        if int8 and isinstance(grid, TrellisGrid):
            continue
        q = Nearest().quantize(make_weight(shape, torch.float16, "normal"), grid)
        x = make_weight((count, shape[1]), torch.float32, "normal", 2)
        bias = torch.linspace(-1, 1, shape[0])
        sent += message(isa, int8, x, native_weight(Cpu().pack(q), grid, shape), bias)
        cases.append((q, x, bias))
    done = subprocess.run(driver, input=sent, stdout=subprocess.PIPE, check=True)
    answer = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    for q, x, bias in cases:
        y, values, answer = torch.tensor_split(answer, [len(x) * q.shape[0], len(x) * q.shape[0] + q.codes.numel()])
        assert torch.equal(values.view(q.shape), q.dequantize(torch.float32)), q.grid
        w = q.dequantize(torch.float64)
        exact = x.double() @ w.T + bias
        if int8:
            exact = ReferenceInt8().linear(x, ReferenceInt8().pack(q), q.grid, q.shape, bias).double()
        length = x.double().norm(dim=1, keepdim=True) * w.norm(dim=1) + bias.abs()
        bound = 8 * torch.finfo(torch.float32).eps * q.shape[1] ** 0.5 * length
        assert ((y.view(exact.shape) - exact).abs() <= bound).all(), (q.grid, q.shape, len(x))
    assert len(answer) == 0


@pytest.mark.parametrize("isa", ["portable", "neon"])
def test_plain_products_on_aarch64(driver: list[str], isa: str) -> None:
    cases, sent = [], b""
    for dtype, shape, count in itertools.product((torch.float32, torch.float16, torch.bfloat16), SHAPES, COUNTS):
        weight, x = make_weight(shape, dtype, "normal"), make_weight((count, shape[1]), torch.float32, "normal", 2)
        sent += message(isa, False, x, products.plain(weight), None)
        cases.append((weight, x))
    done = subprocess.run(driver, input=sent, stdout=subprocess.PIPE, check=True)
    answer = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    for weight, x in cases:
        y, values, answer = torch.tensor_split(answer, [len(x) * len(weight), len(x) * len(weight) + weight.numel()])
        assert torch.equal(values.view(weight.shape), weight.float())
        exact = x.double() @ weight.double().T
        length = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
        bound = 8 * torch.finfo(torch.float32).eps * weight.shape[1] ** 0.5 * length
        assert ((y.view(exact.shape) - exact).abs() <= bound).all(), (weight.dtype, weight.shape, len(x))
    assert len(answer) == 0


@pytest.mark.parametrize("isa", ["portable", "neon"])
def test_between_products_on_aarch64(between: list[str], isa: str) -> None:
    """Attention of all of two sequences, and of the rows of a piece that begins and ends within them."""
    random = torch.Generator().manual_seed(0)
    cases, sent = [], b""
    layouts = itertools.product([(0, 1), (9, 1), (0, 21), (7, 40)], [0, 5], [3, 16, 20], [False, True])
    for (held, new), window, size, padded in layouts:
        heads, sequences, capacity = 2, 2, held + new + 3
        begin, end = (0, sequences * new) if new == 1 else (new - 6, 2 * new - 1)
        query = torch.randn(end - begin, heads, size, generator=random)
        keys, values = torch.randn(2, sequences, heads, capacity, size, generator=random)
        keep = torch.rand(sequences, held + new, generator=random) < 0.7 if padded else None
        said = (native.ISAS.index(isa), begin, end, new, held, heads, size, capacity, window, held + new)
        arrays = [tensor.numpy().tobytes() for tensor in (query, keys, values)]
        sent += struct.pack("<10q", *said) + framed([*arrays, b"" if keep is None else keep.numpy().tobytes()])
        cases.append((query, attention(query, keys, values, begin, new, held, window, keep)))
    done = subprocess.run(between, input=sent, stdout=subprocess.PIPE, check=True)
    answer = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    for query, attended in cases:
        y, activated, normed, answer = torch.tensor_split(answer, [n * query.numel() for n in (1, 2, 3)])
        assert torch.allclose(y.view(query.shape).double(), attended, rtol=1e-5, atol=1e-5)
        gelu = torch.nn.functional.gelu(query.double(), approximate="tanh")
        assert torch.allclose(activated.view(query.shape).double(), gelu, rtol=1e-5, atol=1e-6)
        norm = 2 * torch.nn.functional.layer_norm(query.double(), query.shape[2:]) + 1
        assert torch.allclose(normed.view(query.shape).double(), norm, rtol=1e-4, atol=1e-4)
    assert len(answer) == 0


def attention(
    query: Tensor, keys: Tensor, values: Tensor, begin: int, new: int, held: int, window: int, keep: Tensor | None
) -> Tensor:
    """Row by row, in float64: row begin + i is a new position of a sequence, and sees itself where it sees nothing."""
    y = torch.empty(query.shape, dtype=torch.float64)
    for i in range(len(query)):
        sequence, at = (begin + i) // new, held + (begin + i) % new
        seen = torch.arange(at + 1) > at - window if window else torch.ones(at + 1, dtype=torch.bool)
        if keep is not None:
            seen &= keep[sequence, : at + 1]
        seen[at] |= not seen.any()
        scores = (keys[sequence, :, : at + 1].double() @ query[i, :, :, None].double())[..., 0]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        y[i] = (weights[:, None] @ values[sequence, :, : at + 1].double())[:, 0]
    return y
