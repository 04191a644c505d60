"""The worked examples of docs/formats.md, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from neoquant.formats import FORMATS
from neoquant.grids import Affine, Codebook, Grid, Int8Rows
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

WEIGHT = torch.tensor([[0.5, -1.0, 0.25], [0.0, 1.0, -0.125]], dtype=torch.float16)
ONE = "0000803f"  # 1.0 in float32, little end first
NF4_TABLE = (
    "000080bf b13932bf 306b06bf a032cabe 4da291be 3f353dbe 7178babd 00000000"
    "fffaa23d e3ca243e dd047c3e 3a03ad3e b8a4e13e ab07103f b313393f 0000803f"
)
FP4_TABLE = (
    "00000000 abaaaa3b abaa2a3f 0000803f abaaaa3e 0000003f abaa2a3e 0000803e"
    "00000000 abaaaabb abaa2abf 000080bf abaaaabe 000000bf abaa2abe 000080be"
)
BNB_STATE = '{"quant_type": "%s", "blocksize": 32, "dtype": "float16", "shape": [2, 3]%s}'
NESTED = ', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.0'

CASES: dict[str, tuple[str, Grid, dict[str, bytes]]] = {
    "bnb4 nf4": (
        "bnb4",
        Codebook("nf4", 32, False),
        {
            ".weight": bytes.fromhex("c0 a7 f6"),
            ".weight.absmax": bytes.fromhex(ONE),
            ".weight.quant_map": bytes.fromhex(NF4_TABLE),
            ".weight.quant_state.bitsandbytes__nf4": (BNB_STATE % ("nf4", "")).encode(),
        },
    ),
    "bnb4 nf4 nested": (
        "bnb4",
        Codebook("nf4", 32, True),
        {
            ".weight": bytes.fromhex("c0 a7 f6"),
            ".weight.absmax": bytes.fromhex("00"),
            ".weight.nested_absmax": bytes.fromhex("00000000"),
            ".weight.quant_state.bitsandbytes__nf4": (BNB_STATE % ("nf4", NESTED)).encode(),
        },
    ),
    "bnb4 fp4": (
        "bnb4",
        Codebook("fp4", 32, False),
        {
            ".weight": bytes.fromhex("5b 70 3e"),
            ".weight.absmax": bytes.fromhex(ONE),
            ".weight.quant_map": bytes.fromhex(FP4_TABLE),
            ".weight.quant_state.bitsandbytes__fp4": (BNB_STATE % ("fp4", "")).encode(),
        },
    ),
    "bnb8": (
        "bnb8",
        Int8Rows(),
        {
            ".weight": bytes.fromhex("40 81 20  00 7f f0"),
            ".SCB": bytes.fromhex(ONE + ONE),
            ".weight_format": bytes.fromhex("00"),
        },
    ),
    "packed nf4": (
        "packed",
        Codebook("nf4", 32, False),
        {
            ".weight": bytes.fromhex("0c 0a  f7 06"),
            ".weight.absmax": bytes.fromhex(ONE),
            ".weight.neoquant": (
                b'{"version": 1, "grid": {"name": "nf4", "block_size": 32, "double_quant": false}, '
                b'"shape": [2, 3], "dtype": "float16"}'
            ),
        },
    ),
    "packed affine with float zeros": (
        "packed",
        Affine(4, -1, float_zero=True),
        {
            ".weight": bytes.fromhex("0f 0d  f2 00"),
            ".weight.scale": bytes.fromhex("662e cd2c"),
            ".weight.zero": bytes.fromhex("0049 aa3e"),
            ".weight.neoquant": (
                b'{"version": 1, "grid": {"name": "affine", "bits": 4, "group_size": -1, "symmetric": false, '
                b'"float_zero": true}, "shape": [2, 3], "dtype": "float16"}'
            ),
        },
    ),
}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("format", "grid", "expected"), CASES.values(), ids=CASES)
def test_worked_examples(format: str, grid: Grid, expected: dict[str, bytes]) -> None:
    found = {suffix: raw(tensor) for suffix, tensor in FORMATS[format].encode(Nearest().quantize(WEIGHT, grid)).items()}
    found.pop(".weight.nested_quant_map", None)
    if "nested" in "".join(expected):
        found.pop(".weight.quant_map")
    assert found == expected


def test_the_page_shows_these_bytes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    squeezed = page.replace(" ", "")
    for _, _, tensors in CASES.values():
        assert tensors[".weight"].hex() in squeezed
    assert CASES["bnb4 nf4"][2][".weight.quant_state.bitsandbytes__nf4"].decode() in page
    for name in ("packed nf4", "packed affine with float zeros"):
        assert CASES[name][2][".weight.neoquant"].decode() in page
    floats = CASES["packed affine with float zeros"][2]
    assert floats[".weight.scale"].hex() in squeezed and floats[".weight.zero"].hex() in squeezed


def test_order_is_stored_as_it_is() -> None:
    codes = torch.tensor([[12, 0, 10], [7, 15, 6]], dtype=torch.uint8)
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    q = QuantizedTensor(codes, Codebook("nf4", 32, False), {"absmax": torch.ones(1)}, order)
    assert raw(FORMATS["packed"].encode(q)[".weight.order"]) == bytes.fromhex("02000000 00000000 01000000")
    table = Codebook().table()
    expected = torch.stack([table[[0, 10, 12]], table[[15, 6, 7]]])  # column j goes to input feature order[j]
    assert torch.equal(q.dequantize(torch.float32), expected)
