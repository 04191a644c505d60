"""Quantizing while loading: the bytes and logits of a folder that was quantized first, and of transformers with
bitsandbytes; every field honoured, before and after saving, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.demo import MODEL
from neoquant.errors import RequestError
from neoquant.loading.quantization_config import BitsAndBytesConfig, GPTQConfig, read_config
from neoquant.loading.quantize_on_load import _calibration
from neoquant.model.names import BLOCK_LINEARS, HEADS
from neoquant.nn.linear import QuantLinear

IDS = torch.tensor([[5, 9, 2, 130, 8, 11, 77], [7, 4, 4, 1, 3, 250, 0]])
TEXTS = ["def f(x):\n    return x + 1\n" * 3, "We prove a theorem. " * 4]

BNB: list[dict[str, Any]] = [
    {"load_in_4bit": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    {"load_in_8bit": True, "llm_int8_skip_modules": ["c_proj", "transformer.h.1"]},
]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits.float()
    return out


def layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def test_it_is_what_quantizing_first_would_have_given(tiny_model: Path, tmp_path: Path) -> None:
    for number, (said, recipe) in enumerate(
        (
            (BNB[0], neoquant.Recipe.simple(4, "fp4", double_quant=False)),
            (BNB[1], neoquant.Recipe.simple(4, "nf4")),
            (BNB[3], neoquant.Recipe.simple(8, "int8").keeping(["*c_proj", "*.h.1.*"])),
            (neoquant.Recipe.load("mixed"), neoquant.Recipe.load("mixed")),
            (neoquant.Recipe.simple(3, "affine", group_size=16), neoquant.Recipe.simple(3, "affine", group_size=16)),
        )
    ):
        neoquant.quantize(tiny_model, tmp_path / str(number), recipe)
        first = neoquant.GPTNeoForCausalLM.from_pretrained(tmp_path / str(number))
        loaded = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=said)
        assert {name: (layer.grid, layer.kernel) for name, layer in layers(loaded).items()} == {
            name: (layer.grid, layer.kernel) for name, layer in layers(first).items()
        }
        assert torch.equal(logits(loaded), logits(first))


def decode_weights(model: Any) -> None:
    """Let transformers' layers do what they state: on some CPUs their own product is in bfloat16, whatever is asked."""
    functional = pytest.importorskip("bitsandbytes").functional
    for layer in (module for module in model.modules() if type(module).__name__ == "Linear4bit"):

        def forward(x: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            compute = layer.compute_dtype
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(compute)
            bias = None if layer.bias is None else layer.bias.to(compute)
            return torch.nn.functional.linear(x.to(compute), weight, bias).to(x.dtype)

        layer.forward = forward


@pytest.mark.parametrize("said", BNB[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_4_bits_are_transformers(make_model: Callable[..., Path], said: dict[str, Any], dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_model(hidden_size=64, num_heads=4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**said), dtype=dtype, device_map="cpu"
    )
    decode_weights(theirs)
    for config in (transformers.BitsAndBytesConfig(**said), BitsAndBytesConfig(**said), said):
        ours = neoquant.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=dtype, device_map="auto"
        )
        assert ours.dtype == theirs.dtype == dtype
        stored = theirs.state_dict()
        for name, layer in layers(ours).items():
            assert torch.equal(layer.quantized.codes.view(-1)[0::2] << 4 | layer.quantized.codes.view(-1)[1::2],
                               stored[f"{name}.weight"].view(-1))  # fmt: skip
            assert layer.compute_dtype == theirs.get_submodule(name).compute_dtype
        bound = 1e-5 if dtype == torch.float32 and "bnb_4bit_compute_dtype" not in said else 2e-2  # a few roundings
        assert (logits(ours) - logits(theirs)).abs().max() <= bound * logits(theirs).abs().max()


@pytest.mark.parametrize("compute", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compute_type_is_honoured_and_survives_saving(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str, dtype: str
) -> None:
    monkeypatch.setattr("neoquant.loading.load.block_step", None)  # it would not ask the kernels
    said = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = neoquant.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=said, dtype=dtype)
    (kernel,) = {type(layer.kernel) for layer in layers(model).values()}
    linear, seen = kernel.linear, []
    monkeypatch.setattr(kernel, "linear", lambda self, x, *rest: seen.append(x.dtype) or linear(self, x, *rest))
    expected = logits(model)
    assert set(seen) == {getattr(torch, compute)}
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (stored["bnb_4bit_compute_dtype"], stored["bnb_4bit_quant_type"]) == (compute, "nf4")
    again = neoquant.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert {layer.compute_dtype for layer in layers(again).values()} == {getattr(torch, compute)}
    assert torch.equal(logits(again), expected)


def test_another_compute_type_may_be_asked_of_a_quantized_folder(tiny_model: Path, tmp_path: Path) -> None:
    neoquant.quantize(tiny_model, tmp_path / "nf4", neoquant.Recipe.simple(4, "nf4"))
    said = dict(BNB[1], bnb_4bit_compute_dtype=torch.float16)
    model = neoquant.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", quantization_config=said)
    assert {layer.compute_dtype for layer in layers(model).values()} == {torch.float16}
    for other in (BNB[0], BNB[3], GPTQConfig(4, dataset=TEXTS)):
        with pytest.raises(RequestError, match=r"already quantized .format bnb4., and not as quantization_config asks"):
            neoquant.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", quantization_config=other)


def test_what_is_skipped_stays_and_is_saved_as_skipped(tiny_model: Path, tmp_path: Path) -> None:
    model = neoquant.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=BNB[3])
    assert sorted(layers(model)) == [
        *(f"transformer.h.0.attn.attention.{name}" for name in ("k_proj", "out_proj", "q_proj", "v_proj")),
        "transformer.h.0.mlp.c_fc",
    ]
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    kept = {f"h.1.{name}" for name in BLOCK_LINEARS} | {"h.0.mlp.c_proj"}
    names = set(stored["llm_int8_skip_modules"])
    assert names == {prefix + name for prefix in ("", "transformer.") for name in kept} | set(HEADS)
    for prefix in ("", "transformer."):  # by transformers 4's rule in a model with a head and without, each stays
        for block, name in product(range(2), BLOCK_LINEARS):
            whole = f"{prefix}h.{block}.{name}"
            stays = any(f"{key}." in whole or key == whole for key in names)
            assert stays == (whole.removeprefix(prefix) in kept)
    assert torch.equal(logits(neoquant.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("saved_by", ["ForCausalLM", ""])
@pytest.mark.parametrize("said", [BNB[3], BNB[1] | {"llm_int8_skip_modules": ["h.0.mlp", "c_proj"]}])
@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_transformers_keeps_what_was_kept_whatever_class_reads_it(
    make_model: Callable[..., Path], tmp_path: Path, said: dict[str, Any], saved_by: str
) -> None:
    transformers = pytest.importorskip("transformers")
    bnb = pytest.importorskip("bitsandbytes")
    source = make_model(hidden_size=64, num_heads=4)
    model = getattr(neoquant, f"AutoModel{saved_by}").from_pretrained(source, quantization_config=said)
    model.save_pretrained(tmp_path / "saved")
    ours = {name.removeprefix("transformer.") for name in layers(model)}
    for head in ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        theirs = getattr(transformers, f"AutoModel{head}").from_pretrained(tmp_path / "saved", device_map="cpu")
        kinds = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
        quantized = {name for name, module in theirs.named_modules() if isinstance(module, kinds)}
        assert {name.removeprefix("transformer.") for name in quantized} == ours


@pytest.mark.parametrize("head", ["", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_heads_stay_in_float(tiny_model: Path, head: str) -> None:
    model = getattr(neoquant, f"AutoModel{head}").from_pretrained(tiny_model, quantization_config=BNB[1])
    assert len(layers(model)) == 12
    for name in ("score", "classifier", "qa_outputs"):
        if hasattr(model, name):
            assert getattr(model, name).weight.dtype == torch.float32


def gptq(**changes: Any) -> GPTQConfig:
    return GPTQConfig(**{"bits": 4, "dataset": TEXTS, "group_size": 32, "model_seqlen": 16, **changes})


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (gptq(), {"symmetric": True, "order": "static", "damping": 0.1}),
        (gptq(bits=3, sym=False, desc_act=True, damp_percent=0.02), {"order": "dynamic", "damping": 0.02}),
        (gptq(act_group_aware=False), {"symmetric": True, "order": "off", "damping": 0.1}),
    ],
)
def test_gptq_is_what_a_calibrated_run_would_have_given(
    make_model: Callable[..., Path], tmp_path: Path, said: GPTQConfig, options: dict[str, Any]
) -> None:
    folder = make_model(hidden_size=32, num_heads=4)
    with neoquant.checkpoint.open_checkpoint(folder) as checkpoint:
        calibration = _calibration(checkpoint, said, neoquant.progress.SILENT)
    assert calibration.ids.shape == (10, 16)
    recipe = neoquant.Recipe.simple(said.bits, "affine", group_size=32, quantizer="gptq", format="gptq", **options)
    neoquant.quantize(folder, tmp_path / "made", recipe, calibration=calibration)
    expected = neoquant.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    model = neoquant.AutoModelForCausalLM.from_pretrained(folder, quantization_config=said)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (stored["bits"], stored["group_size"], stored["sym"], stored["desc_act"]) == (
        said.bits, said.group_size, said.sym, said.desc_act,
    )  # fmt: skip
    assert torch.equal(logits(neoquant.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_transformers_gptq_configuration_serves(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(
        transformers.GPTQConfig, "post_init", lambda self: None
    )  # wants GPTQModel and optimum installed
    folder = make_model(hidden_size=32, num_heads=4)
    only = [["attn.attention.q_proj"], ["mlp.c_fc"]]
    theirs = transformers.GPTQConfig(
        bits=4, dataset=TEXTS, group_size=32, modules_in_block_to_quantize=only, model_seqlen=16
    )
    model = neoquant.AutoModelForCausalLM.from_pretrained(folder, quantization_config=theirs)
    assert {name.partition("h.")[2][2:] for name in layers(model)} == {name for (name,) in only}
    assert torch.equal(
        logits(model),
        logits(
            neoquant.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=gptq(modules_in_block_to_quantize=only)
            )
        ),
    )


def test_a_file_of_text_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    said = GPTQConfig(4, dataset=str(tmp_path / "text.txt"), group_size=64, model_seqlen=32)
    model = neoquant.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=said)
    nearest = neoquant.AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=neoquant.Recipe.simple(4, "affine", group_size=64, symmetric=True)
    )
    plain = logits(neoquant.AutoModelForCausalLM.from_pretrained(MODEL))
    errors = [float((logits(one) - plain).square().mean()) for one in (model, nearest)]
    assert errors[0] < errors[1]


def test_nothing_is_left_of_the_plain_weights(tiny_model: Path) -> None:
    """No parameter of a block is a matrix, and only what it asks for is looked at."""
    model = neoquant.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=BNB[1])
    assert all(p.ndim == 1 for name, p in model.named_parameters() if ".h." in name)
    assert model.transformer.wte.weight.requires_grad and not model.transformer.wte.weight.is_inference()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "says both of load_in_4bit and load_in_8bit"),
        ({"quant_method": "bitsandbytes"}, "says neither of load_in_4bit"),
        ({"load_in_8bit": True, "llm_int8_threshold": 4.0}, "llm_int8_threshold is 4.0; legal is 6.0 only"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "held quantized"),
        ({"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}, "run on a CPU as they are"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "legal is 'uint8' only"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "legal are fp4 and nf4"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "legal are float32, float16, bfloat16"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["atention"]}, "'atention', and no layer is called so"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["("]}, "no regular expression"),
        (
            {"load_in_4bit": True, "llm_int8_skip_modules": "c_proj"},
            "llm_int8_skip_modules is 'c_proj'; legal is a list",
        ),
        ({"load_in_4bit": "yes"}, "load_in_4bit is 'yes'; legal are True and False"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": "false"}, "legal are True and False"),
        ({"quant_method": "gptq", "bits": 4, "dataset": TEXTS, "sym": "no"}, "sym is 'no'; legal are True and False"),
        ({"load_in_4bit": True, "bnb_4bit_qant_type": "nf4"}, "has no field 'bnb_4bit_qant_type'"),
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'; legal are bitsandbytes, gptq"),
        ({"quant_method": "gptq", "bits": 4}, "dataset is None; legal is a list of texts"),
        ({"quant_method": "gptq", "bits": 4, "dataset": "c4"}, "'c4', whose training text neoquant does not fetch"),
        ({"quant_method": "gptq", "bits": 5, "dataset": TEXTS}, "5"),
        ({"quant_method": "gptq", "bits": 4, "dataset": TEXTS}, "multiples of 32"),
        ({"quant_method": "gptq", "bits": 4, "dataset": TEXTS, "true_sequential": False}, "one after another"),
        (
            {"quant_method": "gptq", "bits": 4, "dataset": TEXTS, "modules_in_block_to_quantize": [["q"]]},
            "no linear of a block",
        ),
        (neoquant.Recipe.load("nf4-gptq"), "pass a GPTQConfig"),
        (4, "quantization_config is of type int; legal is a BitsAndBytesConfig"),
    ],
)
def test_what_is_not_done_is_refused(tiny_model: Path, said: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        neoquant.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=said)


def test_versions_of_gptq_are_said_by_symmetry() -> None:
    with pytest.raises(RequestError, match="with sym=True legal is 'gptq'"):
        GPTQConfig(4, format="gptq_v2")
    assert read_config(GPTQConfig(4, sym=False, format="gptq_v2").to_dict()) == GPTQConfig(
        4, sym=False, format="gptq_v2"
    )


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_heads_may_be_named_among_what_is_skipped(tiny_model: Path, bits: str) -> None:
    expected = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config={bits: True})
    for skipped in (["lm_head"], ["lm_head", "score"], ["wte"]):
        said = {bits: True, "llm_int8_skip_modules": skipped}
        found = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=said)
        assert layers(found).keys() == layers(expected).keys() and torch.equal(logits(found), logits(expected))
    wrong = {bits: True, "llm_int8_skip_modules": ["c_fk"]}
    with pytest.raises(RequestError, match="llm_int8_skip_modules names 'c_fk', and no layer is called so"):
        neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=wrong)


