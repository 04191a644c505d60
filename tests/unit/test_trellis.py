"""Trellises of 2 and 3 bits: against definition, exhaustive search and torch; from weights to a measured model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import every_isa, forced
from torch import Tensor
from weights import make_weight

import neoquant
from neoquant import native
from neoquant.errors import FormatError, RequestError
from neoquant.formats import FORMATS
from neoquant.grids import TrellisGrid, grid_from_dict, make_grid
from neoquant.grids.trellis import PRECISION, SPAN, TRELLISES, VALUES
from neoquant.grids.viterbi import best_codes
from neoquant.kernels import KERNELS, Cpu, CpuInt8
from neoquant.native import trellis as library
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Gptq, Nearest
from neoquant.quantizers.feedback import round_columns
from neoquant.quantizers.gptq import Report
from neoquant.quantizers.hessian import SpanFactor
from neoquant.tensor import QuantizedTensor
from neoquant.triton import running

needs_library = pytest.mark.skipif(library.refuse() is not None, reason=str(library.refuse()))


every_bits = pytest.mark.parametrize("bits", TRELLISES)


def values_of(codes: list[int], bits: int) -> list[float]:
    """Of one short column, by the definition in docs/formats.md."""
    found, n = [], len(codes)
    for row in range(n):
        if bits == 2:
            state = sum(codes[(row - back) % n] * 4**back for back in range(6))
            found.append(VALUES[2][(state * 1133 % 4096) >> 8])
        else:
            state = sum(codes[(row - back) % n] * 8**back for back in range(4))
            found.append(VALUES[3][(state * 495 % 4096) >> 7])
    return found


def cost(codes: list[int], wanted: list[float], importance: list[float], bits: int) -> float:
    return sum(c * (v - w) ** 2 for v, w, c in zip(values_of(codes, bits), wanted, importance, strict=True))


def problem(n: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, generator=random), PRECISION * torch.rand(1, n, generator=random).add(0.1)


def search(wanted: Tensor, importance: Tensor, isa: str, bits: int) -> Tensor:
    """The codes uint8[N, n] on an instruction set; `off` is torch."""
    if isa == "off":
        return best_codes(wanted, importance, TRELLISES[bits], VALUES[bits])
    paths = TrellisGrid(bits=bits).columns({"scale": torch.ones(1, 1, dtype=torch.float16)}, (1, 1)).levels()
    assert isinstance(paths, library.Paths)
    paths = paths._replace(scale=torch.ones_like(wanted), importance=importance.contiguous(), width=1)
    codes = torch.zeros(wanted.shape, dtype=torch.uint8)
    with forced(isa):
        library.round_columns(wanted.clone(), None, paths, torch.arange(len(wanted)), codes)
    return codes


every_way = pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.isa(isa)) for isa in native.ISAS] + ["off"]
)


@every_way
@pytest.mark.parametrize(("bits", "n"), [*((2, n) for n in range(1, 7)), *((3, n) for n in range(1, 5))])
def test_no_path_down_a_short_span_is_better(bits: int, n: int, isa: str) -> None:
    wanted, importance = problem(n, n)
    found = search(wanted, importance, isa, bits)[0].tolist()
    every = (list(path) for path in itertools.product(range(1 << bits), repeat=n))
    best = min(cost(path, wanted[0].tolist(), importance[0].tolist(), bits) for path in every)
    assert cost(found, wanted[0].tolist(), importance[0].tolist(), bits) < best + n  # each cost is a whole number


@every_way
@every_bits
@pytest.mark.parametrize("seed", range(3))
def test_no_path_with_the_same_end_is_better(bits: int, seed: int, isa: str) -> None:
    """What a span begins from is searched for first; then nothing is left to chance."""
    free = {2: 4, 3: 3}[bits]
    wanted, importance = problem(free + TRELLISES[bits].memory - 1, seed)
    found = search(wanted, importance, isa, bits)[0].tolist()
    every = ([*path, *found[free:]] for path in itertools.product(range(1 << bits), repeat=free))
    best = min(cost(path, wanted[0].tolist(), importance[0].tolist(), bits) for path in every)
    assert cost(found, wanted[0].tolist(), importance[0].tolist(), bits) < best + len(found)


@every_isa
@every_bits
@settings(deadline=None, max_examples=8)
@given(n=st.integers(1, 60), count=st.integers(1, 3), seed=st.integers(0, 99), size=st.sampled_from([0.0, 0.1, 1, 30]))
def test_every_way_finds_the_same_codes(isa: str, bits: int, n: int, count: int, seed: int, size: float) -> None:
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randn(count, n, generator=random) * size
    importance = PRECISION * torch.rand(count, n, generator=random).mul(5).exp() / 10
    assert torch.equal(search(wanted, importance, isa, bits), search(wanted, importance, "off", bits))


@every_way
@pytest.mark.parametrize(("bits", "least", "most"), [(2, 0.068, 0.0755), (3, 0.0189, 0.0211)])
def test_the_error_is_near_that_of_a_path_without_ends(isa: str, bits: int, least: float, most: float) -> None:
    """0.0718 and 0.0200 of a normal distribution, measured on endless columns; a scalar quantizer's best are 0.1175 and
    0.0345."""
    random = torch.Generator().manual_seed(4)
    wanted = torch.randn(16, 256, generator=random)
    codes = search(wanted, torch.full((16, 256), PRECISION), isa, bits)
    values = torch.tensor(VALUES[bits])[TRELLISES[bits].numbers(codes.T.contiguous()).long()].T
    assert least < (values - wanted).square().mean() < most


@needs_library
@every_bits
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (7, 3), (260, 5), (300, 33)], ids=str)
def test_whole_weights_are_rounded_alike_without_the_library(shape: tuple[int, int], bits: int) -> None:
    grid, w = TrellisGrid(16, bits), make_weight(shape, torch.float32, "outlier", 5)
    codes, params = grid.nearest(w)
    columns = grid.columns(params, shape)
    for j in {0, shape[1] // 2, shape[1] - 1}:
        found, values = columns.round(j, w[:, j])
        assert torch.equal(found, codes[:, j]) and torch.equal(values, grid.decode(codes, params)[:, j])
    with forced("off"):
        assert torch.equal(grid.round(w, params), codes)


@pytest.mark.parametrize(("bits", "rows"), [(2, 261), (3, 259)])
def test_a_row_is_decoded_from_its_ring(bits: int, rows: int) -> None:
    """The second span has fewer rows than a state has codes."""
    grid, random = TrellisGrid(-1, bits), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (rows, 3), dtype=torch.uint8, generator=random)
    params = {"scale": torch.rand(rows, 1, generator=random).half()}
    w = grid.decode(codes, params)
    for column in range(3):
        tail = torch.tensor(values_of(codes[256:, column].tolist(), bits)) * params["scale"][256:, 0].float()
        assert torch.equal(w[256:, column], tail)
        head = torch.tensor(values_of(codes[:256, column].tolist(), bits)) * params["scale"][:256, 0].float()
        assert torch.equal(w[:256, column], head)


def test_whose_codes_a_row_is_read_from() -> None:
    two, three = (TRELLISES[bits].sources(torch.tensor([0, 258]), 261).tolist() for bits in (2, 3))
    assert two == [[0, 255, 254, 253, 252, 251], [258, 257, 256, 260, 259, 258]]
    assert three == [[0, 255, 254, 253], [258, 257, 256, 260]]


def test_zeros_and_what_is_too_large() -> None:
    grid = TrellisGrid()
    codes, params = grid.nearest(torch.zeros(9, 70))
    assert not params["scale"].any() and not grid.decode(codes, params).any()
    for search_too in (False, True):
        with pytest.raises(FormatError, match="holds infinity or NaN, which no grid can hold"):
            grid.fit(torch.tensor([[1.0, torch.nan]]), search_too)
        with pytest.raises(FormatError, match="scales are float16, which ends at 65504; the largest is 100000"):
            grid.fit(torch.full((2, 3), 1e5), search_too)


@every_bits
@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_loses_no_more(weighted: bool, bits: int) -> None:
    grid, w = TrellisGrid(16, bits), make_weight((40, 50), torch.float32, "outlier", 70) / 6e4
    importance = torch.rand(50, generator=torch.Generator().manual_seed(3)) if weighted else None
    lost = []
    for searched in (False, True):
        params = grid.fit(w, searched, importance)
        apart = (grid.decode(grid.round(w, params), params) - w).square()
        lost.append(float((apart if importance is None else apart * importance).sum()))
    assert lost[1] < lost[0]


def inputs(columns: int, rows: int = 300) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).cumsum(1)


@every_bits
@pytest.mark.parametrize("shape", [(1, 1), (9, 75), (270, 40)], ids=str)
@pytest.mark.parametrize("order", ["static", "off", "dynamic"])
def test_gptq(shape: tuple[int, int], order: str, bits: int) -> None:
    w, chosen, x = make_weight(shape, torch.float32, "normal"), Gptq(order=order), inputs(shape[1])
    hessian = chosen.observer(shape[1])
    hessian.add(x)
    grid = TrellisGrid(32, bits)
    q, plain = chosen.quantize(w, grid, hessian), Nearest().quantize(w, grid)
    lost = [float((x @ (each.dequantize(torch.float32) - w).T).norm()) for each in (q, plain)]
    assert lost[0] <= lost[1] * (1 + 1e-6) and (shape == (1, 1) or lost[0] < 0.7 * lost[1])


@needs_library
@every_bits
def test_feedback_is_that_of_torch(bits: int) -> None:
    """Sums differ in their last bits, so that paths may part: the errors of the output are alike."""
    w, x, grid = make_weight((70, 24), torch.float32, "normal"), inputs(24), TrellisGrid(16, bits)
    hessian = Gptq().observer(24)
    hessian.add(x)
    factor, order, params = hessian.factor(True, 0.01), hessian.order(), grid.fit(w)
    lost = []
    for isa in (native.ISAS[native.active().isa], "off"):
        with forced(isa):
            codes = round_columns(w.T[order], factor.upper, grid.columns(params, (70, 24)), order, block=8)
        lost.append(float((x @ (grid.decode(codes, params) - w).T).norm()))
    assert lost[0] == pytest.approx(lost[1], rel=0.03)
    nearest = grid.decode(grid.round(w, params), params)
    assert max(lost) < 0.7 * float((x @ (nearest - w).T).norm())


def output_hessian(heads: int, rows: int) -> Tensor:
    """K[heads, rows, rows] of rows that count the more the later they come, and hang together."""
    random = torch.Generator().manual_seed(2)
    common = torch.randn(heads, rows // 4 + 1, rows, generator=random)
    spread = torch.logspace(-0.5, 0.5, rows) * torch.randn(heads, rows, rows, generator=random)
    return common.mT @ common + spread.mT @ spread / rows


def by_objective(objective: str, w: Tensor, K: Tensor, isa: str, bits: int = 2) -> tuple[QuantizedTensor, Report]:
    chosen = Gptq(objective=objective)
    hessian = chosen.observer(w.shape[1])
    hessian.add(inputs(w.shape[1]))
    with forced(isa):
        q, report = chosen.quantize_with_report(w, TrellisGrid(16, bits), hessian, K)
    assert isinstance(report, Report)
    return q, report


def test_rows_only_weigh_for_attention_and_without_the_library() -> None:
    """As the output Hessian's diagonal says."""
    w, x, K = make_weight((32, 24), torch.float32, "normal"), inputs(24), output_hessian(2, 16)
    plain, other = by_objective("layer", w, K, "off")
    rows = K.diagonal(dim1=1, dim2=2).flatten()
    for objective, isa in (("attention", native.ISAS[native.active().isa]), ("model", "off")):
        q, report = by_objective(objective, w, K, isa)
        apart = [(x @ (each.dequantize(torch.float32) - w).T).square().sum(0) for each in (q, plain)]
        assert (apart[0] * rows).sum() < (apart[1] * rows).sum() and apart[0].sum() > apart[1].sum()
        assert report.objective == other.objective == "layer"
        assert report.remarks == ["rows of a trellis are not coupled, but weighed"]
        assert other.remarks == [] and report.to_dict()["remarks"] == report.remarks


