"""Plain checkpoints in every spelling that exists: loaded, compared with transformers, saved, loaded there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import neoquant
from neoquant import (
    CheckpointError,
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoModel,
    LoadWarning,
    RequestError,
)

transformers = pytest.importorskip("transformers")

VALUES: dict[str, Any] = {
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "hidden_size": 12,
    "num_heads": 3,
    "num_layers": 2,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "num_labels": 3,
}
IDS = torch.arange(2, 14)[None]
HEADS = (
    GPTNeoModel,
    GPTNeoForCausalLM,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoForQuestionAnswering,
)


def their_model(cls: str = "GPTNeoForCausalLM", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(**(VALUES | changes))
    model = getattr(transformers, cls)._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def outputs(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(IDS)
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return [getattr(out, name) for name in names if getattr(out, name, None) is not None]


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_class_loads_what_transformers_saved_and_the_other_way(cls: type, tied: bool, tmp_path: Path) -> None:
    theirs = their_model(cls.__name__, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = cls.from_pretrained(tmp_path / "theirs")  # type: ignore[attr-defined]
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    back, info = getattr(transformers, cls.__name__).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same(ours, back.eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    their_model().to(dtype).save_pretrained(tmp_path)
    assert GPTNeoForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
    assert GPTNeoForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    half = GPTNeoForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.lm_head.weight is half.transformer.wte.weight
    with pytest.raises(RequestError, match="dtype is 'int8'; legal are auto, float32"):
        GPTNeoForCausalLM.from_pretrained(tmp_path, dtype="int8")


@pytest.mark.parametrize("cls", [GPTNeoForCausalLM, neoquant.AutoModelForCausalLM, neoquant.AutoTokenizer])
def test_an_empty_name_is_not_the_bundled_model(cls: Any) -> None:
    with pytest.raises(CheckpointError, match="named by an empty text"):
        cls.from_pretrained("")


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("float", torch.float32)])
def test_torchs_other_names_of_types_are_read(make_model: Callable[..., Path], name: str, dtype: torch.dtype) -> None:
    folder = make_model(dtype=str(dtype).removeprefix("torch."))
    config = json.loads((folder / "config.json").read_text()) | {"dtype": name}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert neoquant.load(folder, dtype="auto")[0].dtype == theirs.dtype == dtype


def test_shards(tmp_path: Path) -> None:
    theirs = their_model()
    theirs.save_pretrained(tmp_path, max_shard_size="4kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(GPTNeoForCausalLM.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_old_file_with_its_mask_buffers(legacy: bool, tmp_path: Path) -> None:
    """As EleutherAI published it in 2021: float32, mask buffers, the tied head under both names."""
    theirs = their_model()
    state = dict(theirs.state_dict())
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.attention.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    theirs.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = GPTNeoForCausalLM.from_pretrained(tmp_path)
    assert_same(ours, theirs)
    masks = {name for name in ours.load_report.dropped if "masked_bias" in name or name.endswith("attention.bias")}
    assert len(masks) == 4
    assert "transformer.h.0.attn.attention.out_proj.bias" in dict(ours.named_parameters())


def test_a_bare_network_becomes_a_language_model_and_back(tmp_path: Path) -> None:
    theirs = their_model()
    theirs.transformer.save_pretrained(tmp_path / "bare")  # no `transformer.` before the names
    assert_same(GPTNeoForCausalLM.from_pretrained(tmp_path / "bare"), theirs)
    theirs.save_pretrained(tmp_path / "whole")
    assert_same(GPTNeoModel.from_pretrained(tmp_path / "whole"), theirs.transformer)


def test_a_new_head_is_drawn_and_said(tmp_path: Path) -> None:
    their_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.warns(LoadWarning) as caught:
        model = GPTNeoForTokenClassification.from_pretrained(tmp_path)
    said = " ".join(str(warning.message) for warning in caught)
    assert "no weights for classifier.weight, classifier.bias: newly initialized" in said
    assert "also holds lm_head.weight, which GPTNeoForTokenClassification does not use" in said
    assert model.load_report.missing == ("classifier.weight", "classifier.bias")
    assert model.classifier.weight.std() > 0
    assert not model.classifier.bias.any()


def test_every_missing_and_wrong_tensor_is_named(make_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    short = {k: v for k, v in tensors.items() if not k.endswith(("ln_f.bias", "h.1.mlp.c_fc.weight"))}
    save_file(short, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 2 .*h\.1\.mlp\.c_fc\.weight, transformer\.ln_f\.bias"):
        neoquant.load(folder)
    tensors["transformer.ln_f.bias"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'transformer.ln_f.bias' is \[5\], but config.json says \[24\]"):
        neoquant.load(folder)
    tensors["transformer.ln_f.bias"] = torch.zeros(24, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'transformer.ln_f.bias' is torch.int32"):
        neoquant.load(folder)


def test_unexpected_tensors_are_named(make_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model()
    extra = {"transformer.h.9.mlp.c_fc.weight": torch.zeros(2, 2)}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    with pytest.warns(LoadWarning, match=r"also holds transformer\.h\.9\.mlp\.c_fc\.weight"):
        neoquant.load(folder)


def test_load_gives_model_and_tokenizer(tiny_model: Path) -> None:
    model, tokenizer = neoquant.load(tiny_model)
    assert not model.training
    ids = tokenizer.encode("Hello, wörld<|endoftext|>")
    assert ids[-1] == tokenizer.eos_token_id == 0
    assert tokenizer.decode(ids) == "Hello, wörld<|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello, wörld"
    assert model.generate([ids[:5]], max_new_tokens=3, eos_token_id=[]).shape == (1, 8)


def test_tokenizer_faults_are_named(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        neoquant.load(folder)
    (folder / "tokenizer.json").rename(folder / "kept")
    with pytest.raises(CheckpointError, match=r"no tokenizer here: neither tokenizer\.json nor vocab\.json"):
        neoquant.load_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"the model was trained with .*those of EleutherAI/gpt-neo-125m\)"):
        neoquant.load_tokenizer(folder)
    saved = folder / "checkpoint-90"  # as a training run leaves it
    saved.mkdir()
    (folder / "kept").rename(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=rf"no tokenizer here: .* into the folder \({folder} holds one\)"):
        neoquant.load_tokenizer(saved)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:99", "has . CUDA devices"),
        ("tpu", "legal are auto, cpu"),
        ({"a": 0, "b": "cpu"}, "says nothing about transformer.wte"),
    ],
)
def test_illegal_devices_are_named(device: Any, message: str, tiny_model: Path) -> None:
    with pytest.raises(RequestError, match=message):
        neoquant.load(tiny_model, device=device)


def test_saving_replaces_nothing_unasked(tiny_model: Path, tmp_path: Path) -> None:
    model, _ = neoquant.load(tiny_model)
    model.save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    model.half()
    with pytest.raises(neoquant.OutputError, match="out"):  # what is there has more bits
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_a_replaced_folder_hands_its_tokenizer_on(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    model, tokenizer = neoquant.load(folder)
    model.save_pretrained(folder, force=True)
    assert neoquant.load(folder)[1].sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.bias"])
def test_a_weight_beyond_float16_is_refused_not_made_infinite(name: str, make_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{name}' reaches 1e\+06, and float16 ends at 65504: .*bfloat16"):
        neoquant.load(folder, dtype="float16")
    assert neoquant.load(folder, dtype="bfloat16")[0].transformer.wte.weight.isfinite().all()


@pytest.mark.real_data
def test_the_gpt2_tokenizer_equals_transformers(real_data: Path) -> None:
    folder = real_data / "data" / "gpt2-tokenizer"
    ours = neoquant.Tokenizer.from_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert ours.eos_token_id == 50256
    for line in (real_data / "data" / "pile" / "pile-test-sample.jsonl").read_text("utf-8").split("\n")[:-1:9]:
        text = json.loads(line)["text"][:20000]
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.real_data
def test_a_trained_model_equals_transformers(real_data: Path) -> None:
    folder = real_data / "models" / "neo-8m"
    model, tokenizer = neoquant.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([tokenizer.encode((folder / "config.json").read_text() * 2)[:600]])
    with torch.no_grad():
        ours, expected = model(ids).logits, theirs(ids).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_a_gpu_gives_the_cpus_logits(kind: str | None, tiny_model: Path, tmp_path: Path) -> None:
    source = tiny_model
    if kind is not None:
        source = tmp_path / kind
        neoquant.quantize(tiny_model, source, neoquant.Recipe.load(kind))
    expected, _ = neoquant.load(source, device="cpu")
    found, _ = neoquant.load(source, device="cuda", dtype="float32")
    assert neoquant.load(source)[0].dtype == torch.bfloat16
    with torch.no_grad():
        a, b = expected(IDS).logits, found(IDS.cuda()).logits.cpu()
    assert (a - b).abs().max() <= 1e-3 * a.abs().max()
    generated = found.generate(IDS[:, :5], max_new_tokens=8, eos_token_id=[])
    assert generated.tolist() == expected.generate(IDS[:, :5], max_new_tokens=8, eos_token_id=[]).tolist()


@pytest.mark.gpu
def test_torchs_default_device_changes_no_file(tiny_model: Path, tmp_path: Path) -> None:
    for name, default in (("cpu", "cpu"), ("cuda", "cuda")):
        with torch.device(default):
            neoquant.quantize(tiny_model, tmp_path / name, neoquant.Recipe.load("nf4"))
            model, _ = neoquant.load(tmp_path / name, device="cpu")
            neoquant.convert(tmp_path / name, tmp_path / f"{name}-own", "neoquant")
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    for kind in ("", "-own"):
        on_cpu, on_cuda = (tmp_path / f"{name}{kind}/model.safetensors" for name in ("cpu", "cuda"))
        assert on_cpu.read_bytes() == on_cuda.read_bytes()


def test_no_weights_are_read_where_torchs_default_device_holds_none(tiny_model: Path, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: neoquant.load(tiny_model),
        lambda: GPTNeoForCausalLM.from_pretrained(tiny_model),
        lambda: GPTNeoForCausalLM.from_pretrained(tiny_model, quantization_config=neoquant.BitsAndBytesConfig(True)),
        lambda: neoquant.quantize(tiny_model, tmp_path / "out", neoquant.Recipe.load("nf4")),
        lambda: neoquant.convert(tiny_model, tmp_path / "out"),
        lambda: neoquant.tune(tiny_model, tmp_path / "out", base=tiny_model, calibration=cast("Any", None)),
    ]
    for call in calls:
        with torch.device("meta"), pytest.raises(RequestError, match="default device is 'meta'"):
            call()
    assert not (tmp_path / "out").exists()


def test_weights_in_the_stored_type_are_used_where_they_lie_and_outlive_a_replaced_file(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    model = neoquant.GPTNeoForCausalLM.from_pretrained(folder, dtype="auto")
    expected = load_file(tiny_model / "model.safetensors")
    (folder / "config.json").replace(folder / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_loading_draws_no_weights(tiny_model: Path) -> None:
    """Torch's random generator stays where it was, and the compiler that drawing on the meta device needs unloaded."""
    script = (
        "import sys, torch, neoquant\n"
        "before = torch.random.get_rng_state()\n"
        f"neoquant.GPTNeoForCausalLM.from_pretrained({str(tiny_model)!r})\n"
        "assert torch.equal(before, torch.random.get_rng_state())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
