"""What a folder says about generating, against transformers on the same folder: every way to generate obeys it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.errors import ConfigError, NeoquantError, RequestError
from neoquant.generation.generate import Sampling

transformers = pytest.importorskip("transformers")

PROMPT = "def mean("
IDS = torch.tensor([[5, 9, 2, 30, 8]])


def settle(folder: Path, settings: dict[str, Any] | None, **config: Any) -> Path:
    """Write a folder's generation_config.json (None: there is none), and more words into its config.json."""
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if settings is not None:
        path.write_text(json.dumps(settings))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def both(folder: Path) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return neoquant.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), theirs


def generated(model: Any, ids: torch.Tensor, **asked: Any) -> Any:
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ids, **asked).tolist()


def free_ids(folder: Path, prompt: torch.Tensor, new: int = 20) -> list[int]:
    model = neoquant.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids: list[int] = model.generate(prompt, max_new_tokens=new, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    return ids


WORDS: list[dict[str, Any]] = [
    {},
    {"max_length": 12},
    {"max_new_tokens": 6, "max_length": 30},
    {"repetition_penalty": 1.8, "max_new_tokens": 18},
    {"do_sample": True, "temperature": 0.6, "top_k": 7, "max_new_tokens": 15},
    {"do_sample": True, "top_k": 0, "top_p": 0.7, "max_new_tokens": 15},
    {"temperature": 0.5, "top_p": 0.3},  # without do_sample, they choose nothing
    {"min_new_tokens": 9, "eos_token_id": [17, 99, 3], "max_new_tokens": 22},
    {"min_length": 19, "eos_token_id": 0, "max_length": 26},
    {"eos_token_id": [0, 1], "pad_token_id": 1, "bos_token_id": 4},
    {"length_penalty": 2.0, "early_stopping": True, "use_cache": False, "renormalize_logits": True},
    {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5},
]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("words", WORDS, ids=lambda words: ",".join(words) or "nothing")
def test_words_in_either_file_are_obeyed_as_transformers_obeys_them(
    make_model: Callable[..., Path], words: dict[str, Any], where: str
) -> None:
    in_config = where == "config.json"
    folder = settle(make_model(dtype="float32"), None if in_config else words, **(words if in_config else {}))
    ours, theirs = both(folder)
    for asked in ({}, {"max_new_tokens": 4}, {"do_sample": True, "temperature": 2.0}, {"do_sample": None}):
        if asked == {"do_sample": None} and "num_return_sequences" in words:
            continue  # several greedy rows: neither does it
        assert generated(ours, IDS, **asked) == generated(theirs, IDS, **asked), asked


def test_where_both_files_speak_only_generation_config_counts(make_model: Callable[..., Path]) -> None:
    folder = settle(make_model(dtype="float32"), {"max_new_tokens": 9}, repetition_penalty=3.0, eos_token_id=17)
    ours, theirs = both(folder)
    assert ours.generation_config.to_dict() == {"max_new_tokens": 9}
    assert generated(ours, IDS) == generated(theirs, IDS)


def test_none_takes_back_what_the_folder_says(make_model: Callable[..., Path]) -> None:
    words = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.9}
    folder = settle(make_model(dtype="float32"), {**words, "eos_token_id": 0, "max_new_tokens": 12})
    ours, theirs = both(folder)
    for name in (*words, "eos_token_id", "max_new_tokens"):
        assert generated(ours, IDS, **{name: None}) == generated(theirs, IDS, **{name: None}), name


