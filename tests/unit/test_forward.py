"""What a forward pass gives and keeps, against transformers: caches, outputs, tuples, and a fresh model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import CLASSES, SMALL, assert_close, pair

from neoquant.errors import RequestError
from neoquant.hf.auto import AutoModelForCausalLM
from neoquant.loading.pretrained import GPTNeoForCausalLM, GPTNeoForSequenceClassification, GPTNeoModel
from neoquant.model.cache import KVCache
from neoquant.model.config import GPTNeoConfig
from neoquant.model.outputs import TokenClassifierOutput

transformers = pytest.importorskip("transformers")

VALUES = SMALL | {"pad_token_id": 1}
IDS = torch.randint(2, 31, (2, 9), generator=torch.Generator().manual_seed(5))


def steps(model: Any, ids: torch.Tensor, splits: list[int], **options: Any) -> torch.Tensor:
    """Logits of `ids` given in parts, as people write it: the cache is taken from what was not asked for one."""
    past, parts = None, []
    for part in ids.split(splits, dim=1):
        output = model(part, past_key_values=past, **options)
        past = output.past_key_values
        parts.append(output[0])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("splits", [[9], [1] * 9, [4, 1, 1, 3], [8, 1]])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_loop_that_everybody_writes_gives_the_logits_of_the_whole(
    splits: list[int], gradients: bool, training: bool, implementation: str
) -> None:
    theirs, ours = pair(VALUES, GPTNeoForCausalLM, implementation, 3)
    ours.train(training)
    with torch.set_grad_enabled(gradients):
        logits = steps(ours, IDS, splits)
        assert_close(logits, ours(IDS).logits)
        assert_close(logits, steps(theirs, IDS, splits))
    assert logits.requires_grad == gradients


@pytest.mark.parametrize("splits", [[9], [4, 1, 1, 3], [1] * 9])
def test_gradients_pass_through_a_cache(splits: list[int]) -> None:
    _, ours = pair(VALUES, GPTNeoForCausalLM, "sdpa", 3)
    gradients = []
    for logits in (ours(IDS, use_cache=False).logits, steps(ours, IDS, splits)):
        ours.zero_grad()
        logits.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in ours.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected)


def test_whether_a_cache_is_kept_is_the_configurations_unless_asked() -> None:
    for cls in (GPTNeoModel, GPTNeoForCausalLM, GPTNeoForSequenceClassification):
        for kept in (True, False):
            theirs, ours = pair(VALUES | {"use_cache": kept}, cls, "sdpa", 1)
            assert (ours(IDS).past_key_values is not None) == (theirs(IDS).past_key_values is not None) == kept
            assert (ours(IDS, use_cache=not kept).past_key_values is None) == kept
    _, ours = pair(VALUES, GPTNeoForCausalLM, "sdpa", 1)
    held = ours(IDS[:, :4]).past_key_values
    again = ours(IDS[:, 4:], past_key_values=held, use_cache=False)
    assert again.past_key_values is held and held.get_seq_length() == 9


def test_a_cache_that_nobody_uses_copies_nothing() -> None:
    key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    cache = KVCache(1, capacity=5)
    assert all(a is b for a, b in zip(cache.update(0, key, value), (key, value), strict=True))
    more = torch.randn(2, 3, 1, 4)
    kept = key.clone()
    keys, values = cache.update(0, more, more)
    assert torch.equal(keys, torch.cat([key, more], 2)) and torch.equal(values, torch.cat([value, more], 2))
    cache.update(0, more, more)
    assert torch.equal(key, kept) and cache.get_seq_length() == 7


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("labelled", [False, True])
def test_an_output_is_a_mapping_as_transformers_is(cls: type, labelled: bool) -> None:
    theirs, ours = pair(VALUES | {"output_hidden_states": True}, cls, "sdpa", 2)
    labels: dict[str, Any] = {}
    if labelled and cls is GPTNeoForCausalLM:
        labels = {"labels": IDS}
    expected, found = theirs(IDS, **labels), ours(IDS, **labels)
    assert isinstance(found, Mapping)
    names = ["past_key_values" if name == "cache" else name for name in expected]  # its name since transformers 5.24
    assert list(found) == list(found.keys()) == names and len(found) == len(expected)
    if "past_key_values" in names:
        assert "cache" in found and found["cache"] is found.cache is found["past_key_values"]
    for number, (name, value) in enumerate(found.items()):
        assert name in found and found[name] is found[number] is getattr(found, name) is value is found.get(name)
        if isinstance(value, torch.Tensor):
            assert_close(value, expected[name])
    assert [len(a) for a in found.to_tuple()[-1:]] == [len(a) for a in expected.to_tuple()[-1:]]
    for absent in ("loss", "attentions", "x"):
        if absent not in expected:
            assert absent not in found and found.get(absent) is None
            with pytest.raises(KeyError):
                found[absent]
    found["hidden_states"] = None
    assert "hidden_states" not in found and len(found) == len(expected) - 1
    with pytest.raises(KeyError):
        found["nothing"] = 1


@pytest.mark.parametrize("cls", [GPTNeoModel, GPTNeoForCausalLM, GPTNeoForSequenceClassification])
def test_a_cache_has_either_of_its_names(cls: type) -> None:
    """transformers 5.24 calls `cache` what was `past_key_values`."""
    _, ours = pair(VALUES, cls, "sdpa", 2)
    with torch.no_grad():
        first = [ours(IDS[:, :-1], use_cache=True).cache for _ in range(3)]
        expected = ours(IDS[:, -1:], past_key_values=first[0]).to_tuple()[0]
        assert ours(IDS[:, -1:], cache=first[1]).to_tuple()[0].equal(expected)
        with pytest.raises(RequestError, match="past_key_values and cache are two names of the same"):
            ours(IDS[:, -1:], cache=first[1], past_key_values=first[2])
    assert not hasattr(TokenClassifierOutput(), "cache")
    if cls is GPTNeoForCausalLM:
        made = ours.generate(IDS[:1], max_new_tokens=3, return_dict_in_generate=True)
        longer = torch.cat([made.sequences, IDS[:1, :2]], 1)
        ids = [ours.generate(longer, max_new_tokens=2, **given).tolist() for given in ({}, {"cache": made.cache})]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("cls", [GPTNeoModel, GPTNeoForCausalLM, GPTNeoForSequenceClassification])
def test_return_dict_false_gives_transformers_tuple(cls: type) -> None:
    for config, asked in (({"return_dict": False}, {}), ({}, {"return_dict": False})):
        theirs, ours = pair(VALUES | config, cls, "sdpa", 2)
        expected, found = theirs(IDS, **asked), ours(IDS, **asked)
        assert type(found) is tuple and len(found) == len(expected)
        assert_close(found[0], expected[0])
        assert ours(IDS, return_dict=True)[0].equal(found[0])
    assert ours.config.to_dict().get("return_dict") is None


def test_configured_hidden_states_and_tuples_leave_generating_alone() -> None:
    theirs, ours = pair(VALUES | {"return_dict": False, "output_hidden_states": True}, GPTNeoForCausalLM, "sdpa", 2)
    expected = ours.generate(IDS[:1, :4], max_new_tokens=8, eos_token_id=[]).tolist()
    ours.config.return_dict, ours.config.output_hidden_states = True, False
    assert ours.generate(IDS[:1, :4], max_new_tokens=8, eos_token_id=[]).tolist() == expected
    assert GPTNeoConfig.from_dict(theirs.config.to_dict()).return_dict is False


@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (2, 0)])
def test_nothing_gives_no_logits(tiny_model: Path, shape: tuple[int, int]) -> None:
    model = GPTNeoForCausalLM.from_pretrained(tiny_model)
    assert model(torch.zeros(shape, dtype=torch.long)).logits.shape == (*shape, model.config.vocab_size)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_unknown_argument_is_an_error(cls: type) -> None:
    _, ours = pair(VALUES, cls, "sdpa", 0)
    with pytest.raises(TypeError, match="colour"):
        ours(IDS, colour="red")


def test_token_types_and_positions_have_transformers_effect_with_a_cache() -> None:
    theirs, ours = pair(VALUES, GPTNeoForCausalLM, "sdpa", 4)
    types, positions = IDS % 4, (torch.arange(9) * 7 % 16)[None].repeat(2, 1)
    results = []
    for model in (theirs, ours):
        first = model(IDS[:, :5], token_type_ids=types[:, :5], position_ids=positions[:, :5])
        second = model(
            IDS[:, 5:],
            past_key_values=first.past_key_values,
            token_type_ids=types[:, 5:],
            position_ids=positions[:, 5:],
        )
        results.append(torch.cat([first.logits, second.logits], 1))
    assert_close(results[1], results[0])
    plain = ours(IDS).logits
    for given in ({"token_type_ids": types}, {"position_ids": positions}):
        assert not torch.allclose(ours(IDS, **given).logits, plain, atol=1e-3)


@pytest.mark.parametrize("cls", CLASSES)
def test_fresh_weights_are_distributed_as_transformers(cls: type) -> None:
    values = SMALL | {"hidden_size": 96, "vocab_size": 500, "initializer_range": 0.05, "num_labels": 40}
    torch.manual_seed(0)
    theirs = getattr(transformers, cls.__name__)(transformers.GPTNeoConfig(**values)).state_dict()
    ours = cls(GPTNeoConfig.from_dict(values)).state_dict()
    for name, weight in ours.items():
        expected = theirs[name]
        if float(expected.std()) == 0 or weight.numel() == 1:
            assert torch.equal(weight, expected), name
        else:
            assert abs(weight.std() / expected.std() - 1) < 0.15 and abs(weight.mean()) < 0.01, name


def test_a_fresh_model_guesses_and_a_seed_repeats_it() -> None:
    config = GPTNeoConfig(
        vocab_size=100, max_position_embeddings=32, hidden_size=48, num_heads=4, num_layers=2,
        attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    model = GPTNeoForCausalLM(config).eval()
    ids = torch.randint(0, 100, (4, 32))
    assert abs(float(model(ids, labels=ids).loss) - math.log(100)) < 0.2
    torch.manual_seed(3)
    again = AutoModelForCausalLM.from_config(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_loading_draws_nothing(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, _n=name, **kwargs: drawn.append(_n) or self)
    state = torch.get_rng_state()
    GPTNeoForCausalLM.from_pretrained(tiny_model)
    assert drawn == [] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cls", CLASSES)
def test_attention_weights_are_given_wherever_they_are_asked_for(cls: type) -> None:
    for config, asked in (({"output_attentions": True}, {}), ({}, {"output_attentions": True})):
        ours = cls(GPTNeoConfig.from_dict(VALUES | config)).eval()
        found = ours(IDS, **asked)
        assert len(found.attentions) == ours.config.num_layers
        plain = ours(IDS, output_attentions=False)
        assert plain.attentions is None
        torch.testing.assert_close(found[0], plain[0])
        if cls is GPTNeoForCausalLM:
            assert ours.generate(IDS[:1], max_new_tokens=1).shape == (1, 10)