STORED: dict[str, neoquant.Recipe] = {
    "bnb4": neoquant.Recipe.simple(4, "nf4", keep=["*.c_fc"]),
    "bnb8": neoquant.Recipe.simple(8, "int8", format="bitsandbytes"),
    "gptq": neoquant.Recipe.simple(4, "affine", group_size=16, format="gptq"),
    "compressed-tensors": neoquant.Recipe.simple(4, "affine", group_size=16, format="compressed-tensors"),
    "packed": neoquant.Recipe.simple(3, "affine", group_size=16, format="neoquant"),
}


@pytest.mark.parametrize("format", STORED)
def test_a_saved_configuration_may_be_handed_back(make_model: Callable[..., Path], tmp_path: Path, format: str) -> None:
    source = make_model(hidden_size=32, num_heads=4)
    made = neoquant.quantize(source, tmp_path / "out", STORED[format]).folder
    model = neoquant.GPTNeoForCausalLM.from_pretrained(made)
    model.save_pretrained(tmp_path / "again")
    for folder in (made, tmp_path / "again"):
        stated = json.loads((folder / "config.json").read_text())["quantization_config"]
        found = neoquant.GPTNeoForCausalLM.from_pretrained(folder, quantization_config=stated)
        assert torch.equal(logits(found, IDS[:1] % 200), logits(model, IDS[:1] % 200))
    other = "bnb8" if format != "bnb8" else "bnb4"
    elsewhere = neoquant.quantize(source, tmp_path / "other", STORED[other]).folder
    with pytest.raises(RequestError, match=r"is already quantized|describes stored weights|GPTQ must see text"):
        neoquant.GPTNeoForCausalLM.from_pretrained(elsewhere, quantization_config=stated)
    if format.startswith("bnb"):  # which says how to quantize, and not only how weights are stored
        again = neoquant.GPTNeoForCausalLM.from_pretrained(source, quantization_config=stated)
        assert torch.equal(logits(again, IDS[:1] % 200), logits(model, IDS[:1] % 200))
    else:
        with pytest.raises(RequestError, match=r"describes stored weights|GPTQ must see text"):
            neoquant.GPTNeoForCausalLM.from_pretrained(source, quantization_config=stated)


def test_transformers_gptq_configuration_is_compared_with_what_is_stored(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model(hidden_size=32, num_heads=4)
    recipe = neoquant.Recipe.simple(4, "affine", group_size=16, symmetric=True, format="gptq")
    made = neoquant.quantize(source, tmp_path / "out", recipe).folder
    neoquant.GPTNeoForCausalLM.from_pretrained(made, quantization_config=GPTQConfig(4, group_size=16))
    with pytest.raises(RequestError, match=r"is already quantized .*not as quantization_config asks"):
        neoquant.GPTNeoForCausalLM.from_pretrained(made, quantization_config=GPTQConfig(4, group_size=32))
    with pytest.raises(RequestError, match=r"is already quantized .*not as quantization_config asks"):
        neoquant.GPTNeoForCausalLM.from_pretrained(made, quantization_config=recipe)