@needs_library
@every_bits
@pytest.mark.parametrize(("rows", "heads"), [(280, 2), (300, 1)])
def test_coupled_rows_lose_less(rows: int, heads: int, bits: int) -> None:
    """Of the model's loss, tr(K E H E'), also where spans cut pieces of coupled rows."""
    w, x, K = make_weight((rows, 12), torch.float32, "normal"), inputs(12), output_hessian(heads, rows // heads)
    isa = native.ISAS[native.active().isa]
    results = {
        "coupled": by_objective("model", w, K, isa, bits), "weighed": by_objective("model", w, K, "off", bits),
        "layer": by_objective("layer", w, K, isa, bits),
    }  # fmt: skip
    lost = {}
    for name, (q, _) in results.items():
        error = ((q.dequantize(torch.float32) - w) @ x.T).view(heads, rows // heads, -1)
        lost[name] = float((error * (K @ error)).sum())
    assert lost["coupled"] < 0.8 * lost["weighed"] and lost["coupled"] < 0.8 * lost["layer"]
    report = results["coupled"][1]
    assert report.objective == "model" and report.remarks == []


@pytest.mark.parametrize(("heads", "rows", "span"), [(3, 5, 4), (4, 2, 8), (1, 7, 16)])
def test_a_span_is_as_much_of_the_output_hessian(heads: int, rows: int, span: int) -> None:
    """What rows cost one after the other, the earlier errors being compensated, is what their errors cost together."""
    K = output_hessian(heads, rows)
    factor, whole = SpanFactor.of(K, span, 1e-5), torch.block_diag(*K)
    for number, rest in enumerate(torch.split(torch.arange(heads * rows), span)):
        error = torch.randn(len(rest), generator=torch.Generator().manual_seed(number))
        added, cost = torch.zeros(len(rest)), 0.0
        for row, place in enumerate(rest):
            lacking = error[row] + added[row]
            cost += float(factor.price[place] * lacking**2)
            added -= lacking * factor.unit[number, row, : len(rest)]
            added[: row + 1] = 0
        assert cost == pytest.approx(float(error @ whole[rest][:, rest] @ error), rel=1e-3)


def search_coupled(w: Tensor, original: Tensor, K: Tensor, isa: str, bits: int) -> tuple[Tensor, Tensor, SpanFactor]:
    """The codes uint8[O] of one column whose rows are coupled, and its errors [O]."""
    factor, codes = SpanFactor.of(K, SPAN, 1e-5), torch.zeros(1, len(w), dtype=torch.uint8)
    paths = TrellisGrid(bits=bits).columns({"scale": torch.ones(len(w), 1, dtype=torch.float16)}, (len(w), 1)).levels()
    assert isinstance(paths, library.Paths)
    coupled = library.Coupled(factor.unit, factor.price, original[None].contiguous())
    with forced(isa):
        errors = library.round_columns(w[None].clone(), torch.ones(1, 1), paths, torch.zeros(1).long(), codes, coupled)
    assert errors is not None
    return codes[0], errors[0], factor


@every_isa
@every_bits
@pytest.mark.parametrize("seed", range(3))
def test_no_path_of_coupled_rows_is_better(isa: str, seed: int, bits: int) -> None:
    """Of two rows and those whose codes are what the ring begins from, five of two bits or three of three."""
    rows = 2 + TRELLISES[bits].memory - 1
    random, K = torch.Generator().manual_seed(seed), output_hessian(1, rows)
    w = torch.randn(rows, generator=random)
    codes, errors, factor = search_coupled(w, w, K, isa, bits)
    assert float((factor.price * errors.square()).sum()) == pytest.approx(
        best := float((apart := w - torch.tensor(values_of(codes.tolist(), bits))) @ K[0] @ apart), rel=1e-3
    )
    for first in itertools.product(range(1 << bits), repeat=2):
        apart = w - torch.tensor(values_of([*first, *codes.tolist()[2:]], bits))
        assert best <= float(apart @ K[0] @ apart) * (1 + 1e-4)


@every_isa
@every_bits
@pytest.mark.parametrize("rows", [1, 4, 5, 6, 7, 20, 256, 259])
def test_every_way_finds_the_same_codes_of_coupled_rows(isa: str, rows: int, bits: int) -> None:
    random, K = torch.Generator().manual_seed(rows), output_hessian(1, rows)
    w, original = torch.randn(2, rows, generator=random)
    found, others = (search_coupled(w, original, K, each, bits)[:2] for each in (isa, "portable"))
    assert torch.equal(found[0], others[0]) and torch.equal(found[1], others[1])


def drawn(shape: tuple[int, int], group: int, bits: int) -> QuantizedTensor:
    """Any codes are a path."""
    random, grid = torch.Generator().manual_seed(0), TrellisGrid(group, bits)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=random)
    scale = torch.rand(grid.param_shapes(shape)["scale"][1], generator=random).half()
    return QuantizedTensor(codes, grid, {"scale": scale})


@every_isa
@every_bits
@settings(deadline=None, max_examples=40)
@given(
    rows=st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 272, 511, 512, 600])),
    columns=st.one_of(st.integers(1, 150), st.sampled_from([256, 768, 1040, 2100])),
    group=st.sampled_from([16, 64, 256, -1]), count=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 30, 50]),
    threads=st.sampled_from([1, 2, 4]), biased=st.booleans(),
)  # fmt: skip
def test_native_products(
    isa: str, bits: int, rows: int, columns: int, group: int, count: int, threads: int, biased: bool
) -> None:
    q, random = drawn((rows, columns), group, bits), torch.Generator().manual_seed(1)
    x, bias = torch.randn(count, columns, generator=random), torch.linspace(-1, 1, rows) if biased else None
    with forced(isa, threads):
        state = Cpu().pack(q)
        y = Cpu().linear(x, state, q.grid, q.shape, bias)
        assert torch.equal(
            Cpu().embedding(torch.arange(rows), state, q.grid, q.shape, torch.float32), q.dequantize(torch.float32)
        )
    assert Cpu().unpack(state, q.grid, q.shape, q.dtype).equals(q)
    w = q.dequantize(torch.float64)
    exact = x.double() @ w.T + (0 if bias is None else bias.double())
    length = x.double().norm(dim=1, keepdim=True) * w.norm(dim=1) + 1
    assert ((y - exact).abs() <= 4 * torch.finfo(torch.float32).eps * columns**0.5 * length).all()


