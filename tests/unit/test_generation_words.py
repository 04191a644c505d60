"""transformers' words for generating, on our loop: the same tokens and scores as its own on the same weights."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neoquant
from neoquant.errors import RequestError
from neoquant.generation.generate import (
    NOTHING,
    Sampling,
    filter_logits,
    stream,
    without_repeats,
    without_words,
)
from neoquant.model.cache import KVCache

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 5, 9, 5], [3, 3, 1, 3, 3]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """Ours and theirs, with one set of weights that likes to repeat itself."""
    values = {
        "vocab_size": 29, "max_position_embeddings": 40, "hidden_size": 16, "num_heads": 2, "num_layers": 2,
        "window_size": 4, "attention_types": [[["global", "local"], 1]], "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    ours = neoquant.GPTNeoForCausalLM(neoquant.GPTNeoConfig(**values)).init_weights(seed=3).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(6)
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**values)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def generated(pair: tuple[Any, Any], **asked: Any) -> tuple[Any, Any]:
    """What both make with the same random numbers."""
    made = []
    for model in pair:
        torch.manual_seed(1)
        given = {"attention_mask": MASK, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, **asked}
        made.append(model.generate(IDS, **given))
    return made[0], made[1]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 30])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_no_ngram_comes_twice_as_in_transformers(pair: tuple[Any, Any], size: int, penalty: float) -> None:
    whole = {"attention_mask": torch.ones_like(IDS), "repetition_penalty": penalty}
    ours, theirs = generated(pair, no_repeat_ngram_size=size, **whole)
    assert ours.tolist() == theirs.tolist()


def test_padding_is_part_of_no_ngram(pair: tuple[Any, Any]) -> None:
    """Each row goes on as it would alone, whatever fills its padding."""
    together, _ = generated(pair, no_repeat_ngram_size=2)
    for row in range(2):
        alone = pair[0].generate(
            IDS[row : row + 1, MASK[row].bool()], max_new_tokens=12, no_repeat_ngram_size=2, eos_token_id=[]
        )
        assert together[row, 5:].tolist() == alone[0, int(MASK[row].sum()) :].tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_what_would_repeat_is_found_by_looking(text: list[int], size: int, padding: int) -> None:
    expected = set()
    for token in range(5):
        ending = [*text, token][-size:]
        if len(ending) == size and any(text[i : i + size] == ending for i in range(len(text) - size + 1)):
            expected.add(token)
    logits = without_repeats(torch.zeros(1, 5), torch.tensor([[NOTHING] * padding + text]), size)
    assert {token for token in range(5) if not logits[0, token].isfinite()} == expected


@pytest.mark.parametrize("drafts", [1, 4])
def test_guessed_tokens_repeat_nothing_either(pair: tuple[Any, Any], drafts: int) -> None:
    for size, penalty in ((2, 1.0), (3, 1.2), (0, 1.2)):
        asked = {"no_repeat_ngram_size": size, "repetition_penalty": penalty, "max_new_tokens": 20, "eos_token_id": []}
        plain = pair[0].generate(IDS[:1], **asked)
        assert pair[0].generate(IDS[:1], prompt_lookup_num_tokens=drafts, **asked).tolist() == plain.tolist()


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.4, 1.0])
def test_min_p_keeps_what_transformers_keeps(pair: tuple[Any, Any], min_p: float) -> None:
    ours, theirs = generated(pair, min_p=min_p, do_sample=True, top_k=0, temperature=1.7)
    assert ours.tolist() == theirs.tolist()
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(2)) * 3
    wanted = transformers.MinPLogitsWarper(min_p)(None, transformers.TopKLogitsWarper(20)(None, logits / 0.7))
    torch.testing.assert_close(filter_logits(logits, Sampling(0.7, top_k=20, min_p=min_p)), wanted)


@pytest.mark.parametrize("sample", [False, True])
def test_scores_and_logits_are_transformers(pair: tuple[Any, Any], sample: bool) -> None:
    options = {"do_sample": True, "top_k": 5, "temperature": 0.9} if sample else {}
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    ours, theirs = generated(pair, **asked, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(ours.scores) == len(ours.logits) == 12
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(ours[name]), torch.stack(theirs[name]), rtol=1e-4, atol=1e-4)
    plain, whole = generated(pair, return_dict_in_generate=True)
    names = ["past_key_values" if name == "cache" else name for name in whole]  # its name since transformers 5.24
    assert list(plain) == names == ["sequences", "past_key_values"]


def test_scores_end_with_the_text(pair: tuple[Any, Any]) -> None:
    ends = pair[0].generate(IDS[:1], max_new_tokens=12, eos_token_id=[])[0, 7].item()
    out = pair[0].generate(
        IDS[:1], max_new_tokens=12, eos_token_id=ends, return_dict_in_generate=True, output_scores=True
    )
    assert len(out.scores) == out.sequences.shape[1] - IDS.shape[1] <= 3


@pytest.mark.parametrize("sample", [False, True])
def test_transformers_processors_and_criteria_serve(pair: tuple[Any, Any], sample: bool) -> None:
    class Length(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids.sum(1) > 150

    processors = transformers.LogitsProcessorList(
        [
            transformers.SuppressTokensLogitsProcessor([5, 9, 7]),
            transformers.RepetitionPenaltyLogitsProcessor(1.4),
            transformers.SequenceBiasLogitsProcessor([[[3], 2.5]]),
        ]
    )
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(14), Length()])
    asked = {"attention_mask": torch.ones_like(IDS), "do_sample": sample, "temperature": 1.5, "eos_token_id": 0}
    ours, theirs = generated(pair, logits_processor=processors, stopping_criteria=criteria, **asked)
    assert ours.tolist() == theirs.tolist()
    assert not {5, 9, 7} & set(ours[:, 5:].flatten().tolist())
    plain, _ = generated(pair, logits_processor=[], stopping_criteria=[])
    assert plain.tolist() == generated(pair)[0].tolist()


def test_one_answer_ends_all_rows(pair: tuple[Any, Any]) -> None:
    out = pair[0].generate(IDS, max_new_tokens=12, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 8])
    assert out.shape == (2, 8)


def test_drafts_go_without_what_looks_at_single_tokens(pair: tuple[Any, Any]) -> None:
    for asked in ({"logits_processor": [lambda ids, logits: logits]}, {"return_dict_in_generate": True}):
        with pytest.raises(RequestError, match=r"drafts are checked together.*; seed, which only neoquant knows"):
            pair[0].generate(IDS[:1], max_new_tokens=2, prompt_lookup_num_tokens=3, seed=1, **asked)


def test_settings_may_be_changed(tiny_model: Path, tmp_path: Path) -> None:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model)
    config = model.generation_config
    config.max_new_tokens, config.min_p, config.use_cache = 3, 0.1, True
    assert model.generate([[1, 2]]).shape == (1, 5)
    config.num_beams = 4
    assert (config.num_beams, config.use_cache, config.penalty_alpha, config.low_memory) == (4, True, None, None)
    other = copy.deepcopy(config)
    model.save_pretrained(tmp_path / "saved")
    assert '"num_beams": 4' in (tmp_path / "saved" / "generation_config.json").read_text()
    expected = model.to_transformers().generate(torch.tensor([[1, 2]]))
    assert torch.equal(model.generate([[1, 2]]), expected) and expected.shape == (1, 5)
    config.num_beams = None
    assert other.num_beams == 4 and config.to_dict().get("num_beams") is None
    assert model.generate([[1, 2]], generation_config=other, num_beams=1).shape == (1, 5)
    with pytest.raises(RequestError, match=r"no setting 'max_new_token'; did you mean 'max_new_tokens'\?"):
        config.max_new_token = 3
    with pytest.raises(RequestError, match="min_p is 'a'; legal is a finite number"):
        config.min_p = "a"
    with pytest.raises(AttributeError, match="no setting 'colour'"):
        _ = config.colour


@pytest.mark.parametrize("name", ["min_p", "no_repeat_ngram_size"])
def test_illegal_values_are_named(pair: tuple[Any, Any], name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is -1; legal is"):
        pair[0].generate(IDS, max_new_tokens=1, **{name: -1})


def stated_by(kind: Any, asked: dict[str, Any]) -> Any:
    config = kind()
    for name, value in asked.items():
        setattr(config, name, value)
    return config


THERE: list[dict[str, Any]] = [
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.4},
    {"num_beams": 2, "do_sample": True, "temperature": 0.7, "no_repeat_ngram_size": 2},
    {"guidance_scale": 1.5},
    {"typical_p": 0.4, "do_sample": True},
    {"sequence_bias": [[[5], 3.0]], "renormalize_logits": True},
    {"forced_eos_token_id": 4, "begin_suppress_tokens": [3]},
    {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 2},
]


@pytest.mark.parametrize("asked", THERE, ids=lambda asked: next(iter(asked)))
@pytest.mark.parametrize("by", ["words", "ours", "theirs", "the model"])
def test_what_only_transformers_does_it_does_with_the_same_tensors(
    pair: tuple[Any, Any], asked: dict[str, Any], by: str
) -> None:
    """However it is asked for, it is what transformers' own model makes."""
    rows = slice(0, 1) if "prompt_lookup_num_tokens" in asked else slice(None)
    plain = {"max_new_tokens": 6, "pad_token_id": 0}
    given = {"attention_mask": MASK[rows] | (rows.stop == 1)}
    torch.manual_seed(4)
    expected = pair[1].generate(IDS[rows], **given, **plain, **asked)
    model = copy.deepcopy(pair[0])
    torch.manual_seed(4)
    if by == "words":
        found = model.generate(IDS[rows], **given, **plain, **asked)
    elif by == "the model":
        model.generation_config = stated_by(neoquant.GenerationConfig, plain | asked)
        found = model.generate(IDS[rows], **given)
    else:
        kind = neoquant.GenerationConfig if by == "ours" else transformers.GenerationConfig
        found = model.generate(IDS[rows], **given, generation_config=stated_by(kind, plain | asked))
    assert torch.equal(found, expected)


