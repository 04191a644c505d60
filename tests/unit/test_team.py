"""The native library's threads: the same bits on any number and on torch's, callers side by side, forks, no memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from switch import forced
from torch import Tensor
from weights import make_weight

from neoquant import native
from neoquant.errors import RequestError
from neoquant.grids import Affine, Codebook, Grid, Int8Rows
from neoquant.kernels import Cpu
from neoquant.native import loader
from neoquant.native.gptq import Levels, round_columns
from neoquant.quantizers import Nearest

SHARED = (1200, 1024)  # weights enough to be worth a few threads, and to wake those that are asleep
GRIDS = [Codebook(), Int8Rows(), Affine(3, 64), Affine(4, 32)]
needs_library = pytest.mark.skipif(not native.runnable(), reason="there is no native library")


@contextmanager
def team(whose: str) -> Iterator[None]:
    before = os.environ.get(native.TEAM_SWITCH)
    os.environ[native.TEAM_SWITCH] = whose
    loader.active.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(native.TEAM_SWITCH)
        if before is not None:
            os.environ[native.TEAM_SWITCH] = before
        loader.active.cache_clear()
        loader.active()


def product(grid: Grid, rows: int, threads: int) -> Tensor:
    q = Nearest().quantize(make_weight(SHARED, torch.float16, "normal"), grid)
    x = torch.randn(rows, SHARED[1], generator=torch.Generator().manual_seed(rows))
    with forced(native.runnable()[-1], threads):
        return Cpu().linear(x, Cpu().pack(q), grid, q.shape, None)


@needs_library
@pytest.mark.parametrize("rows", [1, 5, 24])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bits_do_not_depend_on_threads_or_whose_they_are(grid: Grid, rows: int) -> None:
    alone = product(grid, rows, 1)
    for threads in (2, 3, 7):
        assert torch.equal(product(grid, rows, threads), alone)
    with team("openmp"):
        assert torch.equal(product(grid, rows, 3), alone)


@needs_library
def test_callers_side_by_side_get_what_each_gets_alone() -> None:
    q = Nearest().quantize(make_weight(SHARED, torch.float16, "normal"), Codebook())
    state = Cpu().pack(q)
    inputs = [torch.randn(3, SHARED[1], generator=torch.Generator().manual_seed(seed)) for seed in range(24)]
    with forced(native.runnable()[-1], 3):
        alone = [Cpu().linear(x, state, q.grid, q.shape, None) for x in inputs]
        with ThreadPoolExecutor(3) as callers:
            found = list(callers.map(lambda x: Cpu().linear(x, state, q.grid, q.shape, None), inputs))
    assert all(map(torch.equal, found, alone))


def in_a_process(code: str) -> str:
    """What a Python of its own prints; products are at hand as `multiply(rows)`."""
    prelude = f"""
import os, sys, torch
sys.path[:0] = {sys.path!r}
from neoquant.grids import Codebook
from neoquant.kernels import Cpu
from neoquant.quantizers import Nearest
torch.set_num_threads(3)
shape = {SHARED}
q = Nearest().quantize(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape).half(), Codebook())
state = Cpu().pack(q)
def multiply(rows):
    return Cpu().linear(torch.linspace(-1, 1, rows * shape[1]).view(rows, -1), state, q.grid, shape, None)
"""
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_fork_after_use_multiplies_as_its_parent_does() -> None:
    """Twice over; the parent's helpers are not in the child, which starts its own."""
    code = """
expected = multiply(2)
def child(depth):
    pid = os.fork()
    if pid == 0:
        right = torch.equal(multiply(2), expected) and (depth == 0 or child(depth - 1))
        os._exit(0 if right else 1)
    return os.waitpid(pid, 0)[1] == 0
print(child(1) and torch.equal(multiply(2), expected))
"""
    assert in_a_process(code) == "True\n"


@needs_library
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by Linux's /proc here")
def test_without_memory_there_is_a_memory_error_and_then_the_product() -> None:
    """What the caller lays out does not fit below the limit; later it does."""
    code = """
import resource
multiply(1)
x = torch.linspace(-1, 1, 24 << 20).view(-1, shape[1])
pages = int(open("/proc/self/statm").read().split()[0])
y = x.new_empty(len(x), shape[0])
from neoquant.kernels.native_weight import native_weight
from neoquant.native.loader import active
from neoquant.native import products
w = native_weight(state, q.grid, shape)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
def call(rows):
    active().call("nq_multiply", w.address, x.data_ptr(), rows, None, y.data_ptr(), active().isa, 3)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
try:
    call(480)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
call(480)
print(torch.allclose(y[:480], x[:480] @ q.dequantize(torch.float32).T, rtol=1e-3, atol=1e-3))
"""
    said = "the native library found no memory to work in (multiply)"
    assert in_a_process(code) == f"{said}\nTrue\n"


def test_the_switch_says_what_is_legal() -> None:
    with pytest.raises(RequestError, match="NEOQUANT_TEAM is '4'; legal are own and openmp"), team("4"):
        native.active()


@needs_library
@pytest.mark.parametrize(
    ("whose", "said"), [("own", "on threads of its own by NEOQUANT_TEAM"), ("openmp", "on torch's OpenMP threads")]
)
def test_a_reader_is_told_which_threads_run(whose: str, said: str) -> None:
    with team(whose):
        assert said in native.active().reason


@needs_library
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_has_a_code_that_there_is(bad: float) -> None:
    """GPTQ, column by column: code 0 for NaN, an end of the range for infinity; the error says that it is none."""
    weights, codes = torch.zeros(1, 40), torch.full((1, 40), 99, dtype=torch.uint8)
    weights[0, 3::7] = bad
    scale = torch.ones(1, 40)
    levels = Levels(scale, 1 / scale, 1, zero=torch.full((1, 40), 4.0), top=7)
    errors = round_columns(weights, torch.eye(1), levels, torch.arange(1), None, codes)
    expected = torch.full((40,), 4)
    expected[3::7] = 7 if bad > 0 else 0
    assert codes[0].tolist() == expected.tolist()
    assert torch.equal(errors[0].isfinite(), weights[0].isfinite())
