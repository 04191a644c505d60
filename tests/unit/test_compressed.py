"""compressed-tensors "pack-quantized": golden tensors made by hand, its own package, transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from torch import Tensor
from weights import make_weight

import neoquant
from neoquant.errors import FormatError, RequestError
from neoquant.formats import FORMATS, CompressedTensors, choose, detect
from neoquant.grids import Affine, Int8Rows
from neoquant.quantization.recipe import Recipe
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

FORMAT = FORMATS["compressed-tensors"]
GRIDS = [Affine(bits, size, symmetric) for bits in (2, 4, 8) for size in (-1, 32) for symmetric in (False, True)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def words_by_definition(values: list[int], bits: int) -> list[int]:
    """Integers in words, the first in the lowest bits, the last word filled with zeros: python integers only."""
    per_word = 32 // bits
    pieces = [values[start : start + per_word] for start in range(0, len(values), per_word)]
    words = [sum(value << (bits * k) for k, value in enumerate(piece)) for piece in pieces]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def reader(grid: Affine) -> CompressedTensors:
    found = detect({"quantization_config": FORMAT.config({"a": grid}, [])}, ["transformer.h.0.mlp.c_fc.weight_packed"])
    assert isinstance(found, CompressedTensors)
    return found


def random_weight(grid: Affine, shape: tuple[int, int] = (5, 96)) -> QuantizedTensor:
    return Nearest().quantize(make_weight(shape, torch.float16, "normal", grid.bits), grid)


@every_grid
def test_golden(grid: Affine) -> None:
    """Five rows: neither rows of zeros nor, with whole rows as groups, anything else fills its words."""
    shape = (5, 96 if grid.group_size == 32 else 37)
    q = random_weight(grid, shape)
    expected = {
        ".weight_packed": torch.tensor([words_by_definition(row, grid.bits) for row in q.codes.tolist()]).int(),
        ".weight_scale": q.params["scale"],
        ".weight_shape": torch.tensor(shape),
    }
    if not grid.symmetric:
        columns = q.params["zero"].T.tolist()
        expected[".weight_zero_point"] = torch.tensor([words_by_definition(c, grid.bits) for c in columns]).int().T
    found = FORMAT.encode(q)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert reader(grid).decode(expected, shape).equals(q)


def test_by_hand() -> None:
    """Codes 1 ... 9 around 8 with a scale of one half: a word is 0x87654321 and the next 0x9."""
    params = {"scale": torch.full((1, 1), 0.5, dtype=torch.float16)}
    q = QuantizedTensor(torch.arange(1, 10, dtype=torch.uint8)[None], Affine(4, -1, True), params)
    tensors = FORMAT.encode(q)
    assert [word % 2**32 for word in tensors[".weight_packed"].flatten().tolist()] == [0x87654321, 0x9]
    assert q.dequantize().tolist() == [[-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5]]


@every_grid
def test_zeros_of_older_versions_are_not_packed(grid: Affine) -> None:
    """Signed, as the field's own package unpacks those of today."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    q = random_weight(grid)
    tensors = FORMAT.encode(q)
    groups = tensors[".weight_scale"].shape[1]
    if grid.symmetric:
        tensors[".weight_zero_point"] = torch.zeros(5, groups, dtype=torch.int8)
    else:
        packed = tensors[".weight_zero_point"]
        tensors[".weight_zero_point"] = unpack_from_int32(packed, grid.bits, torch.Size((5, groups)), packed_dim=0)
    assert tensors[".weight_zero_point"].dtype == torch.int8
    assert reader(grid).decode(tensors).equals(q)
    tensors[".weight_zero_point"][0, 0] = -128
    if grid.bits < 8 or grid.symmetric:
        message = "is on none of config.json's grids" if grid.symmetric else "weight_zero_point holds -128 to .*; legal"
        with pytest.raises(FormatError, match=message):
            reader(grid).decode(tensors)


def test_zeros_of_older_versions_do_not_hide_which_grid_it_is() -> None:
    """Those of 8 bits are beyond what 4 bits hold."""
    grids = [Affine(bits, 32, False) for bits in (4, 8)]
    configs = [FORMAT.config({"a": grid}, []) for grid in grids]
    groups = {f"group_{number}": config["config_groups"]["group_0"] for number, config in enumerate(configs)}
    q = random_weight(grids[1])
    zeros = (q.params["zero"].int() - 128).to(torch.int8)
    assert int(zeros.abs().max()) > 8
    both = CompressedTensors(configs[0] | {"config_groups": groups})
    assert both.decode({**FORMAT.encode(q), ".weight_zero_point": zeros}).equals(q)


def ordered_tensors(grid: Affine) -> tuple[dict[str, Tensor], Tensor]:
    """What versions before 0.20 wrote for a weight with an activation order, and the weight."""
    q = random_weight(grid)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    codes = torch.empty_like(q.codes)
    codes[:, order] = q.codes
    g_idx = torch.empty(96, dtype=torch.int32)
    g_idx[order] = torch.arange(96, dtype=torch.int32) // 32
    weight = torch.empty(q.shape, dtype=torch.float16)
    weight[:, order] = q.dequantize()
    unordered = FORMAT.encode(QuantizedTensor(codes, grid, q.params))
    return unordered | {".weight_g_idx": g_idx}, weight


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_activation_order_is_read_but_not_written(symmetric: bool) -> None:
    tensors, weight = ordered_tensors(Affine(4, 32, symmetric))
    found = reader(Affine(4, 32, symmetric)).decode(tensors)
    assert found.order is not None and torch.equal(found.dequantize(), weight)
    with pytest.raises(FormatError, match="cannot hold an activation order"):
        FORMAT.encode(found)
    tensors[".weight_g_idx"][0] += 1
    with pytest.raises(FormatError, match="weight_g_idx must put 32 inputs into each group"):
        reader(Affine(4, 32, symmetric)).decode(tensors)


