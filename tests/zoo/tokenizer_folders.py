"""Tokenizer folders as people have them: every way in which files state a vocabulary, added tokens and settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

EOT = "<|endoftext|>"
TEXT = (
    "The tiny story of a small robot who wanted to read every book in the library. "
    "Once upon a time there was a robot. It said: hello, world! "
)
NAMES = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", **NAMES}
AS_IT_STANDS = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}


@cache
def bpe() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Vocabulary and merges in GPT-2's manner: 256 bytes, merges, and the end of text as the last entry."""
    import tokenizers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT * 4], vocab_size=299, min_frequency=2, show_progress=False)
    model = json.loads(trained._tokenizer.to_str())["model"]
    merges = tuple(tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
    return {**model["vocab"], EOT: len(model["vocab"])}, merges


def vocabulary_size() -> int:
    """Entries before any token is added."""
    return len(bpe()[0])


def slow_files(folder: Path, vocab: dict[str, int] | None = None) -> None:
    """vocab.json and merges.txt."""
    own, merges = bpe()
    (folder / "vocab.json").write_text(json.dumps(vocab or own, ensure_ascii=False), "utf-8")
    lines = "\n".join(" ".join(merge) for merge in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", "utf-8")


def fast_file(folder: Path, added: tuple[Any, ...] = (EOT,), **changes: Any) -> None:
    """tokenizer.json with the added tokens given, and `changes` to its uppermost keys."""
    import tokenizers

    vocab, merges = bpe()
    backend = tokenizers.ByteLevelBPETokenizer(vocab=dict(vocab), merges=list(merges))._tokenizer
    for token in added:
        backend.add_special_tokens([token]) if isinstance(token, str) else backend.add_tokens([token])
    state = json.loads(backend.to_str()) | {"post_processor": None} | changes
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")


def template(first: str | None = EOT, last: str | None = None) -> dict[str, Any]:
    """A post-processor for tokenizer.json, which puts tokens around each text."""

    def around(letter: str, kind: int) -> list[dict[str, Any]]:
        special = [None if t is None else {"SpecialToken": {"id": t, "type_id": kind}} for t in (first, last)]
        parts = [special[0], {"Sequence": {"id": letter, "type_id": kind}}, special[1]]
        return [part for part in parts if part is not None]

    ids = {token: {"id": token, "ids": [bpe()[0][token]], "tokens": [token]} for token in (first, last) if token}
    single = around("A", 0)
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *around("B", 1)], "special_tokens": ids}


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


@dataclass(frozen=True)
class Folder:
    """One way to write a tokenizer: its vocabulary, and the JSON files beside it.

    `error` is what neoquant says where it refuses the folder; `warning` what it says where transformers is silent.
    """

    write: Callable[[Path], None]
    files: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    warning: str | None = None

    def make(self, folder: Path) -> Path:
        """Write it."""
        folder.mkdir(parents=True)
        self.write(folder)
        (folder / "config.json").write_text('{"model_type": "gpt_neo"}')
        for name, value in self.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
        return folder


def _fast(config: dict[str, Any], /, *added: Any, error: str | None = None, warning: str | None = None, **changes: Any):  # type: ignore[no-untyped-def]
    return Folder(
        lambda folder: fast_file(folder, (EOT, *added), **changes),
        {"tokenizer_config.json": config},
        error,
        warning,
    )


def _slow(config: dict[str, Any] | None, error: str | None = None, **files: Any) -> Folder:
    named = {f"{name}.json": value for name, value in files.items()}
    return Folder(slow_files, named if config is None else {"tokenizer_config.json": config, **named}, error)


def _word_level(folder: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "robot": 1, EOT: 2}, unk_token=EOT))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens([EOT])
    backend.save(str(folder / "tokenizer.json"))


def _unknown_bytes(folder: Path) -> None:
    """tokenizer.json whose vocabulary lacks most bytes, with an unk_token."""
    fast_file(folder)
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    merged = {letter for pair in state["model"]["merges"] for letter in pair}
    kept = [entry for entry in state["model"]["vocab"] if entry in merged or len(entry) > 1]
    state["model"] |= {"vocab": {entry: number for number, entry in enumerate(kept)}, "unk_token": EOT}
    state["added_tokens"] = [{"id": kept.index(EOT), **token(EOT)}]
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")


