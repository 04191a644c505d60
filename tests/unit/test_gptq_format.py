"""GPTQ checkpoints: golden tensors made by hand from the definition, what others write, what is refused."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights import make_weight

from neoquant import LoadWarning
from neoquant.errors import FormatError
from neoquant.formats import FORMATS, GptqFormat, choose, detect, detect_checked
from neoquant.grids import GROUP_SIZES, Affine, Codebook
from neoquant.loading.load import load_model
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.nn.linear import QuantLinear
from neoquant.quantization.convert import convert
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor


def words_by_definition(values: list[int], bits: int) -> list[int]:
    """Integers packed as the format says: for 3 bits, 32 values in three words, two of which are split."""
    words = []
    if bits != 3:
        per_word = 32 // bits
        for start in range(0, len(values), per_word):
            words.append(sum(value << (bits * k) for k, value in enumerate(values[start : start + per_word])))
    else:
        for start in range(0, len(values), 32):
            v = values[start : start + 32]
            first = sum(v[k] << (3 * k) for k in range(10)) | (v[10] & 3) << 30
            second = v[10] >> 2 | sum(v[11 + k] << (3 * k + 1) for k in range(10)) | (v[21] & 1) << 31
            third = v[21] >> 1 | sum(v[22 + k] << (3 * k + 2) for k in range(10))
            words += [first, second, third]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def by_definition(
    codes: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor, bits: int, version: int
) -> dict[str, Tensor]:
    """The four tensors of codes[O, I], scale and zero[O, G], with python integers only."""
    rows = len(codes)
    qweight = [words_by_definition(codes[row].tolist(), bits) for row in range(rows)]
    stored = zero - 1 if version == 1 else zero
    qzeros = [words_by_definition(stored[:, group].tolist(), bits) for group in range(zero.shape[1])]
    return {
        ".qweight": torch.tensor(qweight, dtype=torch.int32).T.contiguous(),
        ".qzeros": torch.tensor(qzeros, dtype=torch.int32),
        ".scales": scale.T.contiguous(),
        ".g_idx": g_idx.to(torch.int32),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def reader(grid: Affine, checkpoint_format: str | None, desc_act: bool = False) -> GptqFormat:
    said = {"quant_method": "gptq", "bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    said |= {"desc_act": desc_act} | ({} if checkpoint_format is None else {"checkpoint_format": checkpoint_format})
    found = detect({"quantization_config": said}, ["transformer.h.0.mlp.c_fc.g_idx"])
    assert isinstance(found, GptqFormat)
    return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
def test_golden(bits: int, group_size: int, symmetric: bool, ordered: bool) -> None:
    grid = Affine(bits, group_size, symmetric)
    w = make_weight((32, 160), torch.float16, "normal", bits)  # 160: ragged for 64, 128, one short group for 256
    codes, params = grid.nearest(w)
    width = grid.width(160)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)) if ordered else torch.arange(160)
    q = QuantizedTensor(codes, grid, params, order.int() if ordered else None)
    g_idx = torch.empty(160, dtype=torch.int64)
    natural = torch.empty_like(codes)
    for column, place in enumerate(order.tolist()):
        g_idx[place], natural[:, place] = column // width, codes[:, column]
    zero = torch.full(params["scale"].shape, grid.middle) if symmetric else params["zero"].int()
    expected = by_definition(natural, params["scale"], zero, g_idx, bits, 1 if symmetric else 2)
    assert same(FORMATS["gptq"].encode(q), expected)
    config = FORMATS["gptq"].config({"x": grid}, [])
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert reader(grid, config["checkpoint_format"], ordered).decode(expected).dequantize().equal(q.dequantize())
    # as others may write the same weight
    if symmetric or bool((zero > 0).all()):
        first = by_definition(natural, params["scale"], zero, g_idx, bits, 1)
        for said in ("gptq", None):
            assert reader(grid, said, ordered).decode(first).dequantize().equal(q.dequantize())
    second = by_definition(natural, params["scale"], zero, g_idx, bits, 2)
    assert reader(grid, "gptq_v2", ordered).decode(second).dequantize().equal(q.dequantize())


def test_v1_refuses_a_zero_of_zero() -> None:
    grid = Affine(4, -1)
    codes, params = grid.nearest(make_weight((32, 32), torch.float16, "normal").abs())
    assert (params["zero"] == 0).all()
    tensors = FORMATS["gptq"].encode(QuantizedTensor(codes, grid, params))
    assert reader(grid, "gptq_v2").decode(tensors).dequantize().isfinite().all()
    wrapped = tensors | {".qzeros": torch.full_like(tensors[".qzeros"], -1)}
    with pytest.raises(
        FormatError, match="qzeros holds 15 in a v1 checkpoint, which programs read as a zero of 0 or 16"
    ):
        reader(grid, "gptq").decode(wrapped)


@pytest.mark.parametrize("quantizer", ["gptqmodel:7.7.0", ["gptqmodel:7.7.0"], ["optimum:2.3.0", "gptqmodel:7.7.0"]])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodels_own_way_to_store_a_zero_of_zero_in_v1(bits: int, quantizer: str | list[str]) -> None:
    """It takes one off whole words, so that a field of 0 borrows from the next; with 3 bits off each one, modulo 8."""
    grid = Affine(bits, 32)
    zero = torch.randint(0, grid.top + 1, (32, 3), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    zero[4:9] = 0
    zero[20] = grid.top
    codes = torch.randint(0, grid.top + 1, (32, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    q = QuantizedTensor(codes, grid, {"scale": torch.full((32, 3), 0.5, dtype=torch.float16), "zero": zero})
    stored = []
    for group in range(3):
        fields = zero[:, group].tolist()
        if bits == 3:
            stored.append(words_by_definition([(field - 1) % 8 for field in fields], 3))
        else:
            ones = int("1".rjust(bits, "0") * (32 // bits), 2)
            words = [(word - ones) % (1 << 32) for word in words_by_definition(fields, bits)]
            stored.append([word - (1 << 32) if word >> 31 else word for word in words])
    tensors = FORMATS["gptq"].encode(q) | {".qzeros": torch.tensor(stored, dtype=torch.int32)}
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "checkpoint_format": "gptq"}
    assert GptqFormat(said | {"meta": {"quantizer": quantizer}}).decode(tensors).equals(q)
    for meta in ({}, {"quantizer": "auto-gptq:0.7"}, None):
        with pytest.raises(FormatError, match=f"qzeros holds {grid.top} in a v1 checkpoint"):
            GptqFormat(said | {"meta": meta}).decode(tensors)


def test_a_borrow_by_hand() -> None:
    """Zeros 0 1 8 15 0 0 3 7 are 0x7300f810 in a word; less 0x11111111, that is 0x61efe6ff."""
    zero = torch.tensor([[0], [1], [8], [15], [0], [0], [3], [7]] * 4, dtype=torch.uint8)
    params = {"scale": torch.ones(32, 1, dtype=torch.float16), "zero": zero}
    q = QuantizedTensor(torch.zeros(32, 32, dtype=torch.uint8), Affine(4, 32), params)
    tensors = FORMATS["gptq"].encode(q)
    assert tensors[".qzeros"].tolist() == [[0x7300F810] * 4]
    tensors[".qzeros"] = torch.full((1, 4), 0x61EFE6FF, dtype=torch.int32)
    said = {"bits": 4, "group_size": 32, "sym": False, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    assert GptqFormat(said).decode(tensors).equals(q)


def test_the_version_may_be_called_format() -> None:
    q = Nearest().quantize(make_weight((32, 64), torch.float16, "normal"), Affine(4, 32))
    said = {"bits": 4, "group_size": 32, "sym": False}
    assert GptqFormat(said | {"format": "gptq_v2"}).decode(FORMATS["gptq"].encode(q)).equals(q)
    with pytest.raises(FormatError, match="checkpoint_format 'gptq_p'; neoquant reads gptq and gptq_v2"):
        GptqFormat(said | {"format": "gptq_p"}).decode(FORMATS["gptq"].encode(q))


@pytest.mark.parametrize(
    ("packing", "version"),
    [("auto_round:gptqmodel", 2), ("auto_round", 2), ("auto_round:auto_gptq", 1), ("auto_round:gptq", 1), (None, 1)],
)
def test_autoround_says_by_its_packing_format_how_zeros_are_stored(packing: str | None, version: int) -> None:
    """Its `qlinear_torch` (0.16) stores a zero as it is, `qlinear_torch_zp` less one; nothing else tells them apart."""
    codes = torch.arange(32 * 64).reshape(32, 64).remainder(16).to(torch.uint8)
    scale = torch.linspace(0.01, 0.1, 64).reshape(32, 2).half()
    zero = torch.arange(64).reshape(32, 2).remainder(15) + 1
    tensors = by_definition(codes, scale, zero, torch.arange(64) // 32, 4, version)
    said = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    said |= {} if packing is None else {"packing_format": packing}
    found, notes = detect_checked(
        {"quantization_config": said}, [f"a{suffix}" for suffix in tensors], lambda name: tensors[name[1:]]
    )
    assert found is not None and notes == ()
    each = [zero.repeat_interleave(32, 1), scale.float().repeat_interleave(32, 1)]
    assert torch.equal(found.decode(tensors).dequantize(torch.float32), (codes.float() - each[0]) * each[1])


@pytest.mark.parametrize("packing", ["auto_round:auto_awq", "auto_round:llm_compressor", ["auto_round"], None])
def test_other_packing_formats_of_autoround_are_refused(packing: object) -> None:
    said = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "packing_format": packing}
    tensors = FORMATS["gptq"].encode(Nearest().quantize(make_weight((32, 64), torch.float16, "normal"), Affine(4, 32)))
    with pytest.raises(FormatError, match=f"packing_format {re.escape(repr(packing))}; neoquant reads auto and"):
        GptqFormat(said).decode(tensors)


def test_zeros_count_more_than_what_is_said_of_symmetry() -> None:
    q = Nearest().quantize(make_weight((32, 64), torch.float16, "normal"), Affine(4, 32))
    tensors = FORMATS["gptq"].encode(q)
    found = reader(Affine(4, 32, True), "gptq_v2").decode(tensors)
    assert found.grid == Affine(4, 32) and found.dequantize().equal(q.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("made_by", [None, "gptqmodel:5.0.0"])
def test_symmetric_zeros_show_their_version(bits: int, stored: str, label: str | None, made_by: str | None) -> None:
    q = Nearest().quantize(make_weight((64, 64), torch.float16, "normal"), Affine(bits, 32, True))
    tensors = {f"a{suffix}": tensor for suffix, tensor in GptqFormat(version=stored).encode(q).items()}
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True, "meta": {"quantizer": made_by}}
    said |= {} if label is None else {"checkpoint_format": label}
    found, notes = detect_checked({"quantization_config": said}, tensors, tensors.__getitem__)
    assert found is not None
    assert found.decode({name.removeprefix("a"): tensor for name, tensor in tensors.items()}).equals(q)
    fits = stored == (label or "gptq")
    assert fits == (notes == ())
    if not fits:
        verb = "leaves it at 'gptq'" if label is None else f"says {label!r}"
        assert notes == (
            f"qzeros are of checkpoint_format {stored!r}, as sym: true shows, and config.json {verb}; "
            f"they are read as {stored!r}",
        )


@pytest.mark.parametrize("suffix", [".qzeros", ".qweight", ".scales", ".g_idx"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 4), (2, 1), (1, 2, 3)])
def test_tensors_of_another_shape_or_type_are_refused(suffix: str, shape: tuple[int, ...]) -> None:
    for bits, dtype, grouped in product((2, 3, 4, 8), (torch.int32, torch.uint8, torch.float32), (True, False)):
        q = Nearest().quantize(make_weight((32, 64), torch.float16, "normal"), Affine(bits, 32, True))
        tensors = FORMATS["gptq"].encode(q) | {suffix: torch.zeros(shape, dtype=dtype)}
        if not grouped and suffix != ".g_idx":
            del tensors[".g_idx"]
        stored = {f"a{suffix}": tensor for suffix, tensor in tensors.items()}
        said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True}
        with pytest.raises(FormatError, match=rf"{suffix[1:]} (is|and)|and g_idx|the stored weight is .*, the model's"):
            found, _ = detect_checked({"quantization_config": said}, stored, stored.__getitem__)
            assert found is not None
            found.decode(tensors, (32, 64))


def test_zeros_that_contradict_each_other_are_refused() -> None:
    q = Nearest().quantize(make_weight((32, 64), torch.float16, "normal"), Affine(4, 32, True))
    tensors = {f"a{suffix}": tensor for suffix, tensor in GptqFormat(version="gptq").encode(q).items()}
    tensors |= {f"b{suffix}": tensor for suffix, tensor in GptqFormat(version="gptq_v2").encode(q).items()}
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    with pytest.raises(FormatError, match="qzeros of a are of checkpoint_format gptq, and those of b of gptq_v2"):
        detect_checked({"quantization_config": said}, tensors, tensors.__getitem__)


def test_asymmetric_zeros_are_what_the_label_says() -> None:
    grid = Affine(4, 32)
    q = Nearest().quantize(make_weight((32, 64), torch.float16, "normal").abs(), grid)  # zeros of 0
    tensors = {f"a{suffix}": tensor for suffix, tensor in FORMATS["gptq"].encode(q).items()}
    for label in ("gptq", "gptq_v2"):
        said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": label}
        found, notes = detect_checked({"quantization_config": said}, tensors, tensors.__getitem__)
        assert found is not None and notes == ()
        inside = {name.removeprefix("a"): tensor for name, tensor in tensors.items()}
        if label == "gptq_v2":
            assert found.decode(inside).equals(q)
    full = torch.full_like(tensors["a.qzeros"], -1)  # 15 everywhere, which v1 cannot hold
    with pytest.raises(FormatError, match="qzeros holds 15 in a v1 checkpoint"):
        reader(grid, "gptq").decode({**inside, ".qzeros": full})


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_groups_follow_each_other_where_g_idx_is_missing(group_size: int) -> None:
    grid = Affine(4, group_size)
    q = Nearest().quantize(make_weight((32, 160), torch.float16, "normal"), grid)
    tensors = {suffix: tensor for suffix, tensor in FORMATS["gptq"].encode(q).items() if suffix != ".g_idx"}
    assert reader(grid, "gptq_v2").decode(tensors).equals(q)
    assert FORMATS["gptq"].quantized([f"a{suffix}" for suffix in tensors]) == {"a": list(tensors)}
    with pytest.raises(FormatError, match="lacks g_idx, and with desc_act: true its order is not known"):
        reader(grid, "gptq_v2", desc_act=True).decode(tensors)


def test_awq_is_not_taken_for_gptq() -> None:
    names = ["a.qweight", "a.qzeros", "a.scales"]
    with pytest.raises(FormatError, match="quant_method 'awq'; neoquant reads bitsandbytes, gptq"):
        detect({"quantization_config": {"quant_method": "awq", "bits": 4}}, names)


def test_what_is_refused() -> None:
    q = Nearest().quantize(make_weight((32, 64), torch.float16, "normal"), Affine(4, 32))
    tensors = FORMATS["gptq"].encode(q)
    good = reader(Affine(4, 32), "gptq_v2")
    lopsided = tensors[".g_idx"].clone()
    lopsided[0] = 1
    for change, message in (
        ({".g_idx": lopsided}, "g_idx must put 32 inputs into each group"),
        ({".scales": tensors[".scales"].float() + 1e-6}, "scales is torch.float32 and does not fit float16"),
        ({".scales": tensors[".scales"][:1]}, r"scales is float16 \[2, 32\], got torch.float16 \[1, 32\]"),
        ({".qweight": tensors[".qweight"][:, :, None]}, "qweight is int32"),
    ):
        with pytest.raises(FormatError, match=message):
            good.decode({**tensors, **change})
    assert good.decode({**tensors, ".scales": tensors[".scales"].float()}).equals(q)
    with pytest.raises(FormatError, match="checkpoint_format 'marlin'; neoquant reads gptq and gptq_v2"):
        reader(Affine(4, 32), "marlin").decode(tensors)
    with pytest.raises(FormatError, match="states bits, group_size and sym"):
        GptqFormat().decode(tensors)
    with pytest.raises(FormatError, match="quantization_config: group size 48"):
        GptqFormat({"bits": 4, "group_size": 48, "sym": False}).decode(tensors)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_folder_is_made_and_run(tmp_path: Path, symmetric: bool) -> None:
    source = write_tiny_model(tmp_path / "plain", hidden_size=32, num_heads=4)
    recipe = Recipe.simple(3, "affine", group_size=64, symmetric=symmetric, keep=["transformer.h.1.mlp.*"])
    made = quantize(source, tmp_path / "out", recipe)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", 3, symmetric)
    assert set(config["dynamic"]) == {r"-:.*h\.1\.mlp\.c_fc$", r"-:.*h\.1\.mlp\.c_proj$"}
    quantized = config["modules_in_block_to_quantize"]
    model, plain = load_model(made.folder, GPTNeoForCausalLM), load_model(source, GPTNeoForCausalLM)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    assert len(layers) == 10 and sorted(quantized[0]) == sorted(layers) and len(quantized) == 1
    for name, layer in layers.items():
        linear = plain.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        expected = Nearest().quantize(linear.weight.detach(), layer.grid).dequantize(torch.float32)
        assert torch.equal(layer.quantized.dequantize(torch.float32), expected)
        linear.weight.data = expected
    ids = torch.arange(20)[None]
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


def test_biases_of_zero_on_every_layer_change_nothing(tmp_path: Path) -> None:
    """AutoGPTQ's first versions wrote them, for layers that have no bias as well."""
    source = write_tiny_model(tmp_path / "plain", hidden_size=32, num_heads=4)
    made = quantize(source, tmp_path / "out", Recipe.simple(4, "affine", group_size=32, symmetric=True, format="gptq"))
    ids = torch.arange(20)[None]
    expected = load_model(made.folder, GPTNeoForCausalLM)(ids).logits
    tensors = load_file(made.folder / "model.safetensors")
    layers = {name.removesuffix(".qweight"): codes for name, codes in tensors.items() if name.endswith(".qweight")}
    zeros = {f"{name}.bias": torch.zeros(codes.shape[1], dtype=torch.float16) for name, codes in layers.items()}
    assert len(zeros.keys() - tensors.keys()) == 6
    save_file({**zeros, **tensors}, made.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(LoadWarning, match=r"also holds .*q_proj\.bias"):
        model = GPTNeoForCausalLM.from_pretrained(made.folder)
    assert torch.equal(model(ids).logits, expected)
    converted = convert(made.folder, tmp_path / "converted", to="compressed-tensors")
    with pytest.warns(LoadWarning, match=r"also holds .*q_proj\.bias"):
        assert torch.equal(GPTNeoForCausalLM.from_pretrained(converted.folder)(ids).logits, expected)


def test_one_checkpoint_is_of_one_kind() -> None:
    layers = {"a": (Affine(4, 64), (64, 64)), "b": (Affine(4, 32), (64, 64))}
    assert choose(layers).name == "packed"
    assert choose({"a": layers["a"]}).name == "gptq"
    assert choose({"a": (Affine(4, 64), (64, 24))}).name == "packed"
    assert choose({"a": (Codebook(), (64, 64))}).name == "bnb4"
    kept = FORMATS["gptq"].config({"a": Affine()}, ["h.0.mlp.c_fc", "lm_head", "score"])
    assert kept["dynamic"] == {r"-:.*h\.0\.mlp\.c_fc$": {}} and kept["modules_in_block_to_quantize"] == [["a"]]
    assert not {"dynamic", "modules_in_block_to_quantize"} & FORMATS["gptq"].config({"a": Affine()}, ["lm_head"]).keys()