@pytest.mark.parametrize("as_list", [False, True])
def test_every_way_to_generate_ends_at_the_folders_end_of_text(
    make_model: Callable[..., Path], cli: Any, as_list: bool
) -> None:
    folder = settle(make_model(dtype="float32"), {"do_sample": False})
    model, tokenizer = neoquant.load(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    free = free_ids(folder, prompt)
    at = next(n for n in range(2, 20) if free[n] not in free[:n] and free[n] not in prompt)
    settle(folder, {"do_sample": False, "eos_token_id": [258, free[at]] if as_list else free[at]})
    expected = tokenizer.decode(free[:at])

    model, tokenizer = neoquant.load(folder)
    assert model.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :].tolist() == free[: at + 1]
    assert neoquant.generate_text(model, tokenizer, PROMPT, max_new_tokens=20) == expected
    pipe = neoquant.pipeline("text-generation", folder)
    (result,) = pipe(PROMPT, max_new_tokens=20, return_full_text=False)
    (theirs,) = transformers.pipeline("text-generation", str(folder), dtype=torch.float32)(
        PROMPT, max_new_tokens=20, return_full_text=False
    )
    assert result == theirs
    shown = cli("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert (shown.code, shown.out) == (0, PROMPT + expected + "\n")
    assert cli("chat", folder, "--max-new-tokens", 16, stdin=PROMPT + "\n").out == expected + "\n"


def test_options_of_the_command_line_count_before_the_folder(make_model: Callable[..., Path], cli: Any) -> None:
    folder = settle(make_model(dtype="float32"), {"repetition_penalty": 1.9, "max_new_tokens": 3, "eos_token_id": 0})
    model, tokenizer = neoquant.load(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids

    def new(**asked: Any) -> str:
        return tokenizer.decode(model.generate(prompt, **asked)[0, prompt.shape[1] :])

    def shown(*words: object) -> str:
        result = cli("generate", folder, "--prompt", PROMPT, *words)
        assert result.code == 0, result
        return str(result.out.removeprefix(PROMPT).removesuffix("\n"))

    assert shown("--greedy") == new()
    assert shown("--greedy", "--max-new-tokens", 9) == new(max_new_tokens=9)
    plain = new(max_new_tokens=9, repetition_penalty=1.0)
    assert plain != new(max_new_tokens=9)
    assert shown("--greedy", "--max-new-tokens", 9, "--repetition-penalty", 1) == plain
    sampled = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "seed": 4}
    assert shown("--seed", 4) == new(**sampled)
    assert shown("--seed", 4, "--top-k", 5) == new(**{**sampled, "top_k": 5})


BEAMS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"begin_suppress_tokens": [3]},
    {"penalty_alpha": 0.6, "top_k": 4},
]


@pytest.mark.parametrize("words", BEAMS, ids=lambda words: next(iter(words)))
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_what_is_not_done_is_refused_when_it_is_asked_for(
    make_model: Callable[..., Path], cli: Any, words: dict[str, Any], where: str
) -> None:
    in_config = where == "config.json"
    folder = settle(make_model(dtype="float32"), None if in_config else words, **(words if in_config else {}))
    model, tokenizer = neoquant.load(folder)  # to be evaluated, or quantized, it may be as it is
    name, value = next(iter(words.items()))
    message = f"the model's generation settings: {name} is .*; neoquant generates with .* only"
    if name == "penalty_alpha":  # code of the hub does it
        with pytest.raises(
            RequestError, match=message + ".*custom_generate='transformers-community/contrastive-search'"
        ):
            model.generate(IDS)
    else:
        assert torch.equal(model.generate(IDS), model.to_transformers().generate(torch.as_tensor(IDS)))
    with pytest.raises(RequestError, match=f"{name} is"):
        neoquant.generate_text(model, tokenizer, PROMPT)
    with pytest.raises(RequestError, match=message):
        neoquant.pipeline("text-generation", folder)(PROMPT)
    assert model.generate(IDS, **{name: None}).shape[0] == 1
    result = cli("generate", folder, "--prompt", PROMPT)
    assert result.code == 2 and f"{name} is {value!r}" in result.error
    searched = name in ("num_beams", "penalty_alpha")
    assert ("--greedy or --temperature" in result.error) == searched
    assert (cli("generate", folder, "--prompt", PROMPT, "--greedy").code == 0) == searched
    model.save_pretrained(folder.parent / "saved")
    assert words.items() <= json.loads((folder.parent / "saved" / "generation_config.json").read_text()).items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; legal is a finite number"),
        ({"max_length": 2.5}, "max_length is 2.5; legal is an integer"),
        ({"eos_token_id": ["a"]}, r"eos_token_id is \['a'\]; legal is (an integer of 64 bits|null or a token)"),
        ({"eos_token_id": 10**30}, "eos_token_id is 10{30}; legal is (an integer of 64 bits|null or a token)"),
        ({"temperature": 10**400}, "temperature is 10{400}; legal is a finite number"),
        ({"top_p": float("nan")}, "top_p is nan; legal is a finite number"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; legal is true or false"),
        ({"stop_strings": [1]}, r"stop_strings is \[1\]; legal is a text or a list of them"),
    ],
)
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_values_of_other_types_are_named_with_their_file(
    make_model: Callable[..., Path], words: dict[str, Any], message: str, where: str
) -> None:
    in_config = where == "config.json"
    folder = settle(make_model(), None if in_config else words, **(words if in_config else {}))
    with pytest.raises(ConfigError, match=message) as caught:
        neoquant.load(folder)
    assert where in str(caught.value)


def test_a_text_without_a_prompt_begins_as_the_folder_says(make_model: Callable[..., Path]) -> None:
    ours, theirs = both(settle(make_model(dtype="float32"), {"bos_token_id": 7, "max_new_tokens": 3}))
    assert ours.generate().tolist() == theirs.generate(do_sample=False).tolist()
    ours.generation_config = ours.generation_config.unset(["bos_token_id"])
    ours.config.bos_token_id = None
    with pytest.raises(RequestError, match="no bos_token_id"):
        ours.generate()


