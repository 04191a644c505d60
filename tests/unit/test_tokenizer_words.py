"""transformers' words for tokenizers: strides, words, places, chat templates, collators, as its own gives them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model

import neoquant
from neoquant.checkpoint.keywords import ANSWERED, WITHOUT_EFFECT
from neoquant.errors import RequestError

transformers = pytest.importorskip("transformers")

TEXTS = ["The cat sat on a mat, in Oslo.", "Größe: 😀 π", "a", " two  words"]
QUESTION = "who sat?"
CHAT = [{"role": "user", "content": "What is <b>?"}, {"role": "bot", "content": "A letter é."}]
SIMPLE = (
    "{% for message in messages %}{{ message.role + ': ' + message['content'] | trim }}\n{{ eos_token }}"
    "{% if loop.last and add_generation_prompt %}bot:{% endif %}{% endfor %}"
)
TEMPLATES = {
    "simple": SIMPLE,
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ tools | tojson if tools else 'none' }}",
    "blocks": (
        "{% for m in messages %}\n  {% if m.role == 'bot' %}\n  {% continue %}\n  {% endif %}\n"
        "{{ m.content }}\n{% endfor %}"
    ),
    "words": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }} {{ colour }}"
    ),
}


@pytest.fixture(scope="module", params=["bytes", "bundled"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and theirs of one folder, with a token that pads."""
    from neoquant.demo import MODEL

    folder = MODEL
    if request.param == "bytes":
        folder = write_tiny_model(tmp_path_factory.mktemp("words") / "model", vocab_size=262)
    ours = neoquant.AutoTokenizer.from_pretrained(folder)
    # transformers 4 gives token_type_ids as well where the folder names no columns.
    theirs = transformers.AutoTokenizer.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    ours.pad_token = theirs.pad_token = ours.eos_token
    return ours, theirs


def plain(value: Any) -> Any:
    if isinstance(value, dict | transformers.BatchEncoding):
        return {key: plain(each) for key, each in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize("overflowing", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{"padding": True}, {"padding": "max_length", "return_tensors": "pt"}, {}])
@pytest.mark.parametrize("stride", [0, 3])
def test_what_is_cut_off_goes_on_in_rows_that_overlap(
    both: tuple[Any, Any], stride: int, options: dict[str, Any], side: str, overflowing: bool
) -> None:
    asked = {"truncation": True, "max_length": 7, "stride": stride, "return_overflowing_tokens": overflowing}
    asked |= {"return_offsets_mapping": True, "return_length": True, "padding_side": side, **options}
    several = TEXTS[:2] if options or overflowing else TEXTS
    for text in (several, TEXTS[0]):
        ours, theirs = (tokenizer(text, **asked) for tokenizer in both)
        assert plain(ours) == plain(theirs)


@pytest.mark.parametrize("stride", [0, 4])
def test_long_contexts_of_a_question_are_transformers(both: tuple[Any, Any], stride: int) -> None:
    asked = {"truncation": "only_second", "max_length": 20, "stride": stride, "return_overflowing_tokens": True}
    ours, theirs = (tokenizer(QUESTION, TEXTS[0] * 3, padding=True, **asked) for tokenizer in both)
    assert plain(ours) == plain(theirs)


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4 puts no template around GPT-2's texts, and without one the library forgets padding and rows",
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_know_their_text(both: tuple[Any, Any], side: str) -> None:
    asked = {"truncation": "only_second", "max_length": 20, "stride": 4, "return_overflowing_tokens": True}
    for texts, options in (((QUESTION, TEXTS[0] * 3), asked), ((TEXTS,), {})):
        ours, theirs = (tokenizer(*texts, padding=True, padding_side=side, **options) for tokenizer in both)
        for row in range(len(ours.input_ids)):
            assert ours.sequence_ids(row) == theirs.sequence_ids(row)