def test_outputs_of_each_step_are_transformers(pair: tuple[Any, Any]) -> None:
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: [3, 7, 11 + row]}
    embedded = {"inputs_embeds": pair[1].get_input_embeddings()(IDS).detach(), "attention_mask": MASK}
    for prompt in ({"inputs": IDS, "attention_mask": MASK, **allowed}, embedded):
        ours, theirs = (
            model.generate(**prompt, **options, max_new_tokens=3, pad_token_id=0, eos_token_id=None) for model in pair
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        for name in ("attentions", "hidden_states"):
            for mine, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, other, strict=True))


def test_a_helper_of_ours_guesses_there_too(pair: tuple[Any, Any]) -> None:
    given = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "num_beams": 1}
    alone = pair[0].generate(IDS[:1], **given)
    found = pair[0].generate(IDS[:1], **given, assistant_model=pair[0], logits_processor=[lambda ids, logits: logits])
    assert torch.equal(found, alone)


def test_what_transformers_cannot_do_either_is_said(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"num_beams is 3; .*; seed, which only neoquant knows, does not go with it"):
        pair[0].generate(IDS, num_beams=3, seed=2)
    with pytest.raises(RequestError, match=r"num_beams is 3; .*; past_key_values of neoquant's do not go with it"):
        pair[0].generate(IDS, num_beams=3, past_key_values=KVCache.of(pair[0].config))
    for words, repository in (
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive-search"), ({"num_beam_groups": 2}, "group-beam-search"),
        ({"dola_layers": "low"}, "dola"), ({"force_words_ids": [[3]], "num_beams": 2}, "constrained-beam-search"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=f"custom_generate='transformers-community/{repository}"):
            pair[0].generate(IDS, **words)
    monkeypatch.setitem(sys.modules, "neoquant.transformers", None)
    with pytest.raises(RequestError, match=r"num_beams is 3; .*; to_transformers needs the package transformers"):
        pair[0].generate(IDS, num_beams=3)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"suppress_tokens": [3, 9, 5]},
        {"bad_words_ids": [[5, 9], [3], [9, 5, 9], [0]]},
        {"bad_words_ids": [[5], [28, 28, 28, 28, 28]], "suppress_tokens": [1], "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_words_that_may_not_come_are_transformers(pair: tuple[Any, Any], sample: bool, asked: dict[str, Any]) -> None:
    whole = {"attention_mask": torch.ones_like(IDS), "eos_token_id": 0, "do_sample": sample}
    ours, theirs = generated(pair, **whole, **asked)
    assert ours.tolist() == theirs.tolist()


@settings(deadline=None, max_examples=60)
@given(
    seen=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=4),
)
def test_no_word_becomes_complete(seen: list[int], words: list[list[int]]) -> None:
    kept = without_words(torch.zeros(1, 4), torch.tensor([seen]), words)[0]
    for token in range(4):
        text = [*seen, token]
        assert bool(kept[token] == 0) != any(text[-len(word) :] == word for word in words)


