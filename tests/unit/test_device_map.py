"""Which part goes where, and that a model computes the same wherever its parts are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neoquant
from neoquant.errors import RequestError
from neoquant.loading.device_map import DISK, _spread, assign_devices, unit_of

SIZES = {"transformer.wte": 50, **{f"transformer.h.{n}": 10 for n in range(12)}, "transformer.ln_f": 1}
IDS = torch.tensor([[5, 9, 2, 130, 8, 11, 77], [7, 4, 4, 1, 3, 250, 0]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("transformer.h.11.mlp.c_fc.weight.absmax", "transformer.h.11"),
        ("h.1.ln_1.bias", "h.1"),
        ("transformer.wpe.weight", "transformer.wte"),
        ("wte.weight.neoquant", "wte"),
        ("lm_head.weight", "transformer.wte"),
        ("score.weight", "score"),
        ("transformer.ln_f.bias", "transformer.ln_f"),
    ],
)
def test_names_belong_to_units(name: str, unit: str) -> None:
    assert unit_of(name, tied=True) == unit
    assert unit_of("lm_head.weight", tied=False) == "lm_head"


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=12),
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
)
def test_nothing_is_given_more_than_it_may_take_and_nothing_goes_back(sizes: list[int], limits: list[int]) -> None:
    devices = [torch.device("cuda", number) for number in range(len(limits))]
    placed = _spread(
        list(zip(devices, map(float, limits), strict=True)), {str(n): size for n, size in enumerate(sizes)}
    )
    order = [*devices, DISK]
    where = [order.index(placed[str(n)]) for n in range(len(sizes))]
    assert where == sorted(where)
    for number, limit in enumerate(limits):
        assert sum(size for size, at in zip(sizes, where, strict=True) if at == number) <= limit
    for number, at in enumerate(where[1:], 1):  # a device is left only where the next unit does not fit
        former = where[number - 1]
        if at > former and former < len(limits):
            used = sum(size for size, one in zip(sizes[:number], where, strict=False) if one == former)
            assert used + sizes[number] > limits[former]


def test_max_memory_spreads_over_memory_and_disk() -> None:
    found = assign_devices("auto", {"cpu": "80"}, SIZES, tied=True)
    assert found.describe() == {
        "transformer.wte": "cpu", **{f"transformer.h.{n}": "cpu" for n in range(3)},
        **{f"transformer.h.{n}": DISK for n in range(3, 12)}, "transformer.ln_f": DISK,
    }  # fmt: skip
    assert found.first == found.of("transformer.h.9.ln_1.weight") == torch.device("cpu")
    assert found.is_mapped("transformer.h.9.ln_1.weight") and not found.is_mapped("lm_head.weight")


def test_the_longest_name_of_a_map_decides() -> None:
    told = {"transformer": "cpu", "transformer.h.1": DISK, "lm_head": "cpu"}
    found = assign_devices(told, None, SIZES, tied=True).describe()
    assert [unit for unit, where in found.items() if where == DISK] == ["transformer.h.1"]  # and not h.10, h.11
    assert assign_devices({"": "cpu"}, None, SIZES, tied=True).describe() == dict.fromkeys(SIZES, "cpu")


@pytest.mark.parametrize(
    ("device_map", "max_memory", "message"),
    [
        ({"transformer.h": "cpu"}, None, "says nothing about transformer.wte; '' stands for"),
        ({"": "cpu", "transformer.h.0.mlp": "cpu"}, None, "names 'h.0.mlp', and what is placed as a whole is"),
        ({"": "cpu", "transformer.h.40": "cpu"}, None, "names 'h.40'"),
        ({"": "cpu", "lm_head": DISK}, None, "puts lm_head elsewhere than wte"),
        ({"": "cpu", "wpe": DISK}, None, "puts wpe elsewhere than wte"),
        ({"": "cpu", "h.0": 77}, None, "has . CUDA devices"),
        ({"h": "cpu", "": "tpu"}, None, "'tpu'; legal are auto"),
        ({"h": "cpu", "": "cpu"}, {"cpu": 5}, "max_memory goes with device_map='auto'"),
        ("cpu", {"cpu": 5}, "max_memory goes with device_map='auto', not with 'cpu'"),
        ("auto", {"cpu": "5 potatoes"}, "'5 potatoes' is not a size"),
        ("auto", {"disk": 5}, "max_memory names 'disk'"),
        ("auto", {77: 5}, "has . CUDA devices"),
        ("balanced", None, "'balanced'; legal are auto"),
    ],
)
def test_what_cannot_be_placed_is_said(device_map: Any, max_memory: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        assign_devices(device_map, max_memory, SIZES, tied=True)


@pytest.mark.parametrize("source", ["plain", "nf4"])
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"transformer.wte": "cpu", "h.0": "cpu", "h.1": DISK, "": DISK}},
        {"device_map": "auto", "max_memory": {"cpu": "25KB"}},
        {"device_map": DISK},
    ],
)
def test_it_computes_the_same_wherever_it_lies(
    tiny_model: Path, tmp_path: Path, source: str, options: dict[str, Any]
) -> None:
    folder = tiny_model
    if source == "nf4":
        folder = tmp_path / "nf4"
        neoquant.quantize(tiny_model, folder, neoquant.Recipe.simple(4, "nf4"))
    on_disk = DISK in str(options) or "max_memory" in options
    if source == "nf4" and on_disk:
        with pytest.raises(RequestError, match="to stay on disk, but quantized weights are held in memory"):
            neoquant.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
        return
    model = neoquant.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    expected = neoquant.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    where = getattr(model, "hf_device_map", {})
    if DISK in where.values():
        assert list(where) == ["transformer.wte", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]
    assert bool(where) == (on_disk and options["device_map"] != DISK)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_what_is_on_disk_is_the_file_and_not_a_copy(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    with pytest.raises(
        RequestError, match=r"transformer\.h\.1\..* on disk, where it is float16: float32 would be a copy"
    ):
        neoquant.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", device_map={"": "cpu", "transformer.h.1": DISK}
        )


@pytest.mark.gpu
@pytest.mark.parametrize("said", [None, NF4])
def test_blocks_on_a_gpu_and_on_the_cpu_go_together(tiny_model: Path, said: Any) -> None:
    expected = neoquant.AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=said, dtype="float32", device_map="cpu"
    )
    for told in ({"": 0, "transformer.h.1": "cpu"}, {"": "cpu", "transformer.h.0": 0}):
        model = neoquant.AutoModelForCausalLM.from_pretrained(
            tiny_model, quantization_config=said, dtype="float32", device_map=told
        )
        assert len({parameter.device.type for parameter in model.parameters()}) == 2
        ids, keep = IDS.to(model.device), torch.ones_like(IDS).to(model.device)
        keep[0, :2] = 0
        with torch.no_grad():
            a, b = model(ids, keep, labels=ids), expected(IDS, keep.cpu(), labels=IDS)
        assert (a.logits.cpu() - b.logits).abs().max() <= 1e-3 * b.logits.abs().max()
        assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-3)
        assert model.generate(ids, max_new_tokens=5).tolist() == expected.generate(IDS, max_new_tokens=5).tolist()