@pytest.mark.parametrize("side", ["right", "left"])
def test_places_are_transformers_behind_padding_too(both: tuple[Any, Any], side: str) -> None:
    ours, theirs = (tokenizer(TEXTS, padding=True, padding_side=side) for tokenizer in both)
    for row, text in enumerate(TEXTS):
        assert ours.tokens(row) == theirs.tokens(row)
        assert ours.word_ids(row) == theirs.word_ids(row)
        for char in range(len(text)):
            place = ours.char_to_token(row, char)
            assert place == theirs.char_to_token(row, char)
            assert place is None or ours.token_to_chars(row, place) == theirs.token_to_chars(row, place)
    single, other = (tokenizer(TEXTS[0]) for tokenizer in both)
    assert single.word_ids() == other.word_ids() and single.char_to_token(5) == other.char_to_token(5)


@pytest.mark.parametrize("words", [["The", " cat"], [["a", "b"], ["The", " cat", "."]]])
def test_words_are_encoded_by_themselves(both: tuple[Any, Any], words: Any) -> None:
    ours, theirs = (tokenizer(words, is_split_into_words=True) for tokenizer in both)
    assert plain(ours) == plain(theirs)
    assert ours.word_ids() == theirs.word_ids()


def test_illegal_strides_are_named(both: tuple[Any, Any]) -> None:
    for stride in (-1, 7):
        with pytest.raises(RequestError, match=f"stride is {stride}; legal is 0 to less than the 7 tokens"):
            both[0](TEXTS, truncation=True, max_length=7, stride=stride)


def test_an_encoding_of_columns_knows_no_places(both: tuple[Any, Any]) -> None:
    with pytest.raises(RequestError, match="only what a tokenizer gave for texts"):
        both[0].pad({"input_ids": [1, 2]}).word_ids()


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_are_rendered_as_transformers_renders_them(both: tuple[Any, Any], name: str) -> None:
    tools = [{"name": "f", "about": "é <b>"}] if name == "json" else None
    for prompt in (False, True):
        asked = {"chat_template": TEMPLATES[name], "add_generation_prompt": prompt, "colour": "red", "tools": tools}
        for chat in (CHAT, CHAT[:1], [CHAT, CHAT[:1]]):
            ours, theirs = (each.apply_chat_template(chat, tokenize=False, **asked) for each in both)
            assert ours == theirs
    ours, theirs = (
        each.apply_chat_template([CHAT, CHAT[1:]], padding=True, return_tensors="pt", return_dict=True, **asked)
        for each in both
    )
    assert plain(ours) == plain(theirs)
    ours, theirs = (each.apply_chat_template(CHAT, return_dict=False, **asked) for each in both)
    assert ours == theirs


def test_the_folders_templates_are_taken(both: tuple[Any, Any], tmp_path: Path) -> None:
    both[0].save_pretrained(tmp_path)
    tokenizer = neoquant.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(RequestError, match="no chat template: give one"):
        tokenizer.apply_chat_template(CHAT)
    tokenizer.chat_template = {"default": "d{{ bos_token }}", "tool_use": "t", "other": "o"}
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = (
        neoquant.AutoTokenizer.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    for asked in ({}, {"chat_template": "other"}, {"tools": [{}]}):
        wanted = theirs.apply_chat_template(CHAT, tokenize=False, **asked)
        assert ours.apply_chat_template(CHAT, tokenize=False, **asked) == wanted
    tokenizer.chat_template = {"other": "o"}
    with pytest.raises(RequestError, match="its templates are other: give one"):
        tokenizer.apply_chat_template(CHAT)


THINKING = "{% for m in messages %}[{{ m.role }}]{{ m.thought or '' }}/{{ m.content }}<end>\n{% endfor %}"
PIECES = "{% for m in messages %}{% for piece in m.content %}{{ piece.text }}|{% endfor %}<end>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (SIMPLE, "plain"), (SIMPLE, "trimmed \n "), (THINKING, " kept  "), (THINKING, ""),
        (PIECES, [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}, {"type": "image"}]),
    ],
)  # fmt: skip
def test_the_last_message_can_be_gone_on_with(both: tuple[Any, Any], template: str, content: Any) -> None:
    first = {"role": "user", "content": [{"text": "a"}] if isinstance(content, list) else "plain"}
    chat = [first, {"role": "bot", "content": content}]
    asked = {"chat_template": template, "tokenize": False, "continue_final_message": True}
    ours, theirs = (each.apply_chat_template(chat, **asked) for each in both)
    assert ours == theirs and not ours.endswith("<end>\n")
    ours, theirs = (each.apply_chat_template([chat, chat[:1]], **asked) for each in both)
    assert ours == theirs


