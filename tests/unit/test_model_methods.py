"""Small methods of transformers' models, on ours: each does what transformers' does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import neoquant
from neoquant.demo import MODEL
from neoquant.errors import RequestError

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])
INT8 = {"load_in_8bit": True}


def both(folder: Path, head: str = "CausalLM", **options: Any) -> tuple[Any, Any]:
    """Ours and theirs, of the same weights."""
    ours = getattr(neoquant, f"GPTNeoFor{head}").from_pretrained(folder, dtype=torch.float32, **options)
    theirs = getattr(transformers, f"GPTNeoFor{head}").from_pretrained(folder, dtype=torch.float32, **options)
    return ours, theirs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_weights_are_transformers(tiny_model: Path, implementation: str) -> None:
    ours, theirs = both(tiny_model, attn_implementation="eager")
    ours.set_attn_implementation(implementation)
    mask = torch.ones_like(IDS)
    mask[0, 9:] = 0
    got, wanted = (model(IDS, attention_mask=mask, output_attentions=True) for model in (ours, theirs))
    assert len(got.attentions) == ours.config.num_layers
    for mine, other in zip(got.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(mine[1], other[1])
        torch.testing.assert_close(mine[0, :, :9], other[0, :, :9])  # rows of padding are nobody's
    assert list(got) == ["logits", "past_key_values", "attentions"]
    assert got[-1] is got.attentions


def test_attention_weights_behind_a_cache_cover_all_positions(tiny_model: Path) -> None:
    """A local layer's cache holds its window only: what it has forgotten has no weight."""
    ours = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, attn_implementation="eager", dtype=torch.float32)
    whole = ours(IDS, output_attentions=True).attentions
    past = ours(IDS[:, :-1]).past_key_values
    part = ours(IDS[:, -1:], past_key_values=past, output_attentions=True).attentions
    for mine, other in zip(part, whole, strict=True):
        assert mine.shape == (*other.shape[:2], 1, IDS.shape[1])
        torch.testing.assert_close(mine, other[:, :, -1:])


def test_hidden_states_and_weights_have_gradients_as_transformers_have(tiny_model: Path) -> None:
    found = []
    for model in both(tiny_model, attn_implementation="eager"):
        out = model(IDS, output_attentions=True, output_hidden_states=True)
        kept = (out.hidden_states[0], out.attentions[0], out.attentions[1])
        for each in kept:
            each.retain_grad()
        out.logits.square().sum().backward()
        found.append([each.grad for each in kept])
    for mine, other in zip(*found, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max() and other.abs().max() > 0


@pytest.mark.parametrize("quantized", [False, True])
def test_heads_can_be_left_out(tiny_model: Path, quantized: bool) -> None:
    """What a head gives enters by its columns of out_proj: the oracle is transformers' model with zeros there."""
    options = {"quantization_config": INT8} if quantized else {}
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, **options)
    heads, width = model.config.num_heads, model.config.head_dim
    mask = torch.ones(model.config.num_layers, heads)
    mask[0, 0] = mask[1, heads - 1] = 0
    other = both(tiny_model)[1].eval()
    other.load_state_dict(copy.deepcopy(model).dequantize().state_dict(), strict=False)
    for block, row in zip(other.transformer.h, mask, strict=True):
        block.attn.attention.out_proj.weight.data *= row.repeat_interleave(width)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, head_mask=mask).logits, other(IDS).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            model(IDS, head_mask=mask[0]).logits, model(IDS, head_mask=mask[:1].expand_as(mask)).logits
        )
        assert not torch.allclose(model(IDS, head_mask=mask[0]).logits, model(IDS, head_mask=mask).logits)
    with pytest.raises(RequestError, match=r"head_mask is \[7\]; legal are \["):
        model(IDS, head_mask=torch.ones(7))


def test_what_programs_ask_of_any_model_is_as_in_transformers(tiny_model: Path) -> None:
    for head in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        ours, theirs = (getattr(package, f"GPTNeoFor{head}") for package in (neoquant, transformers))
        for name in ("main_input_name", "supports_gradient_checkpointing"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.can_generate() == theirs.can_generate()
        assert ours.config_class is neoquant.GPTNeoConfig
    with pytest.raises(RequestError, match=r"pad_to_multiple_of is 1\.3; legal is a number of rows"):
        neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model).resize_token_embeddings(70, pad_to_multiple_of=1.3)


def test_attention_can_be_computed_another_way(tiny_model: Path) -> None:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = model(IDS).logits
    model.set_attn_implementation("eager")
    assert model(IDS, output_attentions=True).attentions[0].shape[-1] == IDS.shape[1]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before)
    with pytest.raises(RequestError, match="attn_implementation is 'fast'; legal are sdpa, eager"):
        model.set_attn_implementation("fast")


