"""transformers' words for loading, tokenizing and generating, held to transformers on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neoquant
from neoquant.demo import MODEL
from neoquant.errors import ConfigError, RequestError

transformers = pytest.importorskip("transformers")

HEADS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
TEXTS = ["def mean(values):", "", "  x", "class Größe(dict):\n    pass"]


@pytest.fixture(scope="module")
def tokenizers() -> tuple[neoquant.Tokenizer, Any]:
    ours, theirs = neoquant.AutoTokenizer.from_pretrained(MODEL), transformers.AutoTokenizer.from_pretrained(MODEL)
    ours.pad_token = theirs.pad_token = ours.eos_token
    return ours, theirs


@pytest.fixture(scope="module")
def models() -> tuple[neoquant.GPTNeoForCausalLM, Any]:
    ours = neoquant.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", device_map="cpu")
    return ours, transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": "longest", "return_offsets_mapping": True},
        {"padding": "max_length", "max_length": 9},
        {"truncation": True, "max_length": 3},
        {"padding": "max_length", "truncation": True, "max_length": 4, "return_tensors": "pt"},
        {"padding": True, "return_tensors": "np", "return_attention_mask": False},
        {"text_pair": ["a", "b", " c", "d"], "padding": True, "return_tensors": "pt"},
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_become_the_same_tensors(tokenizers: tuple[Any, Any], options: dict[str, Any], side: str) -> None:
    ours, theirs = tokenizers
    ours.padding_side = theirs.padding_side = side
    got, expected = ours(TEXTS, **options), theirs(TEXTS, **options)
    assert {name: type(value) for name, value in got.items()} == {name: type(v) for name, v in expected.items()}
    assert values(got) == values(expected)
    alone = {name: value for name, value in options.items() if name != "text_pair"}
    assert values(ours(TEXTS[0], **alone)) == values(theirs(TEXTS[0], **alone))


def values(encoding: Any) -> str:
    """Every column as plain lists, spelled out."""
    plain = {name: column.tolist() if hasattr(column, "tolist") else column for name, column in encoding.items()}
    return json.dumps(plain, sort_keys=True)


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=40))
def test_ids_become_the_same_text(text: str) -> None:
    ours, theirs = _both()
    encoded = ours(text, return_tensors="pt")
    assert encoded.input_ids.shape == encoded["attention_mask"].shape
    ids = [0, *encoded.input_ids[0].tolist()]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    for skip in (False, True):
        assert ours.batch_decode(torch.tensor([ids]), skip_special_tokens=skip) == theirs.batch_decode(
            [ids], skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)


@cache
def _both() -> tuple[neoquant.Tokenizer, Any]:
    return neoquant.GPT2Tokenizer.from_pretrained(MODEL), transformers.AutoTokenizer.from_pretrained(MODEL)


def test_a_saved_tokenizer_is_read_alike_by_both(tokenizers: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = tokenizers
    ours.padding_side = "left"
    ours.save_pretrained(tmp_path)
    again, theirs = neoquant.AutoTokenizer.from_pretrained, transformers.AutoTokenizer.from_pretrained(tmp_path)
    for read in (again(tmp_path), theirs):
        assert (read.pad_token, read.padding_side, read.model_max_length) == (ours.eos_token, "left", 512)
        assert read(TEXTS, padding=True)["input_ids"] == ours(TEXTS, padding=True)["input_ids"]


def test_what_a_tokenizer_cannot_do_is_said() -> None:
    tokenizer = neoquant.AutoTokenizer.from_pretrained(MODEL)
    with pytest.raises(RequestError, match=r"has none: set tokenizer.pad_token = tokenizer.eos_token"):
        tokenizer(TEXTS, padding=True)
    with pytest.raises(RequestError, match=r"texts of 0 to .* tokens make no tensor: pass padding=True"):
        tokenizer(TEXTS, return_tensors="pt")
    with pytest.raises(RequestError, match="return_tensors is 'tf'"):
        tokenizer("a", return_tensors="tf")
    with pytest.raises(RequestError, match="padding is 'left'; legal are"):
        tokenizer("a", padding="left")
    tokenizer.pad_token = "<pad>"
    with pytest.raises(RequestError, match="'<pad>', which is no token"):
        tokenizer(TEXTS, padding=True)
    with pytest.raises(AttributeError, match="has no 'offsets'"):
        _ = tokenizer("a").offsets


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_every_head_gives_transformers_outputs(make_model: Callable[..., Path], dtype: Any) -> None:
    folder = make_model(pad_token_id=0, num_labels=3)
    ids, mask = torch.randint(1, 259, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    ids[1, 7:], mask[1, 7:] = 0, 0
    for head in ("", *(f"For{head}" for head in HEADS)):
        theirs = getattr(transformers, f"AutoModel{head}").from_pretrained(folder, attn_implementation="eager").eval()
        theirs.save_pretrained(folder.parent / f"whole{head}")  # with the head that was drawn
        theirs = theirs.to(torch.float16 if dtype == "auto" else dtype)
        ours = getattr(neoquant, f"AutoModel{head}").from_pretrained(
            folder.parent / f"whole{head}", dtype=dtype, device_map="auto"
        )
        assert type(ours).__name__ == type(theirs).__name__ and ours.dtype == theirs.dtype
        with torch.no_grad():
            got, expected = ours(ids, mask), theirs(ids, attention_mask=mask)
        for name in ("last_hidden_state", "logits", "start_logits", "end_logits"):
            if name in expected:
                a, b = getattr(got, name).float(), expected[name].float()
                if a.shape[:2] == mask.shape:
                    a, b = a[mask.bool()], b[mask.bool()]
                assert (a - b).abs().max() <= (1e-5 if dtype != "auto" else 2e-2) * b.abs().max()


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "CausalLM"])
@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_labels_of_a_head_to_be_trained(make_model: Callable[..., Path], head: str) -> None:
    folder = make_model(id2label={"0": "no", "1": "yes", "2": "perhaps"}, pad_token_id=0)
    for said in (
        {"num_labels": 5},
        {"id2label": {0: "a", 1: "b", 2: "c", 3: "d"}, "problem_type": "multi_label_classification"},
        {"torch_dtype": torch.float32, "num_labels": 1, "problem_type": "regression"},
        {"num_labels": 2, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}},
    ):
        ours, theirs = (
            getattr(library, f"AutoModelFor{head}").from_pretrained(folder, **said)
            for library in (neoquant, transformers)
        )
        for name in {"num_labels", "id2label", "problem_type", *said} - {"torch_dtype"}:
            assert getattr(ours.config, name) == getattr(theirs.config, name)
        found = {name: value.shape for name, value in ours.state_dict().items()}
        assert found == {name: value.shape for name, value in theirs.state_dict().items()}
        assert ours.dtype == torch.float32
        assert ours.get_input_embeddings() is ours.get_submodule("transformer.wte")
        assert (ours.get_output_embeddings() is None) == (theirs.get_output_embeddings() is None)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantized = getattr(neoquant, f"AutoModelFor{head}").from_pretrained(folder, num_labels=7, quantization_config=nf4)
    assert quantized.config.num_labels == 7
    with pytest.raises(RequestError, match="num_labels is 2, and id2label names 1 labels"):
        getattr(neoquant, f"AutoModelFor{head}").from_pretrained(folder, num_labels=2, id2label={0: "a"})
    from_numbers = getattr(neoquant, f"AutoModelFor{head}").from_pretrained(folder, label2id={"b": 1, "a": "0"})
    assert from_numbers.config.id2label == {0: "a", 1: "b"}
    for label2id in ({"a": 1}, {"a": 0, "b": 0}, {}):
        with pytest.raises(RequestError, match=r"label2id is .*, which is not the inverse of id2label"):
            getattr(neoquant, f"AutoModelFor{head}").from_pretrained(folder, id2label={0: "a"}, label2id=label2id)
    with pytest.raises(RequestError, match="dtype and torch_dtype are two names of the same"):
        getattr(neoquant, f"AutoModelFor{head}").from_pretrained(folder, dtype="float32", torch_dtype="float32")


def test_configurations_are_read_by_folder(make_model: Callable[..., Path]) -> None:
    config = neoquant.AutoConfig.from_pretrained(MODEL)
    assert config == neoquant.GPTNeoConfig.from_pretrained(MODEL)
    fresh = neoquant.AutoModelForTokenClassification.from_config(config)
    assert isinstance(fresh, neoquant.GPTNeoForTokenClassification)
    (folder := make_model() / "config.json").write_text('{"model_type": "gpt_neo", "num_layers": 0}')
    with pytest.raises(ConfigError, match=r"config\.json: num_layers is 0"):
        neoquant.AutoConfig.from_pretrained(folder.parent)


GENERATED: list[dict[str, Any]] = [
    {},
    {"max_length": 30},
    {"max_new_tokens": 40, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 0.9, "max_length": 40},
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "num_return_sequences": 3, "max_new_tokens": 12},
    {"max_new_tokens": 30, "eos_token_id": 199, "pad_token_id": 7},
    {"max_new_tokens": 30, "min_new_tokens": 12, "eos_token_id": [199, 200], "num_beams": 1},
    {"max_new_tokens": 30, "min_length": 20, "eos_token_id": [199, 200]},
    {"max_new_tokens": 60, "stop_strings": ["\n", "return"]},
]


@pytest.mark.parametrize("options", GENERATED)
def test_generate_gives_transformers_ids(
    models: tuple[Any, Any], tokenizers: tuple[Any, Any], options: dict[str, Any]
) -> None:
    (ours, theirs), (tokenizer, their_tokenizer) = models, tokenizers
    tokenizer.padding_side = "left"
    inputs = tokenizer(["def mean(values):", "import"], padding=True, return_tensors="pt").to(ours.device)
    readers = [{"tokenizer": t} if "stop_strings" in options else {} for t in (tokenizer, their_tokenizer)]
    torch.manual_seed(5)
    expected = theirs.generate(**inputs, **options, **readers[1])
    torch.manual_seed(5)
    assert ours.generate(**inputs, **options, **readers[0]).tolist() == expected.tolist()
    other_name = {"inputs": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    torch.manual_seed(5)
    assert ours.generate(**other_name, **options, **readers[0]).tolist() == expected.tolist()
    torch.manual_seed(5)
    config = neoquant.GenerationConfig(**{k: v for k, v in options.items() if k != "num_beams"})
    assert ours.generate(**inputs, generation_config=config, **readers[0]).tolist() == expected.tolist()


def test_transformers_own_objects_serve(models: tuple[Any, Any], tokenizers: tuple[Any, Any]) -> None:
    """Their generation configuration and their streamers, beside ours."""
    (ours, _), (tokenizer, their_tokenizer) = models, tokenizers
    ids = tokenizer("def mean(values):", return_tensors="pt").input_ids
    asked = transformers.GenerationConfig(max_new_tokens=5)
    assert ours.generate(ids, generation_config=asked).shape == (1, ids.shape[1] + 5)
    streamer = transformers.TextIteratorStreamer(their_tokenizer, skip_prompt=True)
    out = ours.generate(ids, generation_config=asked, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_our_streamer_prints_the_text(
    models: tuple[Any, Any], tokenizers: tuple[Any, Any], capsys: pytest.CaptureFixture[str], skip_prompt: bool
) -> None:
    (ours, _), (tokenizer, _) = models, tokenizers
    ids = tokenizer("def mean(values):", return_tensors="pt").input_ids
    out = ours.generate(ids, max_new_tokens=25, streamer=neoquant.TextStreamer(tokenizer, skip_prompt))
    shown = out[0, ids.shape[1] :] if skip_prompt else out[0]
    assert capsys.readouterr().out == tokenizer.decode(shown) + "\n"
    with pytest.raises(RequestError, match="one text, not 2"):
        ours.generate(ids.repeat(2, 1), streamer=neoquant.TextStreamer(tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4, "seed": 1}, "num_beams is 4; neoquant generates with 1 only"),
        ({"max_new_token": 4}, "does not know 'max_new_token'; did you mean 'max_new_tokens'?"),
        ({"num_return_sequences": 2}, "1 without do_sample=True"),
        ({"max_length": 3}, "the prompt alone has 6 tokens"),
        ({"stop_strings": "x"}, "pass tokenizer="),
        ({"do_sample": True, "temperature": 0.0}, "legal with do_sample=True is above 0"),
    ],
)
def test_what_generate_does_not_do_is_refused(
    models: tuple[Any, Any], tokenizers: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    ids = tokenizers[0]("def mean(values):", return_tensors="pt").input_ids
    with pytest.raises(RequestError, match=message.replace("?", r"\?")):
        models[0].generate(ids, **options)


def test_what_a_folder_says_about_generating_counts(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model()
    said = {"_from_model_config": True, "do_sample": True, "top_k": 3, "max_new_tokens": 7, "eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(said | {"num_beams": 2}))
    model = neoquant.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(RequestError, match="generation settings: num_beams is 2; neoquant generates with 1 only"):
        model.generate(ids, seed=1)
    assert model.generate(ids).shape == (1, 10)  # by transformers
    model.save_pretrained(tmp_path / "beams")
    stated = {"do_sample": True, "max_new_tokens": 7, "top_k": 3, "num_beams": 2}
    assert json.loads((tmp_path / "beams" / "generation_config.json").read_text()) == stated
    (folder / "generation_config.json").write_text(json.dumps(said | {"colour": "red"}))
    with pytest.warns(neoquant.LoadWarning, match=r"generation_config\.json: 'colour' is no word for generating"):
        model = neoquant.AutoModelForCausalLM.from_pretrained(folder)
    assert (
        model.generate(ids, seed=1).tolist()
        == model.generate(ids, do_sample=True, top_k=3, max_new_tokens=7, seed=1).tolist()
    )
    assert model.generate(ids, max_length=5).shape == (1, 10)  # max_new_tokens has precedence, wherever it stands
    model.save_pretrained(tmp_path / "saved")
    del stated["num_beams"]
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == stated