def test_what_cannot_be_gone_on_with_is_refused(both: tuple[Any, Any]) -> None:
    go_on = {"chat_template": SIMPLE, "continue_final_message": True}
    thought = [{"role": "bot", "content": "b", "thought": "hm"}]
    text = both[0].apply_chat_template(
        thought, chat_template=THINKING, continue_final_message="thought", tokenize=False
    )
    assert text == "[bot]hm"
    for chat, asked, message in (
        ([], {"chat_template": SIMPLE}, "the conversation is empty"),
        (CHAT, {**go_on, "add_generation_prompt": True}, "add_generation_prompt begins another"),
        ([{"role": "bot"}], go_on, "the last message has no such text"),
        (thought, {**go_on, "continue_final_message": "thought"}, "which the chat template leaves out"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            both[0].apply_chat_template(chat, **asked)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize("template", ["one {{ bos_token }}", {"default": "d", "other": "o"}, None], ids=str)
def test_templates_are_saved_where_transformers_saves_them(
    both: tuple[Any, Any], template: Any, files: bool, tmp_path: Path
) -> None:
    folders = []
    for place, each in enumerate(both):
        tokenizer = copy.deepcopy(each)
        tokenizer.chat_template = template
        folders.append(tmp_path / str(place))
        written = tokenizer.save_pretrained(folders[-1], save_jinja_files=files)
        assert {path.relative_to(folders[-1]) for path in folders[-1].rglob("*.jinja")} == {
            Path(name).relative_to(folders[-1]) for name in written if name.endswith(".jinja")
        }
    found = [{str(p.relative_to(f)): p.read_text() for p in f.rglob("*.jinja")} for f in folders]
    assert found[0] == found[1] and bool(found[0]) == (files and template is not None)
    for folder in folders:
        for package in (neoquant, transformers):
            assert package.AutoTokenizer.from_pretrained(folder).chat_template == template


def test_templates_stay_in_the_folder(both: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(both[0])
    for name in ("../../out", "a/b", "..", ""):
        tokenizer.chat_template = {"default": "a", name: "b"}
        with pytest.raises(RequestError, match="which is no file's name: save_jinja_files=False"):
            tokenizer.save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.iterdir())


def test_settings_of_other_tokenizers_may_ask_for_nothing(both: tuple[Any, Any], tmp_path: Path) -> None:
    both[0].save_pretrained(tmp_path)
    tokenizer = neoquant.AutoTokenizer.from_pretrained(tmp_path, do_lower_case=False, from_slow=None, errors="replace")
    assert tokenizer(TEXTS[0]) == both[0](TEXTS[0])
    with pytest.raises(RequestError, match="no setting 'do_lower_case'"):
        neoquant.AutoTokenizer.from_pretrained(tmp_path, do_lower_case=True)
    for name in ("padding_side", "truncation_side"):
        with pytest.raises(RequestError, match=f"{name} is 'middle'; legal are left and right"):
            neoquant.AutoTokenizer.from_pretrained(tmp_path, **{name: "middle"})


def test_unnamed_special_tokens_have_ids(both: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(both[0])
    token = tokenizer.convert_ids_to_tokens(3)
    tokenizer.extra_special_tokens_ids = [3]
    assert tokenizer.extra_special_tokens == [token] and tokenizer.extra_special_tokens_ids == [3]
    assert tokenizer.added_tokens_encoder == tokenizer.get_added_vocab() and tokenizer.pad_token_type_id == 0
    with pytest.raises(RequestError, match="extra_special_tokens_ids are"):
        tokenizer.extra_special_tokens_ids = [10**6]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "cannot be rendered"),
        ("{% for i in range(99999999) %}{% endfor %}", "cannot be rendered"),
        ("{{ messages + 1 }}", "cannot be rendered"),
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(both: tuple[Any, Any], template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        both[0].apply_chat_template(CHAT, chat_template=template)


def test_collators_of_transformers_make_the_same_batches(both: tuple[Any, Any]) -> None:
    made = []
    for tokenizer in both:
        rows = [dict(tokenizer(text)) for text in TEXTS]
        labelled = [{**row, "labels": [1] * len(row["input_ids"])} for row in rows]
        torch.manual_seed(0)
        made.append(
            [
                transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)([*rows]),
                transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)([*rows]),
                transformers.DataCollatorForTokenClassification(tokenizer)([*labelled]),
                transformers.DataCollatorForSeq2Seq(tokenizer)([*labelled]),
                tokenizer.get_special_tokens_mask(rows[0]["input_ids"], already_has_special_tokens=True),
            ]
        )
    assert list(map(plain, made[0])) == list(map(plain, made[1]))


def test_special_tokens_are_added_to_the_former_ones(both: tuple[Any, Any], tmp_path: Path) -> None:
    both[0].save_pretrained(tmp_path)
    tokenizer = neoquant.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<q>"]}) == 1
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<r>"]}, replace_extra_special_tokens=False) == 1
    assert tokenizer.additional_special_tokens == ["<q>", "<r>"]
    assert tokenizer.vocab["<r>"] == len(tokenizer) - 1 and tokenizer.is_fast
    with pytest.raises(RequestError, match="already_has_special_tokens=True"):
        tokenizer.get_special_tokens_mask([1])


@pytest.mark.parametrize("read", [neoquant.AutoTokenizer, neoquant.AutoConfig, neoquant.AutoModelForCausalLM])
def test_keywords_of_places_are_taken_or_answered_everywhere(tiny_model: Path, read: Any) -> None:
    neutral = {name: values[-1] for name, (values, _) in ANSWERED.items()}
    read.from_pretrained(tiny_model, **neutral, **dict.fromkeys(WITHOUT_EFFECT, True))
    with pytest.raises(RequestError, match="cache_dir='x' is not done here: set HF_HUB_CACHE"):
        read.from_pretrained(tiny_model, cache_dir="x")
    with pytest.raises(RequestError, match="colour"):
        read.from_pretrained(tiny_model, colour="red")


def test_transformers_name_of_the_source(tiny_model: Path) -> None:
    for read in (neoquant.AutoTokenizer, neoquant.GPT2Tokenizer):
        named = read.from_pretrained(pretrained_model_name_or_path=tiny_model)
        assert json.loads(named.backend.to_str()) == json.loads(read.from_pretrained(tiny_model).backend.to_str())
    model = neoquant.AutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=tiny_model, attn_implementation=None, quantization_config=None, dtype=None
    )
    assert model.attn_implementation == "sdpa"
    assert model.config.vocab_size == neoquant.AutoConfig.from_pretrained(tiny_model).vocab_size