def test_requests() -> None:
    assert make_grid(2, "trellis") == TrellisGrid(64) and make_grid(2, "trellis", group_size=-1) == TrellisGrid(-1)
    assert make_grid(3, "trellis") == TrellisGrid(64, 3) and TrellisGrid(-1, 3).label == "trellis3-rows"
    assert TrellisGrid(64).describe() == {"name": "trellis", "group_size": 64}  # as before there were three bits
    assert TrellisGrid(64, 3).describe() == {"name": "trellis", "group_size": 64, "bits": 3}
    with pytest.raises(RequestError, match="4 bits of type 'trellis': legal pairs of bits and type are"):
        make_grid(4, "trellis")
    for wrong in (4, True, "3"):
        with pytest.raises(RequestError, match=f"bits {wrong!r}: trellis has 2, 3"):
            grid_from_dict({"name": "trellis", "group_size": 64, "bits": wrong})
    with pytest.raises(RequestError, match="group size 48: legal for trellis are -1, 16, 32, 64, 128, 256"):
        make_grid(2, "trellis", group_size=48)
    grid = TrellisGrid(64)
    for format in FORMATS.values():
        if format.name != "packed":
            assert "trellis" in str(format.refuse(grid, (64, 64)))
    assert "not trellis" in str(KERNELS["bitsandbytes"].refuse(grid, (64, 64), torch.device("cuda")))
    if running.lacking() is None:
        reason = "Triton's kernels do not run trellis: its values are not decoded code by code"
        assert KERNELS["triton"].refuse(grid, (64, 64), torch.device("cuda")) == reason
    if native.active().library is not None:
        assert "activations as they are" in str(CpuInt8().refuse(grid, (64, 64), torch.device("cpu")))
    assert grid.remark((4, 64)) is None and "a group of 11 instead of 64" in str(grid.remark((4, 75)))


@pytest.mark.parametrize(
    ("calibrated", "bits", "stated"),
    [(False, 2, []), (True, 2, []), (False, 3, ["--bits", 3]), (True, 3, ["--bits", 3])],
)
def test_from_weights_to_a_measured_model(
    cli: Cli, tmp_path: Path, text_file: Path, calibrated: bool, bits: int, stated: list[str | int]
) -> None:
    out, record = tmp_path / "out", tmp_path / "loss.json"
    words = [*stated, *(["--calibration", text_file, "--rows", 2, "--length", 16] if calibrated else [])]
    done = cli("quantize", "neoquant-demo", "--type", "trellis", *words, "--out", out)
    assert done.code == 0, done.error
    model, _ = neoquant.load(out)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear) and m.grid == TrellisGrid(64, bits)]
    assert len(packed) == 6 * model.config.num_layers
    if native.active().library is not None:
        assert {layer.kernel.name for layer in packed} == {"cpu"}
    done = cli("compare", "neoquant-demo", out, "--data", text_file, "--json", record)
    assert done.code == 0, done.error
    assert "trellis" in json.dumps(json.loads(record.read_text())["candidates"])
