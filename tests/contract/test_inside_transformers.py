"""neoquant's formats and kernels inside transformers' GPT-Neo: each format with each thing that people do there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from hub_stand_in import StandIn
from safetensors.torch import load_file

import neoquant
from neoquant import native
from neoquant.benchmark.worker import cache_name
from neoquant.errors import RequestError
from neoquant.quantization.recipe import Recipe

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from neoquant import transformers as inside  # noqa: E402  # it needs transformers
from neoquant.transformers.block import GPTNeoBlock  # noqa: E402
from neoquant.transformers.layers import TransformersLinear  # noqa: E402

RECIPES: dict[str, dict[str, Any]] = {
    "own, 4 bits": {"bits": 4, "kind": "affine", "group_size": 16, "format": "neoquant"},
    "own, 3 bits": {"bits": 3, "kind": "affine", "group_size": 32, "format": "neoquant"},
    "own, mxfp4": {"bits": 4, "kind": "mxfp4", "format": "neoquant"},
    "own, trellis": {"bits": 2, "kind": "trellis", "format": "neoquant"},
    "own, trellis of 3 bits": {"bits": 3, "kind": "trellis", "format": "neoquant"},
    "nf4": {"bits": 4, "kind": "nf4", "format": "bitsandbytes"},
    "fp4": {"bits": 4, "kind": "fp4", "double_quant": False, "format": "bitsandbytes"},
    "int8": {"bits": 8, "kind": "int8", "format": "bitsandbytes"},
    "gptq": {"bits": 4, "kind": "affine", "group_size": 16, "format": "gptq"},
    "gptq v1, symmetric": {"bits": 8, "kind": "affine", "group_size": 32, "symmetric": True, "format": "gptq-v1"},
    "compressed": {"bits": 4, "kind": "affine", "group_size": 16, "format": "compressed-tensors"},
}
IDS = torch.randint(1, 259, (3, 11), generator=torch.Generator().manual_seed(0))
EVERY = pytest.mark.parametrize("name", RECIPES)
quiet = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of much that is not looked at here


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("plain") / "neo", hidden_size=64, num_heads=4, num_layers=3,
                            attention_types=[[["global", "local", "global"], 1]],
                            attention_layers=["global", "local", "global"])  # fmt: skip


@pytest.fixture(scope="module")
def folder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model quantized by one of RECIPES."""
    root = tmp_path_factory.mktemp("quantized")

    def of(name: str) -> Path:
        out = root / name.replace(" ", "-").replace(",", "")
        if not out.exists():
            said = dict(RECIPES[name])
            neoquant.quantize(plain, out, Recipe.simple(said.pop("bits"), said.pop("kind"), **said))
        return out

    return of


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_own_format_opens_with_transformers_own_call(folder: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder("own, 4 bits"))
    assert type(model) is transformers.GPTNeoForCausalLM and not model.training
    assert model.lm_head is model.get_input_embeddings().table  # quantized, and held once
    assert model.is_quantized and model.config.quantization_config.to_dict()["quant_method"] == "neoquant"


@EVERY
def test_logits_are_neoquants(folder: Callable[[str], Path], name: str) -> None:
    theirs, ours = inside.from_pretrained(folder(name)), neoquant.AutoModelForCausalLM.from_pretrained(folder(name))
    assert sum(isinstance(module, TransformersLinear) for module in theirs.transformer.h.modules()) == 18
    keep = torch.ones_like(IDS)
    keep[1, 7:] = 0
    with torch.no_grad():
        for mask in (torch.ones_like(IDS), keep):
            found, expected = (each(IDS, attention_mask=mask).logits[mask.bool()] for each in (theirs, ours))
            assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
        hidden = theirs(IDS, attention_mask=keep, output_hidden_states=True, output_attentions=True)
        assert (hidden.logits[keep.bool()] - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert len(hidden.attentions) == 3 and hidden.attentions[0].shape == (3, 4, 11, 11)


@EVERY
def test_what_is_saved_is_what_was_loaded(folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    model = inside.from_pretrained(folder(name))
    model.save_pretrained(tmp_path / "whole")
    assert same(tensors(tmp_path / "whole"), tensors(folder(name)))
    said = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "whole", folder(name))]
    assert said[0]["quantization_config"] == said[1]["quantization_config"]
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert same({k: v for shard in shards for k, v in load_file(shard).items()}, tensors(folder(name)))
    with torch.no_grad():
        assert torch.equal(inside.from_pretrained(tmp_path / "shards")(IDS).logits, model(IDS).logits)
        ours = neoquant.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        assert (ours(IDS).logits - model(IDS).logits).abs().max() <= 2e-6 * ours(IDS).logits.abs().max()


