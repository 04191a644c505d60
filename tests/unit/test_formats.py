"""Formats: what they refuse and warn of, config.json, and files that say something wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from weights import make_weight

from neoquant.errors import FormatError, RequestError
from neoquant.formats import FORMATS, Bnb4, Bnb8, PackedFormat, choose, detect
from neoquant.formats.base import json_from_tensor, json_to_tensor
from neoquant.grids import Codebook, Grid, Int8Rows
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

STATE = ".weight.quant_state.bitsandbytes__nf4"
SHAPE = (24, 96)


def encoded(format: str, grid: Grid) -> dict[str, Tensor]:
    return FORMATS[format].encode(Nearest().quantize(make_weight(SHAPE, torch.float16, "normal"), grid))


def with_state(**changes: Any) -> dict[str, Tensor]:
    """A stored NF4 weight whose JSON says something else; None removes a key."""
    tensors = encoded("bnb4", Codebook())
    state = json_from_tensor(STATE, tensors[STATE]) | changes
    return {**tensors, STATE: json_to_tensor({key: value for key, value in state.items() if value is not None})}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, "quant_state.bitsandbytes__nf4 says that its type is fp4"),
        ({"quant_type": "nf3"}, "no codebook is called 'nf3'"),
        ({"blocksize": 48}, "block size 48: legal are 32, 64"),
        ({"blocksize": 32}, r"absmax of a nf4 weight \[24, 96\] is torch.uint8 \[72\], got torch.uint8 \[36\]"),
        ({"shape": [96, 24, 1]}, "shape is two positive numbers"),
        ({"shape": [24, 95]}, "a 4-bit weight .* takes 1140 bytes, got 1152"),
        ({"shape": [-24, -96]}, "shape is two positive numbers"),
        ({"dtype": "int8"}, "type is 'int8'; legal are float32, float16 and bfloat16"),
        ({"nested_blocksize": 128}, "nested_blocksize must be 256, got 128"),
        ({"nested_offset": "much"}, "nested_offset is a number"),
        ({"nested_offset": float("nan")}, "nested_offset of a nf4 weight holds infinity or NaN"),
        ({"nested_offset": None}, "has unknown weight.nested_absmax, weight.nested_quant_map"),
    ],
)
def test_wrong_states_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Bnb4().decode(with_state(**changes))


def test_broken_json_is_refused() -> None:
    tensors = encoded("bnb4", Codebook())
    for broken, message in ((tensors[STATE][:-1], "is not JSON"), (json_to_tensor({})[:0], "is not JSON")):
        with pytest.raises(FormatError, match=message):
            Bnb4().decode({**tensors, STATE: broken})
    listed = torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)
    with pytest.raises(FormatError, match="holds a JSON list, not an object"):
        Bnb4().decode({**tensors, STATE: listed})
    with pytest.raises(FormatError, match="is not JSON"):
        Bnb4().decode({**tensors, STATE: torch.full((3,), 255, dtype=torch.uint8)})


def test_other_tables_are_refused() -> None:
    tensors = encoded("bnb4", Codebook())
    for name in (".weight.quant_map", ".weight.nested_quant_map"):
        with pytest.raises(FormatError, match="is not the table of values"):
            Bnb4().decode({**tensors, name: tensors[name] + 0.01})


def test_packed_headers_are_checked() -> None:
    tensors = encoded("packed", Codebook())
    header = json_from_tensor("header", tensors[".weight.neoquant"])
    for changes, message in (
        ({"version": 2}, "version is 2; this neoquant reads 1"),
        ({"grid": "nf4"}, "grid is an object"),
        ({"grid": {"name": "nf9"}}, "no grid is called 'nf9'"),
        ({"grid": {"name": "int8"}}, "lacks weight.scb"),
        ({"shape": [96, 24]}, r"weight is torch.uint8 \[96, 12\], got torch.uint8 \[24, 48\]"),
    ):
        with pytest.raises(FormatError, match=message):
            PackedFormat().decode({**tensors, ".weight.neoquant": json_to_tensor(header | changes)})
    double = torch.zeros(96, dtype=torch.int32)
    with pytest.raises(FormatError, match="order must hold each of 0 to 95 once"):
        PackedFormat().decode({**tensors, ".weight.order": double})


def test_older_int8_files_lack_the_arrangement() -> None:
    tensors = encoded("bnb8", Int8Rows())
    arrangement = tensors.pop(".weight_format")
    assert Bnb8().decode(tensors).grid == Int8Rows()
    with pytest.raises(FormatError, match=r"weight_format must be 0 \(rows\), got 2"):
        Bnb8().decode({**tensors, ".weight_format": arrangement + 2})


def test_the_first_format_that_holds_all_is_chosen() -> None:
    four, eight = (Codebook(), SHAPE), (Int8Rows(), SHAPE)
    assert choose({"a": four}).name == "bnb4"
    assert choose({"a": eight}).name == "bnb8"
    assert choose({"a": four, "b": eight}).name == "packed"
    assert choose({"a": four}, "neoquant").name == "packed"
    assert choose({"a": four, "b": four}, ordered=["b"]).name == "packed"
    with pytest.raises(RequestError, match=r"format bnb4 cannot hold an activation order \(b\)"):
        choose({"a": four, "b": four}, "bnb4", ordered=["b"])
    with pytest.raises(RequestError, match=r"cannot hold this: .*not int8 \(b\); .*not nf4 \(a\)"):
        choose({"a": four, "b": eight}, "bitsandbytes")
    with pytest.raises(
        RequestError, match="'gguf'; there are auto, bitsandbytes, gptq, compressed-tensors, neoquant, bnb4, bnb8"
    ):
        choose({"a": four}, "gguf")


def test_detect_says_what_it_cannot_read() -> None:
    assert detect({}, ["lm_head.weight"]) is None
    with pytest.raises(
        FormatError, match="quant_method 'awq'; neoquant reads bitsandbytes, gptq, compressed-tensors, neoquant"
    ):
        detect({"quantization_config": {"quant_method": "awq"}}, ["a.qweight"])
    with pytest.raises(FormatError, match="says bitsandbytes, but no tensor"):
        detect({"quantization_config": {"load_in_4bit": True}}, ["a.weight"])
    with pytest.raises(FormatError, match="several formats are mixed: bnb4, bnb8"):
        detect({}, [f"a{STATE}", "b.SCB"])
    naive = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    with pytest.raises(FormatError, match="says compressed-tensors of format 'float-quantized', but no tensor"):
        detect(naive, ["a.weight", "a.weight_scale"])
    with pytest.raises(FormatError, match=r"states bits, group_size and sym .*may be of AWQ"):
        found = detect({}, ["a.qweight", "a.qzeros", "a.scales"])
        assert found is not None
        found.decode({f".{name}": torch.zeros(8, 8) for name in ("qweight", "qzeros", "scales", "g_idx")})


@pytest.mark.parametrize(
    ("beside", "program"),
    [
        ("W_q", "hqq"),
        ("weight._data", "optimum-quanto"),
        ("weight._data._data", "optimum-quanto"),
        ("_weight_qdata", "torchao"),
        ("weight_scales", "EETQ"),
        ("weight_scale_inv", "a program for FP8"),
        ("weight_scale", "a program for FP8 or int8"),
    ],
)
def test_weights_of_other_programs_are_no_plain_ones(beside: str, program: str) -> None:
    """Though config.json says nothing, and the rest is as in a plain checkpoint."""
    layer = "transformer.h.0.mlp.c_fc"
    message = f"^tensor '{layer}.{beside}' is of a weight quantized by {program}; neoquant reads .*: give the model"
    with pytest.raises(FormatError, match=message):
        detect({}, [f"{layer}.weight", f"{layer}.{beside}", "transformer.wte.weight"])


def test_rows_that_others_misread_are_pointed_out() -> None:
    assert "cross rows of 96" in str(Bnb4().caution(Codebook(), SHAPE))
    assert Bnb4().caution(Codebook("nf4", 32), SHAPE) is None
    assert Bnb4().caution(Codebook("nf4", 2048), SHAPE) is None
    assert Bnb8().caution(Int8Rows(), SHAPE) is None


def test_config_names_the_commonest_grid_and_what_is_kept() -> None:
    grids = {"a": Codebook("fp4", 32, False), "b": Codebook(), "c": Codebook()}
    config = Bnb4().config(grids, ["h.0.mlp.c_fc"])
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert config["llm_int8_skip_modules"] == ["h.0.mlp.c_fc", "lm_head", "transformer.h.0.mlp.c_fc"]


def test_quantized_tensors_are_checked() -> None:
    codes, grid = torch.zeros(2, 32, dtype=torch.uint8), Codebook("nf4", 64, False)
    params = {"absmax": torch.ones(1)}
    for wrong, message in (
        ({"codes": codes.long()}, r"uint8 \[O, I\], got torch.int64"),
        ({"codes": codes[0]}, r"uint8 \[O, I\], got torch.uint8 \[32\]"),
        ({"codes": codes + 16}, "codes of nf4 end at 15, got 16"),
        ({"params": {}}, r"has the parameters \['absmax'\], got \[\]"),
        ({"dtype": torch.int8}, "a weight has a floating-point type"),
        ({"order": torch.arange(32)}, r"order is int32 \[32\], got torch.int64"),
    ):
        with pytest.raises(FormatError, match=message):
            QuantizedTensor(**({"codes": codes, "grid": grid, "params": params} | wrong))
    with pytest.raises(FormatError, match=r"only floating-point matrices can be quantized, got torch.float32 \[4\]"):
        Nearest().quantize(torch.ones(4), grid)
