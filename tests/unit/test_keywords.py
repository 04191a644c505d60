"""transformers' keywords of `from_pretrained`: taken, answered or refused, and small methods that people call."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.errors import RequestError
from neoquant.loading.keywords import ANSWERED, OVERRIDES, WITHOUT_EFFECT

AutoModel = neoquant.AutoModelForCausalLM
NOT_THEIRS = {
    "_adapter_model_path",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "commit_message",
    "create_pr",
    "repo_id",
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
@pytest.mark.parametrize("value", [True, False, None])
def test_harmless_keywords_change_nothing(tiny_model: Path, name: str, value: Any) -> None:
    given, plain = (AutoModel.from_pretrained(tiny_model, **options) for options in ({name: value}, {}))
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", ANSWERED)
def test_keywords_that_ask_for_nothing_are_taken_and_others_answered(tiny_model: Path, name: str) -> None:
    neutral, answer = ANSWERED[name]
    AutoModel.from_pretrained(tiny_model, **dict.fromkeys([name], neutral[-1]))
    asked = True not in neutral
    with pytest.raises(RequestError, match=re.escape(f"{name}={asked!r} is not done here: {answer}")):
        AutoModel.from_pretrained(tiny_model, **{name: asked})


def test_words_that_are_none_are_refused(tiny_model: Path) -> None:
    with pytest.raises(RequestError, match="has no keyword 'dtpye'"):
        AutoModel.from_pretrained(tiny_model, dtpye="float16")
    with pytest.raises(
        RequestError,
        match=r"window_size is a setting of config\.json: .*neoquant\.transformers\.from_pretrained takes it",
    ):
        AutoModel.from_pretrained(tiny_model, window_size=3)


@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_settings_that_change_no_weight_are_transformers(tiny_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    said = {"use_cache": False, "return_dict": False, "output_attentions": True, "output_hidden_states": True,
            "resid_dropout": 0.1, "embed_dropout": 0.2, "attention_dropout": 0.3, "classifier_dropout": 0.4,
            "pad_token_id": 3}  # fmt: skip
    assert said.keys() == set(OVERRIDES)
    name = "AutoModelForTokenClassification"
    plain, *found = (
        getattr(library, name).from_pretrained(tiny_model, attn_implementation="eager", **options)
        for library, options in ((neoquant, {}), (neoquant, said), (transformers, said))
    )
    for model in found:
        assert {key: getattr(model.config, key) for key in said} == said
        assert model.transformer.drop.p == 0.2 and model.dropout.p == 0.4
    _, hidden, attentions = found[0](torch.tensor([[1, 2, 3]]))  # a tuple, without a cache
    assert (len(hidden), len(attentions)) == (3, 2)
    found[0].save_pretrained(tmp_path / "out")
    assert neoquant.AutoConfig.from_pretrained(tmp_path / "out").embed_dropout == 0.2
    unsaid = getattr(neoquant, name).from_pretrained(tiny_model, **dict.fromkeys(OVERRIDES))
    assert unsaid.config == plain.config
    with pytest.raises(neoquant.errors.ConfigError, match="resid_dropout is 2"):
        AutoModel.from_pretrained(tiny_model, resid_dropout=2)


def test_every_keyword_of_transformers_has_an_answer(tiny_model: Path) -> None:
    """The list is transformers' own code, of the version that is installed."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedModel.from_pretrained
    found = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(theirs)))
    signed = inspect.signature(theirs).parameters.values()
    found |= {each.name for each in signed if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert len(found) > 20
    ours = set(inspect.signature(AutoModel.model_class.from_pretrained).parameters)
    assert found - NOT_THEIRS - ours - set(WITHOUT_EFFECT) - set(ANSWERED) == set()


def test_sizes_are_transformers(tiny_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ours = AutoModel.from_pretrained(tiny_model)
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    assert ours.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)
    assert ours.get_input_embeddings() is ours.transformer.wte and ours.get_output_embeddings() is ours.lm_head
    bare = neoquant.AutoModel.from_pretrained(tiny_model)
    assert bare.get_input_embeddings() is bare.wte and bare.get_output_embeddings() is None


def test_quantized_weights_count_as_what_they_stand_for(tiny_model: Path) -> None:
    plain, small = (
        AutoModel.from_pretrained(tiny_model, quantization_config=said) for said in (None, {"load_in_8bit": True})
    )
    assert small.num_parameters() == plain.num_parameters()
    assert small.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    quantized = 12 * 24 * 24 * 2  # of two blocks
    assert small.num_parameters(only_trainable=True) < plain.num_parameters(only_trainable=True) - quantized + 1
    assert small.get_memory_footprint() < plain.get_memory_footprint() - 2 * quantized


@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_a_head_of_another_size_is_a_runtime_error_as_in_transformers(make_model: Any, tmp_path: Path) -> None:
    model = neoquant.GPTNeoForSequenceClassification.from_pretrained(make_model(), num_labels=3)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"score\.weight"):
        neoquant.GPTNeoForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=5)
    assert list(model.config) == list(model.config.to_dict())