PADDED = torch.tensor([[1, 1, 1, 5, 9, 2], [30, 8, 11, 4, 4, 7], [1, 20, 21, 1, 22, 23]])


@pytest.mark.parametrize("eos", [None, 2, [2, 3], 1, [3, 1]])
@pytest.mark.parametrize("pad", [None, 1])
@pytest.mark.filterwarnings("ignore:rows begin or end")
def test_a_mask_that_nobody_gave_is_inferred_as_transformers_does(
    make_model: Callable[..., Path], eos: int | list[int] | None, pad: int | None
) -> None:
    words = {"eos_token_id": eos, "pad_token_id": pad, "max_new_tokens": 8}
    ours, theirs = both(settle(make_model(dtype="float32"), words))
    assert generated(ours, PADDED) == generated(theirs, PADDED)


def test_padding_that_may_be_text_is_warned_about(make_model: Callable[..., Path]) -> None:
    model, _ = both(make_model(dtype="float32"))
    ids = torch.tensor([[0, 0, 5], [3, 4, 5]])
    with pytest.warns(UserWarning, match="without an attention_mask: it counts as text here"):
        model.generate(ids, max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, torch.tensor([[0, 0, 1], [1, 1, 1]]), max_new_tokens=1)
        model.generate(torch.tensor([[0, 4, 5], [0, 7, 8]]), max_new_tokens=1)  # all texts begin so
        model.generate(torch.tensor([[0, 4, 5]]), max_new_tokens=1)
    assert model.generate([[7]], max_new_tokens=2, pad_token_id=7, eos_token_id=3).shape == (1, 3)