@pytest.mark.parametrize("sample", [False, True])
def test_a_text_goes_on_from_what_was_computed(pair: tuple[Any, Any], sample: bool) -> None:
    """The same ids as from the beginning, and what the cache holds is not computed again."""
    model, asked = pair[0], {"max_new_tokens": 6, "eos_token_id": None, "do_sample": sample}
    first = model.generate(IDS[:1], return_dict_in_generate=True, seed=1, **asked)
    assert first.past_key_values.length == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, torch.tensor([[7, 2]])], dim=1)
    computed = []
    hook = model.transformer.wte.register_forward_hook(lambda module, inputs, rows: computed.append(rows.shape[1]))
    on = model.generate(longer, past_key_values=first.past_key_values, seed=2, **asked)
    hook.remove()
    assert on.tolist() == model.generate(longer, seed=2, **asked).tolist()
    assert computed == [3, 1, 1, 1, 1, 1]
    assert first.past_key_values.length == on.shape[1] - 1


def test_what_was_computed_is_given_where_no_row_ended_before_the_others(pair: tuple[Any, Any]) -> None:
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "attention_mask": MASK}
    whole = pair[0].generate(IDS, **asked, eos_token_id=None)
    longer = torch.cat([whole.sequences, torch.tensor([[7], [2]])], dim=1)
    mask = torch.cat([MASK, MASK.new_ones(2, 5)], dim=1)
    again = {"attention_mask": mask, "max_new_tokens": 3, "eos_token_id": None}
    on = pair[0].generate(longer, past_key_values=whole.past_key_values, **again)
    assert on.tolist() == pair[0].generate(longer, **again).tolist()
    assert pair[0].generate(IDS, **asked, eos_token_id=0).past_key_values is None


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("ends", [None, 0])
def test_padding_on_the_right_has_scores_too(pair: tuple[Any, Any], rows: int, ends: int | None) -> None:
    """Only the cache goes without: what it would hold stands in another order."""
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])[:rows]
    asked = {"attention_mask": mask, "max_new_tokens": 4, "eos_token_id": ends, "pad_token_id": 0}
    whole = pair[0].generate(IDS[:rows], return_dict_in_generate=True, output_scores=True, **asked)
    assert whole.sequences.tolist() == pair[0].generate(IDS[:rows], **asked).tolist()
    assert len(whole.scores) == whole.sequences.shape[1] - 5 and whole.past_key_values is None
    for row, kept in enumerate(mask.sum(1).tolist()):
        alone = pair[0].generate(IDS[row : row + 1, :kept], max_new_tokens=1, eos_token_id=ends)
        assert whole.sequences[row, 5] == alone[0, -1]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ({"input_ids": IDS}, r"are what a tokenizer gives, which is unpacked: generate\(\*\*inputs\)"),
        ("a text", r"input_ids are 'a text': .* as a tokenizer makes them"),
        ([[1, 2], [3]], r"input_ids are \[\[1, 2\], \[3\]\]: .* lists of equal lengths"),
        (torch.ones(1, 3), r"input_ids are torch\.float32 \[1, 3\]; legal are token ids int64 or int32"),
        (torch.tensor([[True]]), r"input_ids are torch\.bool"),
        (torch.tensor(5), r"input_ids are torch\.int64 \[\]"),
        (torch.ones(1, 2, 3, dtype=torch.int64), r"input_ids are torch\.int64 \[1, 2, 3\]"),
        ([[5, 29]], "input_ids hold 29; the model's tokens are 0 to 28"),
        ([[5, -100]], "input_ids hold -100; the model's tokens are 0 to 28"),
    ],
)
def test_what_are_no_ids_is_said(pair: tuple[Any, Any], ids: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pair[0].generate(ids, max_new_tokens=2, pad_token_id=None)


@pytest.mark.parametrize("beams", [0, -1, 1.5, "2", True])
def test_what_is_no_number_of_beams_is_said(pair: tuple[Any, Any], beams: Any) -> None:
    with pytest.raises(RequestError, match=r"num_beams is .*; legal is an integer of at least 1"):
        pair[0].generate(IDS, num_beams=beams, max_new_tokens=2)


def test_padding_may_be_no_token(pair: tuple[Any, Any]) -> None:
    asked = {"max_new_tokens": 4, "eos_token_id": None}
    plain = pair[0].generate(IDS, attention_mask=MASK, **asked)
    outside = pair[0].generate(IDS.where(MASK.bool(), -1), attention_mask=MASK, **asked)
    assert outside[:, 5:].tolist() == plain[:, 5:].tolist()


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 2}])
def test_a_request_that_leaves_no_token_is_named(pair: tuple[Any, Any], drafts: dict[str, int]) -> None:
    asked = {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(5, 29)), "max_new_tokens": 8}
    message = r"new token 6 cannot .*: no_repeat_ngram_size=1 and suppress_tokens \(24 of them\) rule out all 29 tokens"
    with pytest.raises(RequestError, match=message):
        pair[0].generate(torch.tensor([[6]]), eos_token_id=None, **asked, **drafts)


