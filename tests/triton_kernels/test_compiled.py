"""Every program compiled ahead of time, as a launch would compile it, for cards that are not here.

Held: no register is spilled and no memory of a thread's own is used, the shared memory fits, registers stay below a
bound, and the table of a codebook is never read from the card's memory by code.
"""

# ruff: noqa: E402
from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing: make test-triton", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neoquant.grids import Affine, Codebook, Grid, Mxfp4, make_grid
from neoquant.kernels import Triton
from neoquant.kernels.triton import launch, rounded
from neoquant.kernels.triton.kernel import packed_weight
from neoquant.native.gptq import Heads
from neoquant.quantizers import Nearest
from neoquant.triton import gptq, running

CARDS = (75, 80, 86, 89, 90, 100)
SHARED = {
    75: 64,
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
}  # KiB a program may have (CUDA C programming guide, 16.2)
REGISTERS = {
    "multiply_few": 72,
    "multiply_some": 128,
    "decode": 40,
    "attend": 128,
    "join_parts": 48,
    "round_columns": 64,
    "round_rows": 64,
    "multiply_rounded": 160,
}
GRIDS: dict[str, Grid] = {
    "nf4": Codebook("nf4", 64, True), "fp4": Codebook("fp4", 64, False), "mxfp4": Mxfp4(), "int8": make_grid(8, "int8"),
    "affine-2": Affine(2, 64), "affine-3": Affine(3, 128), "affine-4": Affine(4, 64), "affine-8": Affine(8, 128, True),
    "affine-4-row": Affine(4, -1), "affine-4-float-zero": Affine(4, 64, float_zero=True),
}  # fmt: skip
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def launched(grid: Grid, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """The program, arguments and options with which so many rows (0: none, the weight is decoded) meet a weight."""
    shape = (256, 1024)
    q = Nearest().quantize(torch.randn(shape), grid)
    state = Triton().pack(q)
    weight = packed_weight(state, grid, shape)
    if not rows:
        return kept_launches(monkeypatch, lambda: launch.decode(weight, dtype))[0]
    x, bias = torch.empty(rows, shape[1], dtype=dtype), torch.empty(shape[0], dtype=dtype)
    residual = torch.empty(rows, shape[0], dtype=dtype)
    return kept_launches(monkeypatch, lambda: launch.multiply(x, weight, bias, "gelu_new", residual))[0]


def kept_launches(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> list[tuple[Any, Any, Any]]:
    """The programs, arguments and options that `work` would launch."""
    kept: list[tuple[Any, Any, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            running, "run", lambda program, grid, arguments, options: kept.append((program, arguments, options))
        )
        work()
    return kept


def compiled(program: Any, arguments: dict[str, Any], options: dict[str, Any], card: int) -> Any:
    """As Triton's launcher specializes: whole constants, ones, and what 16 divides."""
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(program.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif (name.isupper() and name not in "MNKBHDS") or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(program, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "program.cubin"
    path.write_bytes(cubin)
    told = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", told)
    assert found, told
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.bfloat16), (4, torch.float16), (16, torch.bfloat16), (0, torch.bfloat16)]
)
def test_programs_fit_every_card(
    name: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, arguments, options = launched(GRIDS[name], rows, dtype, monkeypatch)
    for card in CARDS if name in ("nf4", "affine-4") else (80, 90):
        made = compiled(program, arguments, options, card)
        used = resources(made.asm["cubin"], tmp_path)
        print(f"\n{name} rows={rows} sm_{card}: {used} shared={made.metadata.shared}")
        assert used["stack"] == used["local"] == 0, "registers are spilled"
        assert used["registers"] <= REGISTERS[program.__name__]
        assert made.metadata.shared <= SHARED[card] << 10
        if arguments["TABLE"]:  # 16 numbers, read once: what a code is looked up in lies in shared memory or registers
            assert "tt.gather" in made.asm["ttir"]


@pytest.mark.parametrize("rows", [40, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_many_rows_fit_too(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, arguments, options = launched(GRIDS["nf4"], rows, dtype, monkeypatch)
    for card in (80, 90):
        made = compiled(program, arguments, options, card)
        used = resources(made.asm["cubin"], tmp_path)
        print(f"\nnf4 rows={rows} {dtype} sm_{card}: {used} shared={made.metadata.shared}")
        assert used["stack"] == used["local"] == 0 and made.metadata.shared <= SHARED[card] << 10
        assert used["registers"] <= REGISTERS["multiply_some"]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", ["nf4", "mxfp4", "int8", "affine-3", "affine-4-row"])
def test_three_at_once_take_no_more(name: str, rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which of three weights is chosen costs a few registers, and no read gets narrower."""
    grid, shape = GRIDS[name], (256, 1024)
    weight = packed_weight(Triton().pack(Nearest().quantize(torch.randn(shape), grid)), grid, shape)
    x = torch.empty(rows, shape[1], dtype=torch.bfloat16)
    one = kept_launches(monkeypatch, lambda: launch.multiply(x, weight))[0]
    three = kept_launches(monkeypatch, lambda: launch.multiply_by_three(x, [weight] * 3))[0]
    made = [compiled(*launched, 90) for launched in (one, three)]
    used = [resources(each.asm["cubin"], tmp_path) for each in made]
    print(f"\n{name} rows={rows}: {used}")
    assert used[1]["stack"] == used[1]["local"] == 0 and made[1].metadata.shared <= SHARED[90] << 10
    assert used[1]["registers"] <= REGISTERS[three[0].__name__]
    reads = [sorted(re.findall(r"ld\.global[.\w:]*", each.asm["ptx"])) for each in made]
    assert reads[0] == reads[1]


@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("S", [256, 2048])
def test_attention_fits(D: int, S: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rings = [torch.empty(1, 2, S, D, dtype=torch.bfloat16) for _ in range(2)]
    qkv = torch.empty(3, 1, 2 * D, dtype=torch.bfloat16)
    launches = kept_launches(
        monkeypatch, lambda: launch.attend(qkv, *rings, torch.zeros(1, dtype=torch.long), torch.ones(1, S) > 0)
    )
    assert [launched[0].__name__ for launched in launches] == ["attend", "join_parts"][: 1 + (S > 256)]
    for launched, card in itertools.product(launches, CARDS):
        made = compiled(*launched, card)
        used = resources(made.asm["cubin"], tmp_path)
        print(f"\n{launched[0].__name__} D={D} S={S} sm_{card}: {used} shared={made.metadata.shared}")
        assert used["stack"] == used["local"] == 0 and made.metadata.shared <= SHARED[card] << 10
        assert used["registers"] <= REGISTERS[launched[0].__name__]


@pytest.mark.parametrize(
    ("name", "head"), [("nf4", 0), ("nf4", 64), ("nf4", 256), ("int8", 0), ("affine-3", 0), ("affine-3", 128)]
)
def test_blocks_of_columns_fit(name: str, head: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grid, n, rows = GRIDS[name], 128, 256
    w, of_rows = torch.randn(rows, n), None
    levels = grid.columns(grid.fit(w), (rows, n)).levels()
    if head:
        of_rows = Heads(torch.ones(rows // head, head, head), torch.ones(rows // head, head).long(), w.T.contiguous())
    given = w.T.contiguous(), torch.eye(n), levels, torch.arange(n), of_rows, torch.empty(n, rows, dtype=torch.uint8)
    (launched,) = kept_launches(monkeypatch, lambda: gptq.round_columns(*given))
    for card in CARDS if name == "nf4" else (80, 90):
        made = compiled(*launched, card)
        used = resources(made.asm["cubin"], tmp_path)
        print(f"\n{name} head={head} sm_{card}: {used} shared={made.metadata.shared}")
        assert used["stack"] == used["local"] == 0 and made.metadata.shared <= SHARED[card] << 10
        assert used["registers"] <= REGISTERS["round_columns"]
        assert "fma.rn.f32" not in made.asm["ptx"], "a product and a sum are rounded once"


@pytest.mark.parametrize(("name", "rows"), [("nf4", 1), ("nf4", 64), ("int8", 64), ("affine-3", 64), ("affine-16", 64)])
def test_products_in_integers_fit(name: str, rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grid, shape = GRIDS.get(name, Affine(4, 16)), (256, 1024)
    weight = packed_weight(Triton().pack(Nearest().quantize(torch.randn(shape), grid)), grid, shape)
    x = torch.empty(rows, shape[1], dtype=torch.bfloat16)
    launches = kept_launches(monkeypatch, lambda: rounded.multiply(x, weight, grid, torch.empty(shape[0])))
    for launched, card in itertools.product(launches, CARDS[1:] if name == "affine-16" else (80, 90)):
        made = compiled(*launched, card)
        used = resources(made.asm["cubin"], tmp_path)
        print(f"\n{launched[0].__name__} {name} rows={rows} sm_{card}: {used} shared={made.metadata.shared}")
        assert used["stack"] == used["local"] == 0 and made.metadata.shared <= SHARED[card] << 10
        assert used["registers"] <= REGISTERS[launched[0].__name__]