@pytest.mark.parametrize("given", [("token_type_ids",), ("position_ids",), ("token_type_ids", "position_ids")])
def test_token_types_and_positions_have_their_effect(make_model: Callable[..., Path], given: tuple[str, ...]) -> None:
    ours, theirs = both(make_model(dtype="float32"))
    ids = torch.tensor([[5, 9, 2, 30], [8, 8, 3, 1]])
    tensors = {"token_type_ids": ids % 3, "position_ids": torch.tensor([[2, 3, 4, 5], [0, 1, 4, 9]])}
    asked = {name: tensors[name] for name in given}
    options = {"max_new_tokens": 9, "eos_token_id": None, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    found = generated(ours, ids, **asked, **options)
    assert found == generated(theirs, ids, **asked, **options)
    assert found != generated(ours, ids, **options)
    with pytest.raises(RequestError, match=rf"{given[0]} is \[1, 2\], but input_ids is \[2, 4\]"):
        ours.generate(ids, **{given[0]: torch.zeros(1, 2, dtype=torch.long)})


def test_padding_outside_the_vocabulary_changes_nothing(make_model: Callable[..., Path]) -> None:
    model, _ = both(make_model(dtype="float32"))
    ids, mask = torch.tensor([[900, 5, 9], [3, 4, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = model.generate(ids, mask, max_new_tokens=5, eos_token_id=[], pad_token_id=900)
    assert found[0, 3:].tolist() == model.generate([[5, 9]], max_new_tokens=5, eos_token_id=[])[0, 2:].tolist()
    end = int(found[1, 3])
    ended = model.generate(ids, mask, max_new_tokens=5, eos_token_id=end, pad_token_id=900)
    assert set(ended[1, 4:].tolist()) <= {900}


# Query the tiny model for texts that stop strings of every position will be cut from.
@pytest.mark.parametrize("begins", [0, 1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_may_begin_in_the_prompt(make_model: Callable[..., Path], begins: int, length: int) -> None:
    folder = settle(make_model(dtype="float32"), {"max_new_tokens": 12})
    ours, theirs = both(folder)
    tokenizer = neoquant.load_tokenizer(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("abc def", return_tensors="pt").input_ids
    whole = tokenizer.convert_ids_to_tokens(ours.generate(prompt, eos_token_id=[])[0])
    at = prompt.shape[1] - begins
    stop = tokenizer.decode([tokenizer.backend.token_to_id(token) for token in whole[at : at + length]])
    for stops in ([stop], ["never", stop], stop):
        options = {"stop_strings": stops, "eos_token_id": None}
        found = ours.generate(prompt, tokenizer=tokenizer, **options).tolist()
        assert found == generated(theirs, prompt, tokenizer=their_tokenizer, pad_token_id=0, **options)


def test_stop_strings_of_the_folder_and_of_padded_rows(make_model: Callable[..., Path], cli: Any) -> None:
    folder = settle(make_model(dtype="float32"), {"do_sample": False})
    model, tokenizer = neoquant.load(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = tokenizer.decode(free_ids(folder, prompt))
    stop = next(text[n] for n in range(2, len(text)) if text[n] not in text[:n] + PROMPT and text[n] != "\ufffd")
    settle(folder, {"do_sample": False, "stop_strings": stop, "max_new_tokens": 20})
    model, tokenizer = neoquant.load(folder)
    expected = text[: text.index(stop) + 1]
    assert neoquant.generate_text(model, tokenizer, PROMPT) == expected
    assert cli("generate", folder, "--prompt", PROMPT).out == PROMPT + expected + "\n"
    with pytest.raises(RequestError, match="pass tokenizer="):
        model.generate(prompt)
    alone = model.generate(prompt, tokenizer=tokenizer)[0, prompt.shape[1] :]
    both_sides = torch.nn.functional.pad(prompt, (2, 1))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (2, 1))
    padded = model.generate(both_sides, mask, tokenizer=tokenizer)[0, both_sides.shape[1] :]
    assert padded.tolist() == alone.tolist()
    with pytest.raises(RequestError, match="an empty text"):
        model.generate(prompt, tokenizer=tokenizer, stop_strings=["", "x"])


def test_rows_of_a_batch_stop_as_transformers_stops_them(make_model: Callable[..., Path]) -> None:
    folder = settle(make_model(dtype="float32"), {"max_new_tokens": 14})
    ours, theirs = both(folder)
    tokenizer, reader = neoquant.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[5, 9, 2, 30], [70, 71, 72, 73], [40, 41, 42, 43]])
    stops = [tokenizer.decode(free_ids(folder, row[None])[3:5]) for row in ids[:2]]
    for more in ({"eos_token_id": 258, "pad_token_id": 1}, {"eos_token_id": None}):
        options = {"attention_mask": torch.ones_like(ids), "stop_strings": stops, **more}
        expected = generated(theirs, ids, tokenizer=reader, **options)
        assert generated(ours, ids, tokenizer=tokenizer, **options) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"do_sample": True, "top_p": 0.5}])
def test_predictions_that_are_not_finite_are_an_error(
    make_model: Callable[..., Path], cli: Any, value: float, options: dict[str, Any]
) -> None:
    folder = make_model(dtype="float32")
    model, tokenizer = neoquant.load(folder)
    with torch.no_grad():
        model.transformer.wpe.weight[7:] = value  # a text of 9 tokens is continued from there
    message = "new token {} cannot be chosen: the model's predictions, computed in float32, are not finite"
    with pytest.raises(NeoquantError, match=message.format(1)):
        model.generate(torch.arange(1, 9)[None], **options)
    with pytest.raises(NeoquantError, match=message.format(4)):
        model.generate(torch.arange(1, 6)[None], eos_token_id=[], **options)
    with pytest.raises(NeoquantError, match="not finite"):
        neoquant.generate_text(model, tokenizer, PROMPT)
    ended = model.generate([[5, 6], [7, 8]], max_new_tokens=8, eos_token_id=list(range(259)), **options)
    assert ended.shape == (2, 3)  # nobody asks for what follows an end of text
    model.save_pretrained(folder.parent / "broken")
    tokenizer.save_pretrained(folder.parent / "broken")
    for verb, words, stdin in (("generate", ("--prompt", PROMPT), None), ("chat", (), PROMPT + "\n")):
        result = cli(verb, folder.parent / "broken", *words, stdin=stdin)
        assert result.code == 1 and "Traceback" not in result.err
        assert "not finite (NaN or infinite); the weights may be damaged" in result.err


def test_float16_that_overflows_says_what_to_try(make_model: Callable[..., Path]) -> None:
    model = neoquant.AutoModelForCausalLM.from_pretrained(make_model(), dtype="float16")
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.fill_(60.0)
            block.mlp.c_proj.weight.fill_(60000.0)
    with pytest.raises(NeoquantError, match=r"float16 ends at 65504.*: load it with dtype bfloat16 or float32"):
        model.generate(IDS)


def test_sampling_of_ones_own_still_ends_at_the_folders_end_of_text(make_model: Callable[..., Path]) -> None:
    folder = settle(make_model(dtype="float32"), {"eos_token_id": list(range(259))})
    model, tokenizer = neoquant.load(folder)
    assert neoquant.generate_text(model, tokenizer, PROMPT, sampling=Sampling(temperature=0.5, seed=1)) == ""
    endless = Sampling(temperature=0.5, seed=1, eos_token_ids=())
    assert neoquant.generate_text(model, tokenizer, PROMPT, sampling=endless, max_new_tokens=9) != ""


def test_one_of_several_continuations_is_shown_and_the_command_says_so(
    make_model: Callable[..., Path], cli: Any
) -> None:
    folder = settle(make_model(dtype="float32"), {"do_sample": True, "num_return_sequences": 3})
    result = cli("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 3, "--seed", 1)
    assert result.code == 0 and "ask for 3 continuations: one is shown" in result.err
