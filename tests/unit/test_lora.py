"""Gradients through quantized layers, and adapters that are trained by them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.demo import MODEL
from neoquant.errors import RequestError
from neoquant.nn.linear import QuantLinear

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
IDS = torch.tensor([[5, 9, 2, 130, 8, 11, 77], [7, 4, 4, 1, 3, 250, 0]])

HEADS: dict[str, dict[str, torch.Tensor]] = {
    "ForCausalLM": {"labels": IDS},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1])},
    "ForTokenClassification": {"labels": IDS % 2},
    "ForQuestionAnswering": {"start_positions": torch.tensor([0, 3]), "end_positions": torch.tensor([2, 6])},
}


def decoded(model: Any) -> Any:
    """The same model with plain linears that hold the quantized weights' values."""
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = torch.nn.Parameter(layer.quantized.dequantize(torch.float32))
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.detach())
        model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("said", [NF4, {"load_in_8bit": True}])
@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_losses_and_gradients_are_those_of_the_decoded_model(tiny_model: Path, head: str, said: dict[str, Any]) -> None:
    cls = getattr(neoquant, f"AutoModel{head}")
    found = []
    for decode in (False, True):
        torch.manual_seed(3)  # for the head that is drawn
        model = cls.from_pretrained(tiny_model, quantization_config=said)
        model.config.pad_token_id = 258
        model = decoded(model) if decode else model
        x = model.get_submodule("transformer.wte")(IDS).detach().requires_grad_()
        loss = model(inputs_embeds=x, **HEADS[head]).loss
        loss.backward()
        top = next(
            (getattr(model, name) for name in ("score", "classifier", "qa_outputs") if hasattr(model, name)), None
        )
        found.append([loss.detach(), x.grad, *([] if top is None else [top.weight.grad])])
    for got, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_adapters_learn_on_a_quantized_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = neoquant.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=NF4)
    tokenizer = neoquant.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(
        "Two roads diverged in a yellow wood, and sorry I could not travel both", return_tensors="pt"
    ).input_ids
    packed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for block in model.transformer.h:
        block.step = None  # which adapters stop: what is computed otherwise is not the same to the last bit
    with torch.no_grad():
        before = model(ids).logits
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "c_fc"], task_type="CAUSAL_LM", init_lora_weights=True)
    adapted = neoquant.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, before)  # they begin as nothing
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 6 and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, before)
    held = {name.replace("base_layer.", ""): buffer for name, buffer in model.named_buffers()}
    assert held.keys() == packed.keys() and all(torch.equal(held[name], packed[name]) for name in packed)
    assert adapted.generate(ids, max_new_tokens=2).shape == (1, ids.shape[1] + 2)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 500_000
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(MODEL)
    fresh = neoquant.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=NF4)
    again = neoquant.load_peft_model(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted.eval()(ids).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(RequestError, match="cannot be merged into quantized weights"):
        adapted.merge_and_unload()


@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_a_head_is_trained_as_a_whole(tiny_model: Path) -> None:
    peft = pytest.importorskip("peft")
    model = neoquant.AutoModelForSequenceClassification.from_pretrained(tiny_model, quantization_config=NF4)
    model.config.pad_token_id = 258
    adapted = neoquant.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], task_type="SEQ_CLS"))
    adapted(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("score" in name for name in moved) and all("lora_" in name or "score" in name for name in moved)


def test_what_is_missing_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = neoquant.AutoModelForCausalLM.from_pretrained(tiny_model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RequestError, match=r"peft, which is not installed: pip install neoquant\[peft\]"):
        neoquant.get_peft_model(model, None)