@EVERY
def test_a_loaded_model_becomes_transformers_own(folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    ours = neoquant.AutoModelForCausalLM.from_pretrained(folder(name))
    theirs = ours.to_transformers()
    held = {tensor.data_ptr() for module in (ours,) for tensor in (*module.parameters(), *module.buffers())}
    weights = list(theirs.parameters()) + [b for n, b in theirs.named_buffers() if "attention.bias" not in n]
    assert all(tensor.data_ptr() in held for tensor in weights if tensor.numel() > 1)
    with torch.no_grad():
        assert (theirs(IDS).logits - ours(IDS).logits).abs().max() <= 2e-6 * ours(IDS).logits.abs().max()
        theirs.save_pretrained(tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(folder(name)))


@EVERY
def test_beams_and_sampling_are_those_of_the_plain_layers(folder: Callable[[str], Path], name: str) -> None:
    """The oracle is transformers with layers that hold the same values: no kernel, no block in one call."""
    model = inside.from_pretrained(folder(name))
    reference = copy.deepcopy(model).dequantize()
    assert not any(isinstance(module, TransformersLinear) for module in reference.modules())
    keep = torch.ones_like(IDS)
    keep[0, :4] = 0  # on the left
    asked: list[dict[str, Any]] = [
        {"do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_beams": 2, "temperature": 0.7},
        {"do_sample": False, "use_cache": False, "repetition_penalty": 1.2},
        {"num_beams": 2, "do_sample": False, "bad_words_ids": [[5], [7, 8]], "min_new_tokens": 4},
    ]
    for options in asked:
        found = []
        for each in (model, reference):
            torch.manual_seed(0)
            each.generation_config.pad_token_id = 0
            found.append(each.generate(IDS, attention_mask=keep, max_new_tokens=9, **options))
        assert torch.equal(*found), options


def test_assisted_decoding_crops_the_cache(folder: Callable[[str], Path]) -> None:
    model, helper = inside.from_pretrained(folder("own, 4 bits")), inside.from_pretrained(folder("own, 3 bits"))
    alone = model.generate(IDS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(
        model.generate(IDS[:1], max_new_tokens=12, do_sample=False, assistant_model=helper, pad_token_id=0), alone
    )


def test_one_cache_may_be_continued_in_two_ways(folder: Callable[[str], Path]) -> None:
    """Views of the cache's tensors stay what they were, whoever holds them."""
    model = inside.from_pretrained(folder("own, 4 bits"))
    with torch.no_grad():
        name = cache_name(model)
        past = model(IDS[:, :6], use_cache=True)[name]
        model(IDS[:, 6:7], **{name: past})
        held = past.layers[1].keys
        before = held.clone()
        branch = copy.deepcopy(past)
        for cache, ids in ((past, IDS[:, 7:9]), (branch, IDS[:, 7:9] + 1)):
            found = model(ids.clamp(max=258), **{name: cache}).logits
            whole = torch.cat([IDS[:, :7], ids.clamp(max=258)], 1)
            assert (found - model(whole).logits[:, 7:]).abs().max() <= 1e-5 * found.abs().max()
        assert torch.equal(held, before)


def test_hooks_and_masks_of_ones_own_are_honoured(folder: Callable[[str], Path]) -> None:
    model = inside.from_pretrained(folder("own, 4 bits"))
    seen: list[int] = []
    with torch.no_grad():
        quick = model(IDS).logits
        parts = ("mlp.act", "attn", "mlp.c_fc", "ln_2", "attn.attention.attn_dropout")
        block = model.transformer.h[1]
        hooks = [block.get_submodule(part).register_forward_hook(lambda *_: seen.append(1)) for part in parts]
        assert (model(IDS).logits - quick).abs().max() <= 2e-5 * quick.abs().max()
        assert len(seen) == 5
        for hook in hooks:
            hook.remove()
        # A mask of four dimensions that no padding gives: the last position is blind to the third.
        mask = torch.full((11, 11), torch.finfo(torch.float32).min).triu(1)
        mask[10, 2] = torch.finfo(torch.float32).min
        plain = copy.deepcopy(model).dequantize()
        found, expected = (each(IDS, attention_mask=mask.expand(3, 1, 11, 11)).logits for each in (model, plain))
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert (found[:, 10] - quick[:, 10]).abs().max() > 1e-3 * quick.abs().max()


@EVERY
@quiet
def test_adapters_of_peft_are_trained_stopped_and_resumed(
    folder: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """transformers' Trainer for three steps, with a checkpoint after two: resumed, the third is the same."""
    peft = pytest.importorskip("peft")
    data = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(1, 259, (12, 8), generator=torch.Generator().manual_seed(1))
    ]

    def trained(out: Path, resume: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(inside.from_pretrained(folder(name)), peft.LoraConfig(
            r=2, target_modules=["q_proj", "c_fc"], task_type="CAUSAL_LM"))  # fmt: skip
        frozen = {k: v.clone() for k, v in model.named_buffers()}
        arguments = transformers.TrainingArguments(
            str(out), max_steps=3, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            use_cpu=True, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
        assert all(torch.equal(v, frozen[k]) for k, v in model.named_buffers())
        assert len(trainer.state.log_history) >= 3
        model.save_pretrained(out / "adapters")
        return load_file(out / "adapters" / "adapter_model.safetensors")

    straight = trained(tmp_path / "run")
    assert sum(v.abs().max() > 0 for k, v in straight.items() if "lora_B" in k) == 6
    resumed = trained(tmp_path / "run", resume=True)
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[k], resumed[k]) for k in straight)
    again = peft.PeftModel.from_pretrained(inside.from_pretrained(folder(name)), str(tmp_path / "run" / "adapters"))
    bare = inside.from_pretrained(folder(name))
    with torch.no_grad():
        assert (again(IDS).logits - bare(IDS).logits).abs().max() > 0
        with again.disable_adapter():
            assert (again(IDS).logits - bare(IDS).logits).abs().max() <= 2e-5 * bare(IDS).logits.abs().max()
    before = {k: v.clone() for k, v in again.named_buffers()}
    with pytest.raises(RuntimeError):  # it would have to be rounded again
        again.merge_and_unload()
    assert all(torch.equal(v, before[k]) for k, v in again.named_buffers())


@EVERY
@quiet
def test_pipelines_run(folder: Callable[[str], Path], name: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder(name))
    pipe = transformers.pipeline("text-generation", model=inside.from_pretrained(folder(name)), tokenizer=tokenizer)
    said = pipe("ab cd", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    model, ours = neoquant.load(folder(name))
    expected = model.generate(ours("ab cd", return_tensors="pt").input_ids, max_new_tokens=5)
    assert said == ours.decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_heads_for_tasks_are_drawn_and_saved(folder: Callable[[str], Path], task: str, tmp_path: Path) -> None:
    source = folder("own, 4 bits")
    cls = getattr(transformers, f"AutoModelFor{task}")
    model = cls.from_pretrained(source, num_labels=2)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "out")
    again, ours = (
        cls.from_pretrained(tmp_path / "out"),
        getattr(neoquant, f"AutoModelFor{task}").from_pretrained(tmp_path / "out"),
    )
    with torch.no_grad():
        found, kept, mine = (each(IDS, return_dict=False)[0] for each in (model, again, ours))
    assert torch.equal(found, kept)
    assert (mine - found).abs().max() <= 2e-5 * found.abs().max()


def test_a_copy_and_a_pickle_compute_the_same(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = inside.from_pretrained(folder("own, 4 bits"))
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(IDS).logits
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert torch.equal(other(IDS).logits, expected)
            other.tie_weights()
            assert other.lm_head is other.get_input_embeddings().table is not model.lm_head


def test_plain_models_are_quantized_on_the_way(plain: Path, folder: Callable[[str], Path], tmp_path: Path) -> None:
    said = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for given in (said, inside.NeoquantConfig(said)):
        out = tmp_path / type(given).__name__
        inside.from_pretrained(plain, quantization_config=given).save_pretrained(out)
        assert same(tensors(out), tensors(folder("nf4")))
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=inside.NeoquantConfig("nf4"))
    assert isinstance(model.transformer.h[0].mlp.c_fc, TransformersLinear)


def test_plain_models_become_transformers_own(plain: Path) -> None:
    ours = neoquant.AutoModelForCausalLM.from_pretrained(plain)
    theirs, reference = (
        ours.to_transformers(),
        transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32),
    )
    assert theirs.lm_head.weight is theirs.transformer.wte.weight is ours.transformer.wte.weight
    with torch.no_grad():
        assert (theirs(IDS).logits - reference(IDS).logits).abs().max() <= 2e-5 * reference(IDS).logits.abs().max()
    assert theirs.generation_config.eos_token_id == 0 and not hasattr(theirs, "hf_quantizer")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"transformer": "cpu", "lm_head": "cpu"}, None])