def test_where_models_and_tokenizers_were_read_from(tiny_model: Path) -> None:
    for read in (neoquant.AutoTokenizer, neoquant.AutoModelForCausalLM, neoquant.GPTNeoModel):
        named = read.from_pretrained(tiny_model)
        theirs = getattr(transformers, read.__name__).from_pretrained(tiny_model)
        assert named.name_or_path == theirs.name_or_path == str(tiny_model)
        assert copy.deepcopy(named).name_or_path == str(tiny_model)
    quantized = neoquant.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config={"load_in_4bit": True})
    assert quantized.name_or_path == str(tiny_model) and neoquant.load(tiny_model)[1].name_or_path == str(tiny_model)
    config = neoquant.GPTNeoConfig(hidden_size=8, num_heads=1, num_layers=2, attention_types=[[["global"], 2]])
    assert neoquant.GPTNeoForCausalLM(config).name_or_path == ""


def test_what_was_found_is_given_beside_the_model(tiny_model: Path) -> None:
    with pytest.warns(neoquant.LoadWarning):
        model, info = neoquant.GPTNeoForTokenClassification.from_pretrained(tiny_model, output_loading_info=True)
    _, theirs = transformers.GPTNeoForTokenClassification.from_pretrained(tiny_model, output_loading_info=True)
    assert info["missing_keys"] == set(model.load_report.missing) == set(theirs["missing_keys"])
    assert not info["mismatched_keys"] and not info["error_msgs"]


@pytest.mark.parametrize("text", [None, "to be", ["to be", "or not"]])
@pytest.mark.parametrize("target", ["wird", ["wird", "so"]])
def test_targets_become_labels(both: tuple[Any, Any], text: Any, target: Any) -> None:
    ours, theirs = (dict(each(text, text_target=target, add_special_tokens=False)) for each in both)
    assert ours == theirs and ("labels" in ours) == (text is not None)
    with pytest.raises(RequestError, match="nothing to encode: give text, or text_target"):
        both[0]()


