"""The native library: every instruction set that this machine runs, on any number of threads, the same bytes."""

from __future__ import annotations

import _ctypes
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import every_isa, forced
from torch import Tensor
from weights import make_weight, weights

from neoquant import native, packing
from neoquant.errors import FormatError, RequestError
from neoquant.grids import BLOCK_SIZES, GROUP_SIZES, Affine, Codebook, Grid, Int8Rows, Params
from neoquant.native import loader, products

REPOSITORY = Path(__file__).resolve().parents[2]
codebooks = st.builds(Codebook, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCK_SIZES), st.booleans())
any_threads = st.sampled_from([1, 2])


def nearest(grid: Grid, w: Tensor, isa: str, threads: int = 1) -> tuple[Tensor, Params]:
    with forced(isa, threads):
        return grid.nearest(w)


def require_same(found: tuple[Tensor, Params], expected: tuple[Tensor, Params]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, param in expected[1].items():
        assert found[1][name].dtype == param.dtype
        assert found[1][name].numpy().tobytes() == param.numpy().tobytes(), name


@every_isa
@settings(deadline=None, max_examples=40)
@given(w=weights(), grid=codebooks, threads=any_threads)
def test_codebooks_round_as_bitsandbytes_does(isa: str, w: Tensor, grid: Codebook, threads: int) -> None:
    require_same(nearest(grid, w, isa, threads), nearest(grid, w, "off"))


@every_isa
@settings(deadline=None, max_examples=40)
@given(w=weights(), threads=any_threads)
def test_int8_rounds_as_bitsandbytes_does(isa: str, w: Tensor, threads: int) -> None:
    require_same(nearest(Int8Rows(), w, isa, threads), nearest(Int8Rows(), w, "off"))


@every_isa
@settings(deadline=None, max_examples=80)
@given(
    w=weights(), bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from(GROUP_SIZES),
    kind=st.sampled_from([{}, {"symmetric": True}, {"float_zero": True}]), threads=any_threads,
)  # fmt: skip
def test_affine_groups_round_as_in_torch(
    isa: str, w: Tensor, bits: int, group: int, kind: dict[str, bool], threads: int
) -> None:
    grid = Affine(bits, group, **kind)
    expected = nearest(grid, w, "off")
    require_same(nearest(grid, w, isa, threads), expected)
    with forced(isa, threads):
        params = grid.fit(w)
        require_same((grid.round(w, params), params), expected)
        other = w.flip(0)  # under the parameters of other rows: beyond their range, and ties
        codes = grid.round(other, params)
    with forced("off"):
        assert torch.equal(codes, grid.round(other, params))


@every_isa
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_every_half(isa: str, symmetric: bool) -> None:
    """Ranges at, between and beside the halves that scales are rounded to, subnormal ones included."""
    halves = torch.arange(0, 0x7C00, 3, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    edges = torch.cat([halves * 15 * factor for factor in (1 - 2**-11, 1 - 2**-12, 1.0, 1 + 2**-12, 1 + 2**-11)])
    w = edges[edges < 4e5, None] * torch.tensor([0.3, -0.7, 0.05] if not symmetric else [0.5, -0.5, 0.2])
    require_same(nearest(Affine(4, -1, symmetric), w, isa), nearest(Affine(4, -1, symmetric), w, "off"))


@every_isa
def test_affine_weights_that_scales_cannot_hold_are_refused(isa: str) -> None:
    w = make_weight((8, 84), torch.float32, "normal")
    with forced(isa):
        for bad, said in ((torch.nan, "holds infinity or NaN"), (torch.inf, "holds infinity or NaN"), (1e9, "65504")):
            w[7, 79] = bad
            with pytest.raises(FormatError, match=said):
                Affine(4, 32).nearest(w)


@every_isa
@pytest.mark.parametrize("grid", [Codebook(), Codebook("fp4", 128), Int8Rows(), Affine(3, 64)], ids=str)
def test_pieces_on_threads_do_not_show(isa: str, grid: Grid) -> None:
    w = make_weight((173, 1031), torch.bfloat16, "normal")
    expected = nearest(grid, w, "off")
    for threads in (1, 3):
        require_same(nearest(grid, w, isa, threads), expected)
        require_same(nearest(grid, w.T.contiguous().T, isa, threads), expected)


@every_isa
def test_every_half_and_many_singles_become_int8(isa: str) -> None:
    """Each of the 65536 halves that are numbers, as a row with the largest one; and singles around half's edges."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    near = torch.cat([halves[:2100].float() * factor for factor in (1 - 2**-12, 1 - 2**-11, 1.0, 1 + 2**-11)])
    rows = [halves.view(-1, 64), halves.view(-1, 64).bfloat16()[:400], near.view(-1, 24), near.view(-1, 24) * 2**-9]
    for w in rows:
        require_same(nearest(Int8Rows(), w, isa), nearest(Int8Rows(), w, "off"))


@every_isa
@pytest.mark.parametrize("grid", [Codebook(), Codebook("fp4", 64, False), Int8Rows()], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 3), (7, 79)])  # in a whole block, in the short one
def test_weights_that_are_not_finite_are_refused(isa: str, grid: Grid, bad: float, place: tuple[int, int]) -> None:
    w = make_weight((8, 84), torch.float32, "normal")
    w[place] = bad
    with forced(isa), pytest.raises(FormatError, match="holds infinity or NaN"):
        grid.nearest(w)


@every_isa
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(0, 99))
def test_nibbles_pack_as_in_torch(isa: str, n: int, seed: int) -> None:
    codes = torch.randint(0, 16, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    with forced("off"):
        expected = packing.pack_nibbles(codes, pad=7)
    with forced(isa):
        assert torch.equal(packing.pack_nibbles(codes, pad=7), expected)
        assert torch.equal(packing.unpack_nibbles(expected, n), codes)


def test_the_switch_says_what_is_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "sse9")
    native.active.cache_clear()
    try:
        with pytest.raises(
            RequestError,
            match="NEOQUANT_ISA is 'sse9'; legal are portable, avx2, avxvnni, avx512, avx512vnni, amx, neon and off",
        ):
            native.active()
    finally:
        monkeypatch.undo()
        native.active.cache_clear()


def test_off_is_off() -> None:
    with forced("off"):
        assert native.active().library is None
        assert native.active().reason == "switched off by NEOQUANT_ISA=off"


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (lambda path: None, "not compiled when neoquant was installed"),
        (lambda path: path.write_bytes(b"not a library"), "_cpu.so cannot be used"),
        (lambda path: shutil.copy(_ctypes.__file__, path), "_cpu.so cannot be used"),
    ],
    ids=["missing", "damaged", "another"],
)
def test_without_a_library_everything_works_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Callable[[Path], None], reason: str
) -> None:
    w = make_weight((8, 84), torch.float16, "normal")
    expected = nearest(Codebook(), w, "off")
    library(tmp_path / "_cpu.so")
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.delenv(native.SWITCH, raising=False)
    forget()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert native.active().library is None and native.active().reason.startswith(reason)
        warned = [] if reason.startswith("not compiled") else [loader.NativeWarning]
        assert [each.category for each in said] == warned
        assert native.runnable() == []
        require_same(Codebook().nearest(w), expected)
        monkeypatch.setenv(native.SWITCH, "portable")
        native.active.cache_clear()
        with pytest.raises(RequestError, match="NEOQUANT_ISA is 'portable', but there is no native library: "):
            native.active()
    finally:
        monkeypatch.undo()
        forget()


def forget() -> None:
    """Look for the library again."""
    loader._load.cache_clear()
    native.active.cache_clear()


def compiler_without_optimization(script: Path) -> Path:
    """Python's C compiler with -O0 at the end: it takes seconds, where -O3 takes minutes."""
    script.write_text(f'#!/bin/sh\nexec {sysconfig.get_config_var("CC") or "cc"} "$@" -O0\n')
    script.chmod(0o755)
    return script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "compiled"), [({}, True), ({"NEOQUANT_NO_EXTENSION": "1"}, False), ({"CC": "/bin/false"}, False)]
)
def test_a_wheel_carries_the_library_where_it_can(tmp_path: Path, environment: dict[str, str], compiled: bool) -> None:
    if compiled and not native.runnable():
        pytest.skip("there is no compiler, or the library was left out")
    source = tmp_path / "source"
    kept = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "neoquant", "recipes", "eval")
    source.mkdir()
    for name in kept:
        path = REPOSITORY / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "results", "*.safetensors")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source / name)
    if compiled:
        environment = {"CC": str(compiler_without_optimization(tmp_path / "cc"))}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, check=True)
    assert bool(list((tmp_path / "built" / "neoquant" / "native").glob("_cpu*.so"))) == compiled


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6, 8])
def test_cores_are_left_to_others_and_bytes_stay_the_same(threads: int) -> None:
    before, random = torch.get_num_threads(), torch.Generator().manual_seed(threads)
    try:
        torch.set_num_threads(threads)
        for blocks in (100, 32768, 32769, 65537, 160001, 262145):  # on either side of where torch shares a sum out
            w = torch.randn(blocks * 32 + 5, 1, generator=random)
            _, params = Codebook("nf4", 32).nearest(w)
            with native.leaving_cores(2):
                assert (torch.get_num_threads(), native.team_size()) == (max(1, threads - 2), threads)
                _, found = Codebook("nf4", 32).nearest(w)
                with native.leaving_cores(1):
                    assert native.team_size() == threads
            assert (torch.get_num_threads(), native.team_size()) == (threads, threads)
            assert all(torch.equal(params[name], found[name]) for name in params), blocks
    finally:
        torch.set_num_threads(before)


@every_isa
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_likeliest_is_the_first_of_the_largest(isa: str, data: st.DataObject) -> None:
    """As Python finds it, of rows of any length with many alike, with infinities and NaN among them or not."""
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 31, 32, 33, 64, 97]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randint(-9, 9, (rows, columns), generator=generator).float()
    for odd in data.draw(
        st.lists(st.sampled_from([float("inf"), float("-inf"), float("nan"), -0.0, 1e30]), max_size=3)
    ):
        logits[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))] = odd
    with forced(isa, data.draw(any_threads)):
        tokens, finite = products.likeliest(logits)
    for row, token, usable in zip(logits.tolist(), tokens.tolist(), finite.tolist(), strict=True):
        assert usable == (not any(map(math.isnan, row)) and math.isfinite(max(row)))
        assert 0 <= token < columns and (not usable or token == row.index(max(row)))