def test_several_groups_of_layers_are_told_apart_by_their_tensors() -> None:
    four, eight = Affine(4, 32, True), Affine(8, -1)
    groups = {name: FORMAT.config({"a": g}, [])["config_groups"]["group_0"] for name, g in (("x", four), ("y", eight))}
    both = CompressedTensors({"format": "pack-quantized", "config_groups": groups})
    for grid in (four, eight):
        assert both.decode(FORMAT.encode(random_weight(grid))).equals(random_weight(grid))
    with pytest.raises(FormatError, match=r"is on none of config.json's grids: Affine\(bits=4.*, Affine\(bits=8"):
        both.decode(FORMAT.encode(random_weight(Affine(2, 32))))
    whole, parts = Affine(4, -1, True), Affine(4, 32, True)
    groups = {str(grid): FORMAT.config({"a": grid}, [])["config_groups"]["group_0"] for grid in (whole, parts)}
    one_group = FORMAT.encode(random_weight(whole, (3, 32)))
    with pytest.raises(FormatError, match="may be on several of"):
        CompressedTensors({"config_groups": groups}).decode(one_group)
    with pytest.raises(RequestError, match="transformers reads one grid"):
        choose({"a": (whole, (64, 64)), "b": (parts, (64, 64))}, "compressed-tensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"type": "float"}}, "config_groups 'group_0' says type 'float'; neoquant reads int"),
        ({"weights": {"strategy": "block"}}, "says strategy 'block'; neoquant reads group and channel"),
        ({"weights": {"num_bits": 5}}, "config_groups 'group_0': bits 5"),
        ({"weights": {"num_bits": 3}}, "none of config.json's grids"),
        ({"format": "int-quantized"}, "says format 'int-quantized'; neoquant reads pack-quantized"),
        ({"input_activations": {"num_bits": 8}}, "says input_activations .*; neoquant reads None"),
    ],
)
def test_what_is_refused_of_a_configuration(change: dict[str, Any], message: str) -> None:
    grid = Affine(4, 32, True)
    config = FORMAT.config({"a": grid}, [])
    group = config["config_groups"]["group_0"]
    for key, value in change.items():
        group[key] = {**group[key], **value} if key == "weights" else value
    with pytest.raises(FormatError, match=message):
        CompressedTensors(config).decode(FORMAT.encode(random_weight(grid)))


def test_what_is_refused() -> None:
    assert "not int8" in str(FORMAT.refuse(Int8Rows(), (64, 64)))
    assert "2, 4 or 8 bits, not 3" in str(FORMAT.refuse(Affine(3, 32), (64, 64)))
    assert "64 does not divide 96" in str(FORMAT.refuse(Affine(4, 64), (64, 96)))
    grid = Affine(4, 32)
    tensors = FORMAT.encode(random_weight(grid))
    for change, message in (
        ({".weight_scale": tensors[".weight_scale"].float() + 1e-6}, "weight_scale is torch.float32 and does not fit"),
        ({".weight_shape": torch.tensor([5, 0])}, "two positive numbers"),
        ({".weight_shape": torch.tensor([5, 64])}, "on none of config.json's grids"),
    ):
        with pytest.raises(FormatError, match=message):
            reader(grid).decode({**tensors, **change})
    with pytest.raises(FormatError, match="states config_groups"):
        CompressedTensors({}).decode(tensors)
    bfloat16 = reader(grid).decode({**tensors, ".weight_scale": torch.ones(5, 3, dtype=torch.bfloat16)})
    assert bfloat16.params["scale"].dtype == torch.float16


@every_grid
def test_its_own_package_reads_the_weight_and_writes_the_same(grid: Affine) -> None:
    """In the scale's type, float16, it computes what we give in that type."""
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    assert package
    config = FORMAT.config({"a": grid}, [])["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(config)
    q = random_weight(grid)
    tensors = {name.removeprefix("."): tensor for name, tensor in FORMAT.encode(q).items()}
    weight = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(weight, q.dequantize(torch.float16))
    middle = 1 << (grid.bits - 1)
    zero = q.params.get("zero", torch.full_like(q.params["scale"], middle, dtype=torch.uint8))
    given = {"weight": weight, "weight_scale": q.params["scale"], "weight_zero_point": (zero.int() - middle).char()}
    written = PackedQuantizationCompressor.compress(given, scheme)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("keep", [[], ["*.mlp.c_proj", "transformer.h.0.*"]], ids=["", "some kept"])
def test_transformers_gives_our_logits_from_our_folder(tmp_path: Path, keep: list[str]) -> None:
    """Symmetric, as transformers 5.23 holds packed weights; asymmetric ones it reads only with `dequantize`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = write_tiny_model(tmp_path / "source", hidden_size=64, num_heads=4)
    ids = torch.randint(0, 259, (2, 21), generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        out = tmp_path / str(symmetric)
        recipe = Recipe.simple(2, "affine", group_size=32, symmetric=symmetric, format="compressed-tensors", keep=keep)
        neoquant.quantize(source, out, recipe)
        options = {} if symmetric else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, attn_implementation="eager", **options
        )
        ours, _ = neoquant.load(out, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs(ids).logits
        assert (ours(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