def test_a_tokenizer_is_made_of_vocabulary_and_merges(tmp_path: Path) -> None:
    """As contents or as files: ids are those that transformers' class gives of the same."""
    import tokenizers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 3, vocab_size=290, show_progress=False)
    trained.save_model(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text("utf-8").splitlines()[1:]]
    assert len(merges) > 10
    folder = neoquant.GPT2Tokenizer.from_pretrained(tmp_path)
    options: dict[str, Any] = {"add_prefix_space": True, "pad_token": "<pad>", "padding_side": "left"}
    files = {"vocab": tmp_path / "vocab.json", "merges": str(tmp_path / "merges.txt")}
    for given in ({"vocab": vocab, "merges": merges}, {"vocab": vocab, "merges": list(map(" ".join, merges))}, files):
        plain, changed = neoquant.GPT2Tokenizer(**given), neoquant.GPT2Tokenizer(**given, **options)
        assert plain(TEXTS)["input_ids"] == folder(TEXTS)["input_ids"]
        assert plain.special_tokens_map == folder.special_tokens_map
        assert changed("a").input_ids == plain(" a").input_ids and changed.padding_side == "left"
        assert changed.pad_token_id == len(vocab) + 1 and plain.decode(plain(TEXTS[1]).input_ids) == TEXTS[1]
    if not transformers.__version__.startswith("4."):  # its class there reads files alone
        theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
        assert theirs(TEXTS)["input_ids"] == plain(TEXTS)["input_ids"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "made of a folder .*; vocab is None and merges are None"),
        ({"vocab": {"a": 0}}, "merges, a list of pairs; .*merges are None"),
        ({"vocab": "none.json", "merges": []}, "vocab is 'none.json', and there is no such file"),
        ({"vocab": {"a": 0}, "merges": "none.txt"}, "merges is 'none.txt', and there is no such file"),
        ({"vocab": {"a": 0}, "merges": [], "colour": 1}, "a tokenizer has no setting 'colour'"),
    ],
)
def test_what_is_no_vocabulary_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        neoquant.GPT2Tokenizer(**given)


def test_a_pipeline_goes_without_vocabulary(both: tuple[Any, Any]) -> None:
    with pytest.raises(RequestError, match="make a tokenizer that is given no backend"):
        neoquant.GPT2Tokenizer(both[0].backend, vocab={"a": 0}, merges=[])


def test_names_of_transformers_4(both: tuple[Any, Any], tmp_path: Path) -> None:
    """Names that code of its time has, each beside what it stands for now."""
    both[0].save_pretrained(tmp_path)
    ours = neoquant.AutoTokenizer.from_pretrained(tmp_path, model_max_length=9, verbose=False)
    padded = {"padding": "max_length", "max_length": 60, "return_tensors": "np"}
    assert plain(ours.encode_plus(*TEXTS[:2], **padded)) == plain(both[1](*TEXTS[:2], **padded))
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    for given in (TEXTS, pairs):
        assert plain(ours.batch_encode_plus(given, **padded)) == plain(both[1](given, **padded))
    ids = [*ours.encode(TEXTS[1]), ours.eos_token_id]
    for spaces in (True, False):
        assert ours.decode(ids, spaces_between_special_tokens=spaces) == TEXTS[1] + ours.eos_token
    assert ours.backend_tokenizer is ours.backend and ours.max_len_single_sentence == 9
    ours.add_bos_token = True
    assert (ours.max_len_single_sentence, ours.max_len_sentences_pair) == (8, 7)
    ours.add_special_tokens({"additional_special_tokens": ["<q>"]})
    ours.add_special_tokens({"additional_special_tokens": ["<r>"]}, replace_additional_special_tokens=False)
    assert ours.additional_special_tokens == ["<q>", "<r>"]
    ours.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    assert copy.deepcopy(ours).deprecation_warnings == {} and ours.deprecation_warnings
    assert ours.init_kwargs["model_max_length"] == 9 and ours.init_inputs == ()
    ours.deprecation_warnings = {}
    assert not ours.deprecation_warnings