@pytest.mark.parametrize("look_every", [1, 5])
def test_rows_of_a_given_cache_go_on_together(pair: tuple[Any, Any], look_every: int) -> None:
    """Padding on the left, one row that ends before the other, and more that was computed than is kept."""
    model = pair[0]
    cache = KVCache.of(model.config)
    alone = list(stream(model, IDS, attention_mask=MASK, max_new_tokens=12, sampling=Sampling(), look_every=1))
    end = int(alone[4][0])
    ends = Sampling(eos_token_ids=(end, int(alone[7][1])), pad_token_id=0)
    plain = list(stream(model, IDS, attention_mask=MASK, max_new_tokens=12, sampling=ends))
    ids = list(
        stream(model, IDS, attention_mask=MASK, max_new_tokens=12, sampling=ends, cache=cache, look_every=look_every)
    )
    assert [each.tolist() for each in ids] == [each.tolist() for each in plain]
    assert cache.length == IDS.shape[1] + len(ids) - 1
    longer = torch.cat([IDS, torch.stack(ids, 1), torch.tensor([[4], [6]])], dim=1)
    mask = torch.cat([MASK, MASK.new_ones(2, len(ids) + 1)], dim=1)
    again = model.generate(longer, attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    on = model.generate(longer, attention_mask=mask, max_new_tokens=4, eos_token_id=None, past_key_values=cache)
    assert on.tolist() == again.tolist()


def test_caches_that_do_not_fit_are_refused(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    cache = model.generate(IDS[:1], max_new_tokens=3, return_dict_in_generate=True).past_key_values
    for ids, kept, words in (
        (IDS[:1], cache, "holds 7 positions, input_ids has 5"),
        (IDS.repeat(1, 2), cache, "is of 1 row, input_ids has 2"),
        (IDS, transformers.DynamicCache(), "past_key_values is of type DynamicCache"),
    ):
        with pytest.raises(RequestError, match=words):
            model.generate(ids, past_key_values=kept, max_new_tokens=2)
    mask = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(RequestError, match="padding stands before"):
        empty = KVCache.of(model.config)
        model.generate(IDS[:1, :4], attention_mask=mask, past_key_values=empty, max_new_tokens=2)
    with pytest.raises(RequestError, match="go without"):
        model.generate(IDS[:1].repeat(1, 2), past_key_values=cache, prompt_lookup_num_tokens=2, max_new_tokens=2)


def test_what_is_handed_over_is_the_model_as_it_is_now(tiny_model: Path) -> None:
    """transformers' model is kept between calls, and never a former state's. The oracle is one made for the call."""
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model)
    beams = {"num_beams": 2, "max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}

    def scores() -> torch.Tensor:
        found, expected = (
            each.generate(torch.tensor([[1, 2, 3]]), **beams) for each in (model, model.to_transformers())
        )
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.sequences_scores, expected.sequences_scores)
        return found.sequences_scores

    def step() -> None:
        torch.optim.SGD(model.parameters(), 0.5).step()

    def other_embedding() -> None:
        weight = model.transformer.wte.weight.detach().flip(0)
        model.transformer.wte.weight = torch.nn.Parameter(weight)
        model.tie_weights()

    def other_type() -> None:
        model.to(torch.bfloat16)

    def more_tokens() -> None:
        model.resize_token_embeddings(model.config.vocab_size + 5)

    def quantized_layer() -> None:
        inner = model.transformer.h[0].mlp
        inner.c_fc, inner.c_proj = copy.deepcopy(inner.c_fc), copy.deepcopy(inner.c_proj)
        with torch.no_grad():
            inner.c_fc.weight.mul_(2)

    seen = [scores(), scores()]
    assert torch.equal(*seen)
    model.train()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    model.eval()
    for change in (step, other_embedding, quantized_layer, more_tokens, other_type):
        change()
        seen.append(scores())
        assert not torch.equal(seen[-1].float(), seen[-2].float()), change.__name__
    model.generation_config.num_beams = model.generation_config.num_return_sequences = 2
    assert scores().shape == (2,)
    model.config.window_size = 2
    model.generate([[1, 2, 3]], num_beams=2, max_new_tokens=2)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.ln_f.weight.mul_(3)
    asked = {"num_beams": 2, "max_new_tokens": 6}
    expected = twin.to_transformers().generate(torch.tensor([[1, 2, 3]]), **asked)
    assert torch.equal(twin.generate([[1, 2, 3]], **asked), expected)


def test_a_model_that_handed_over_is_forgotten_with_it(tiny_model: Path) -> None:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(tiny_model)
    model.generate([[1, 2]], num_beams=2, max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