def test_device_maps(folder: Callable[[str], Path], device_map: Any) -> None:
    model = inside.from_pretrained(folder("nf4"), device_map=device_map)
    assert model.device.type == ("cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        assert model(IDS.to(model.device)).logits.isfinite().all()


@quiet
def test_compiled_models_are_one_graph(folder: Callable[[str], Path]) -> None:
    model = inside.from_pretrained(folder("own, 4 bits"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(IDS).logits
        assert (compiled(IDS).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    rows = model.get_input_embeddings()(IDS).detach().requires_grad_()
    gradients = [torch.autograd.grad(each(inputs_embeds=rows, labels=IDS).loss, rows)[0] for each in (model, compiled)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()


@quiet
def test_the_hub_gets_the_same_bits(folder: Callable[[str], Path], bare_hub: StandIn, tmp_path: Path) -> None:
    bare_hub.repos["user/other"] = {}
    inside.from_pretrained(folder("own, 4 bits")).push_to_hub("user/other", token="hf_secret")
    assert {"config.json", "model.safetensors", "generation_config.json"} <= bare_hub.repos["user/other"].keys()
    for name, content in bare_hub.repos["user/other"].items():
        (tmp_path / name).write_bytes(content)
    assert same(tensors(tmp_path), tensors(folder("own, 4 bits")))


def test_settings_of_config_json_are_taken(folder: Callable[[str], Path]) -> None:
    """The oracle is transformers' own block with layers that hold the same values."""
    model = inside.from_pretrained(folder("own, 4 bits"), window_size=2, layer_norm_epsilon=0.5)
    with torch.no_grad():
        found, expected = model(IDS).logits, copy.deepcopy(model).dequantize()(IDS).logits
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert (found - inside.from_pretrained(folder("own, 4 bits"))(IDS).logits).abs().max() > 1e-2


def test_disks_are_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="leaves parts on disk"):
        inside.from_pretrained(folder("nf4"), device_map={"transformer": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_are_those_asked_for(folder: Callable[[str], Path], dtype: torch.dtype) -> None:
    """On a CPU the default is float32, as everywhere in neoquant; what is asked for is done."""
    source = folder("own, 4 bits")
    model = inside.from_pretrained(source, dtype=dtype)
    assert model.transformer.wpe.weight.dtype == dtype
    ours = neoquant.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        found, expected = model(IDS).logits, ours(IDS).logits
    assert found.dtype == dtype and (found - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert inside.from_pretrained(source).transformer.wpe.weight.dtype == torch.float32


def test_methods_are_taken_over_and_given_back(folder: Callable[[str], Path]) -> None:
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    inside.from_pretrained(folder("gptq"))
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    with pytest.raises(
        RequestError, match="no method is called 'awq'; legal are bitsandbytes, gptq, compressed-tensors"
    ):
        inside.use_for("gptq", "awq")
    assert before[0] == auto.AUTO_QUANTIZER_MAPPING
    try:
        inside.use_for("gptq")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder("gptq"))
        assert isinstance(model.transformer.h[0].mlp.c_fc, TransformersLinear)
    finally:
        auto.AUTO_QUANTIZER_MAPPING.update(before[0])
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.update(before[1])


def test_the_block_is_one_call_where_nothing_listens(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That what is fast is used at all: ordinary generation never enters the ordinary block."""
    model = inside.from_pretrained(folder("own, 4 bits"))
    assert all(type(block) is GPTNeoBlock for block in model.transformer.h)
    entered: list[int] = []
    ordinary = GPTNeoBlock.__mro__[1]
    forward = ordinary.forward

    def told(*args: Any, **options: Any) -> Any:
        entered.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(ordinary, "forward", told)
    if native.active().library is None:
        pytest.skip("the native library is not built")
    model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.generate(IDS, max_new_tokens=6, num_beams=2, pad_token_id=0)
    assert not entered
    model(IDS)  # gradients may be wanted
    assert entered


def test_another_activation_is_computed(folder: Callable[[str], Path]) -> None:
    """By the block in one call as by transformers' own, through which a pass with gradients goes."""
    model = inside.from_pretrained(folder("own, 4 bits"))
    with torch.no_grad():
        before = model(IDS).logits
    model.transformer.h[0].mlp.act = torch.nn.Tanh()
    with torch.no_grad():
        found = model(IDS).logits
    assert torch.allclose(found, model(IDS).logits, rtol=1e-4, atol=1e-4) and not torch.allclose(
        found, before, atol=1e-2
    )


@EVERY
@quiet
def test_weights_can_be_read_and_not_written(folder: Callable[[str], Path], name: str) -> None:
    """Programs read `weight` instead of calling a layer (TRL the head's, DoRA every one's): it is the values."""
    peft = pytest.importorskip("peft")
    model = inside.from_pretrained(folder(name))
    plain = copy.deepcopy(model).dequantize()
    pairs = [(model.lm_head, plain.lm_head), (model.get_input_embeddings(), plain.get_input_embeddings())]
    blocks = zip(model.transformer.h, plain.transformer.h, strict=True)
    pairs += [(block.mlp.c_fc, other.mlp.c_fc) for block, other in blocks]
    x = torch.randn(5, 64, requires_grad=True)
    for layer, expected in pairs:
        shown, values = layer.weight, expected.weight
        assert shown.shape == values.shape and shown.is_floating_point() and torch.equal(shown.float(), values)
        found, wanted = (torch.autograd.grad((x @ w.float().t()).sin().sum(), x)[0] for w in (shown, values))
        assert torch.equal(found, wanted)
    stored = {key: value.clone() for key, value in model.named_buffers()}
    weight, ones = model.transformer.h[0].mlp.c_fc.weight, torch.ones(256, 64)
    writes: list[Callable[[], Any]] = [
        lambda: weight.add_(1), lambda: weight.data.mul_(0), lambda: setattr(weight, "data", ones),
        lambda: torch.add(ones, 1, out=weight),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises(RuntimeError, match="cannot be written to"):
            write()
    assert torch.equal(weight, plain.transformer.h[0].mlp.c_fc.weight)

    ids, logits = IDS[:, :5], []
    for each in (model, plain):
        torch.manual_seed(0)
        dora = peft.LoraConfig(r=2, target_modules=["c_fc", "v_proj"], use_dora=True, init_lora_weights=False)
        adapted = peft.get_peft_model(each, dora)
        logits.append(adapted(ids).logits)
    assert (logits[0] - logits[1]).abs().max() <= 2e-5 * logits[1].abs().max()
    assert all(torch.equal(value, stored[key.replace("base_model.model.", "").replace(".base_layer", "")])
               for key, value in model.named_buffers() if "lora" not in key)  # fmt: skip