@pytest.mark.parametrize("rows", [7, 300])
@pytest.mark.parametrize("tie", [True, False])
def test_resized_embeddings_are_transformers(
    make_model: Callable[..., Path], rows: int, tie: bool, tmp_path: Path
) -> None:
    ours, theirs = both(make_model(f"resize{rows}{tie}", tie_word_embeddings=tie))
    old = ours.config.vocab_size
    embedding = ours.resize_token_embeddings(rows)
    theirs.resize_token_embeddings(rows, mean_resizing=False)
    assert embedding is ours.get_input_embeddings()
    kept = min(old, rows)
    for mine, other in ((ours.transformer.wte, theirs.transformer.wte), (ours.lm_head, theirs.lm_head)):
        assert mine.weight.shape == other.weight.shape
        assert torch.equal(mine.weight[:kept], other.weight[:kept])
        torch.testing.assert_close(mine.weight[kept:], mine.weight[:old].mean(0).expand(rows - kept, -1))
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tie
    assert ours.config.vocab_size == rows
    ours.save_pretrained(tmp_path / "saved")
    again = neoquant.GPTNeoForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = IDS.clamp(max=rows - 1)
    assert torch.equal(again(ids).logits, ours.eval()(ids).logits)


def test_resizing_rounds_up_draws_and_refuses(tiny_model: Path) -> None:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    old = model.config.vocab_size
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config.vocab_size == old
    rows = model.resize_token_embeddings(old + 1, pad_to_multiple_of=64, mean_resizing=False).num_embeddings
    assert rows % 64 == 0 and rows - old <= 64
    assert model.transformer.wte.weight[old:].std() > 0
    with pytest.raises(RequestError, match="new_num_tokens is 0"):
        model.resize_token_embeddings(0)
    recipe = neoquant.Recipe.simple(8, "int8", embeddings="int8")
    quantized = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=recipe)
    with pytest.raises(RequestError, match=r"the embedding is quantized: dequantize\(\) the model"):
        quantized.resize_token_embeddings(old + 1)


def test_embeddings_and_head_can_be_taken_from_another(make_model: Callable[..., Path]) -> None:
    model, other = (
        neoquant.GPTNeoForCausalLM.from_pretrained(make_model(f"seed{seed}", seed=seed), dtype=torch.float32)
        for seed in (0, 1)
    )
    assert model.base_model is model.transformer and model.can_generate()
    model.set_input_embeddings(other.get_input_embeddings())
    model.set_output_embeddings(other.get_output_embeddings())
    assert model.transformer.wte is other.transformer.wte and model.lm_head is other.lm_head
    bare = neoquant.GPTNeoModel(model.config)
    assert bare.base_model is bare and not bare.can_generate()
    with pytest.raises(RequestError, match="GPTNeoModel has no language model's head"):
        bare.set_output_embeddings(other.lm_head)


@pytest.mark.parametrize("quantize", [None, INT8])
def test_gradients_of_blocks_that_are_computed_again_are_the_same(tiny_model: Path, quantize: Any) -> None:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=quantize, dtype=torch.float32)
    model.train()
    inside: list[int] = []

    def gradients() -> list[torch.Tensor]:
        inside.clear()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [each.grad.clone() for each in model.parameters() if each.requires_grad and each.grad is not None]

    block = model.transformer.h[1]
    block.ln_1.register_forward_hook(lambda *_: inside.append(1))
    plain = gradients()
    assert len(inside) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    again = gradients()
    assert len(inside) == 2
    assert len(plain) == len(again) > 3
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
    assert "past_key_values" not in model(IDS)
    model.gradient_checkpointing_disable()
    gradients()
    assert len(inside) == 1
    with pytest.raises(RequestError, match="legal is use_reentrant"):
        model.gradient_checkpointing_enable({"determinism": 1})
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=None, every_n_layers=1, offload=False)
    assert model.is_activation_checkpointing and model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    for asked in ({"every_n_layers": 2}, {"offload": True}):
        with pytest.raises(RequestError, match=f"{next(iter(asked))} is .*; legal is"):
            model.activation_checkpointing_enable(**asked)


def test_inputs_can_be_given_gradients(tiny_model: Path) -> None:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=INT8, dtype=torch.float32)
    model.requires_grad_(False)
    assert not model(IDS).logits.requires_grad
    for _ in range(2):
        model.enable_input_require_grads()
    assert model(IDS).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(IDS).logits.requires_grad
    assert model.vocab_size == model.config.vocab_size


@pytest.mark.parametrize("recipe", ["nf4", "own"])
def test_a_dequantized_model_is_plain_and_gives_the_same(tiny_model: Path, recipe: str, tmp_path: Path) -> None:
    given = neoquant.Recipe.simple(4, "nf4", **({"embeddings": "int8"} if recipe == "own" else {}))
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=given, dtype=torch.float32)
    with torch.no_grad():
        before = model(IDS).logits
        assert model.dequantize() is model
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path / "plain")
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert getattr(theirs.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, before, rtol=1e-4, atol=1e-4)