def folders() -> dict[str, Folder]:
    """name -> how it is written."""
    n = vocabulary_size()
    start = {**GPT2, "bos_token": "<|start|>", "pad_token": "<|pad|>"}
    added = {"<|start|>": n, "<|pad|>": n + 1}
    decoder = {str(n): token("<|user|>"), str(n + 1): token("<|bot|>", special=False, normalized=True)}
    flags = {
        str(n): token("<l>", lstrip=True),
        str(n + 1): token("<r>", rstrip=True, special=False),
        str(n + 2): token("robot", single_word=True, normalized=True, special=False),
    }
    json_flags = [{"id": int(number), **entry} for number, entry in flags.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    space = {"pre_tokenizer": byte_level}
    split = {"type": "Split", "pattern": {"Regex": "\\d|\\s"}, "behavior": "Isolated", "invert": False}
    digits = {
        "type": "Sequence",
        "pretokenizers": [split, {**byte_level, "add_prefix_space": False, "use_regex": False}],
    }
    left = {
        "truncation": {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 5,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
    }
    two = [{"name": "default", "template": "{{ a }}"}, {"name": "tool", "template": "{{ b }}"}]
    return {
        "fast": _fast(GPT2),
        "fast class": _fast(AS_IT_STANDS),
        "transformers 5's class": _fast({**AS_IT_STANDS, "tokenizer_class": "TokenizersBackend"}),
        "class ends in Fast": _fast({**GPT2, "tokenizer_class": "GPT2TokenizerFast"}),
        "no class": _fast(NAMES),
        "fast class without an end of text": _fast({"tokenizer_class": "PreTrainedTokenizerFast"}),
        "tokenizer.json alone": Folder(fast_file),
        "slow": _slow(GPT2),
        "slow alone": _slow(None),
        "slow, added_tokens.json": _slow(start, added_tokens=added),
        "slow, special_tokens_map.json": _slow(
            {"tokenizer_class": "GPT2Tokenizer"},
            added_tokens=added,
            special_tokens_map={**NAMES, "bos_token": token("<|start|>"), "pad_token": "<|pad|>"},
        ),
        "slow, added_tokens_decoder": _slow({**GPT2, "added_tokens_decoder": decoder}),
        "slow, additional_special_tokens": _slow({**GPT2, "additional_special_tokens": ["<|user|>", "<|bot|>"]}),
        "slow, add_bos_token": _slow({**GPT2, "add_bos_token": True}),
        "slow, add_eos_token": _slow({**GPT2, "add_eos_token": True}),
        "slow, both ends": _slow({**start, "add_bos_token": True, "add_eos_token": True}, added_tokens=added),
        "slow, add_prefix_space": _slow({**GPT2, "add_prefix_space": True}),
        "slow, flags": _slow({**GPT2, "added_tokens_decoder": flags}),
        "fast, added_tokens_decoder": _fast({**GPT2, "added_tokens_decoder": decoder}),
        "fast class, added_tokens_decoder": _fast({**AS_IT_STANDS, "added_tokens_decoder": decoder}),
        "fast, added_tokens.json": Folder(
            fast_file, {"tokenizer_config.json": GPT2, "added_tokens.json": {"<|user|>": n}}
        ),
        "fast, decoder without the file's tokens": _fast(
            {**GPT2, "added_tokens_decoder": {str(n): token("<|user|>")}},
            *("<|user|>", "<|bot|>"),
            warning="drops what it does not name",
        ),
        "fast class, decoder without the file's tokens": _fast(
            {**AS_IT_STANDS, "added_tokens_decoder": {str(n): token("<|user|>")}}, "<|user|>", "<|bot|>"
        ),
        "fast, flags": _fast(GPT2, added_tokens=[{"id": n - 1, **token(EOT)}, *json_flags]),
        "fast class, flags": _fast(AS_IT_STANDS, added_tokens=[{"id": n - 1, **token(EOT)}, *json_flags]),
        "fast, additional_special_tokens": _fast({**GPT2, "additional_special_tokens": ["<|user|>"]}, "<|user|>"),
        "fast class, extra_special_tokens": _fast({**AS_IT_STANDS, "extra_special_tokens": ["<|user|>"]}),
        "fast class, named extra tokens": _fast({**AS_IT_STANDS, "extra_special_tokens": {"image_token": "<|user|>"}}),
        "fast class, a token under its own name": _fast({**AS_IT_STANDS, "image_token": "<|user|>"}),
        "fast, template": _fast(GPT2, post_processor=template()),
        "fast class, template": _fast(AS_IT_STANDS, post_processor=template()),
        "fast class, template with both ends": _fast(AS_IT_STANDS, post_processor=template(EOT, EOT)),
        "fast, trimmed offsets": _fast(GPT2, post_processor=byte_level),
        "fast, add_bos_token": _fast({**GPT2, "add_bos_token": True}),
        "fast, add_prefix_space": _fast({**GPT2, "add_prefix_space": True}),
        "fast, tokenizer.json with a prefix space": _fast(GPT2, **space),
        "fast class, tokenizer.json with a prefix space": _fast(AS_IT_STANDS, **space),
        "fast class, add_prefix_space": _fast(
            {**AS_IT_STANDS, "add_prefix_space": True}, warning="add_prefix_space is not applied"
        ),
        "fast, left sides": _fast({**GPT2, "padding_side": "left", "truncation_side": "left"}),
        "fast, sides left in the file": _fast(GPT2, **left),
        "fast class, sides left in the file": _fast(AS_IT_STANDS, **left),
        "fast, distinct bos, eos and unk": _fast({**start, "unk_token": "<|unk|>"}, "<|start|>", "<|unk|>", "<|pad|>"),
        "fast, an added token ends a text": _fast({**GPT2, "eos_token": "<|end|>"}, "<|end|>"),
        "fast, a new token ends a text": _fast({**GPT2, "eos_token": "<|end|>"}),
        "fast, special tokens as objects": _fast({**GPT2, "pad_token": {"__type": "AddedToken", **token("<|pad|>")}}),
        "special_tokens_map.json has the last word": Folder(
            lambda folder: fast_file(folder, (EOT, "<|end|>")),
            {"tokenizer_config.json": GPT2, "special_tokens_map.json": {"eos_token": "<|end|>"}},
        ),
        "fast class, normalizer": _fast(AS_IT_STANDS, normalizer={"type": "NFKC"}),
        "fast, normalizer": _fast(GPT2, normalizer={"type": "Lowercase"}, warning="normalizer are not GPT-2's"),
        "fast class, split digits": _fast(AS_IT_STANDS, pre_tokenizer=digits),
        "fast, split digits": _fast(GPT2, pre_tokenizer=digits, warning="pre_tokenizer are not GPT-2's"),
        "fast, token_type_ids": _fast(
            {**GPT2, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}, post_processor=template()
        ),
        "fast, split_special_tokens": _fast({**GPT2, "split_special_tokens": True}),
        "fast, clean up": _fast({**GPT2, "clean_up_tokenization_spaces": True}),
        "fast, forced clean up": _fast(
            {
                **GPT2,
                "clean_up_tokenization_spaces": True,
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
            }
        ),
        "fast, chat template": _fast({**GPT2, "chat_template": "{{ messages }}"}),
        "fast, chat templates": _fast({**GPT2, "chat_template": two}),
        "chat templates in files": Folder(
            fast_file,
            {
                "tokenizer_config.json": {**GPT2, "chat_template": "{{ old }}"},
                "chat_template.jinja": "{{ a }}",
                "additional_chat_templates/tool.jinja": "{{ b }}",
            },
        ),
        "fast, short model_max_length": _fast({**GPT2, "model_max_length": 6, "pad_token": EOT}),
        "fast, unknown keys": _fast({**GPT2, "errors": "replace", "my_own": {"kept": [1, 2]}}),
        "fast, unknown bytes": Folder(_unknown_bytes, {"tokenizer_config.json": GPT2}),
        "fast class, unknown bytes": Folder(_unknown_bytes, {"tokenizer_config.json": AS_IT_STANDS}),
        "fast class, words": Folder(_word_level, {"tokenizer_config.json": AS_IT_STANDS}),
        # Refused: transformers gives other ids than the files state, builds another pipeline, or fails.
        "words for GPT-2": Folder(_word_level, {"tokenizer_config.json": GPT2}, "WordLevel model, and GPT2Tokenizer"),
        "ids with a gap": _slow(GPT2, "'<|user|>' has the id 305 .* but gets 300", added_tokens={"<|user|>": n + 5}),
        "slow, fast class": _slow(AS_IT_STANDS, r"vocab.json and merges.txt need tokenizer_class GPT2Tokenizer"),
        "another class": _fast({**GPT2, "tokenizer_class": "LlamaTokenizer"}, error="'LlamaTokenizer', which builds"),
        "no such side": _fast({**GPT2, "padding_side": "middle"}, error="padding_side is 'middle'; legal are left"),
        "a token that is none": _fast({**GPT2, "pad_token": 5}, error="pad_token is 5; legal is a string"),
    }