def test_a_batch_in_several_calls_has_the_loss_of_one(tiny_model: Path) -> None:
    ours, theirs = both(tiny_model)
    labels = IDS.clone()
    labels[0, 4:] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = ours(IDS, labels=labels).loss
    parts = [ours(IDS[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(2)]
    torch.testing.assert_close(sum(parts), whole)
    wanted = theirs(IDS[:1], labels=labels[:1], num_items_in_batch=count).loss
    torch.testing.assert_close(parts[0], wanted)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, label: Any = None) -> None:
        self.label = label

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = (IDS[0] + index) % 11
        return {"input_ids": row, "labels": row if self.label is None else torch.tensor(self.label)}


def train(
    model: Any, folder: Path, steps: int, save: str = "steps", resume: bool = False, label: Any = None, **others: Any
) -> Any:
    """The losses of transformers' Trainer, in batches of two calls each."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_strategy=save, save_steps=2, logging_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, seed=1, disable_tqdm=True,
        **others,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(label), eval_dataset=Rows(label))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_transformers_trainer_has_the_losses_that_it_has_with_its_own(tiny_model: Path, tmp_path: Path) -> None:
    ours, theirs = both(tiny_model)
    given = both(tiny_model)[0]
    losses = train(ours, tmp_path / "ours", 3, save="no")
    assert losses == pytest.approx(train(theirs, tmp_path / "theirs", 3, save="no"), rel=1e-4)
    # A checkpoint holds no tensor twice, which transformers sees to for its own classes: the same tensors in one.
    assert losses == pytest.approx(train(given.to_transformers(), tmp_path / "saved", 3), rel=1e-4)
    for pair in zip(ours.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
    again = neoquant.GPTNeoForCausalLM.from_pretrained(tmp_path / "saved" / "checkpoint-3", dtype=torch.float32)
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), given.parameters(), strict=True))


def test_transformers_trainer_takes_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    """accelerate makes outputs anew, in float32, of what the model gives in bfloat16."""
    ours, theirs = both(tiny_model)
    losses = train(ours, tmp_path / "ours", 2, save="no", bf16=True)
    assert losses == pytest.approx(train(theirs, tmp_path / "theirs", 2, save="no", bf16=True), rel=1e-2)
    output = ours(IDS)
    again = type(output)(dict(output))
    assert list(again) == list(output) and all(again[name] is output[name] for name in output)


def test_transformers_trainer_has_blocks_computed_again(tiny_model: Path, tmp_path: Path) -> None:
    plain, again = both(tiny_model)[0], both(tiny_model)[0]
    losses = train(plain, tmp_path / "plain", 2, save="no")
    assert train(again, tmp_path / "again", 2, save="no", gradient_checkpointing=True) == losses
    assert again.is_activation_checkpointing and not plain.is_activation_checkpointing


@pytest.mark.parametrize("best", [False, True])
def test_transformers_trainer_saves_a_language_model_and_resumes(tiny_model: Path, tmp_path: Path, best: bool) -> None:
    """A checkpoint holds each tensor once; resumed, losses and weights are those of a run that was not interrupted."""
    model, start = both(tiny_model)[0], both(tiny_model)[0].state_dict()
    assert "lm_head.weight" in start and "lm_head.weight" in model.state_dict()
    extra = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True} if best else {}
    losses = train(model, tmp_path, 6, **extra)
    ended = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert stored.keys() == start.keys() - {"lm_head.weight"}
    for folder in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / folder).rename(tmp_path / f"former-{folder}")
    again = both(tiny_model)[0]
    assert train(again, tmp_path, 6, resume=True, **extra) == losses  # its history begins with the first run's
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert again.lm_head.weight is again.transformer.wte.weight
    assert all(torch.equal(tensor, ended[name]) for name, tensor in again.state_dict().items())
    other = both(tiny_model)[0]
    other.load_state_dict(stored)  # strict: nothing is missing
    assert torch.equal(other.lm_head.weight, stored["transformer.wte.weight"])
    assert not torch.equal(other.lm_head.weight, start["lm_head.weight"])


def test_a_quantized_head_is_stated_once_to_a_trainer(tmp_path: Path) -> None:
    neoquant.quantize(MODEL, tmp_path / "q", "mxfp4")
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tmp_path / "q")
    whole = model.state_dict()
    model._is_accelerate_prepared = True
    once = model.state_dict()
    assert whole.keys() - once.keys() == {name for name in whole if name.startswith("lm_head.")} != set()
    assert all(whole[name].data_ptr() == once[name].data_ptr() for name in once)
    model.load_state_dict(once)


def test_transformers_trainer_saves_a_classifier_and_resumes(tiny_model: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", neoquant.LoadWarning)  # of a head that is to be trained
        model = neoquant.GPTNeoForSequenceClassification.from_pretrained(tiny_model, dtype=torch.float32)
    model.config.pad_token_id = 0
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, tmp_path, 3, label=1)
    assert losses[-1] < losses[0]
    ended = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(start)
    train(model, tmp_path, 3, resume=True, label=1)  # from the second step
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, ended[name])
