"""A tokenizer's files, written so that transformers 4 and 5 and neoquant read the same tokenizer from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant.files.writing import explaining, write_file
from neoquant.tokenizer.settings import FAST, NO_LIMIT, SPECIAL_TOKENS, TokenizerSettings

if TYPE_CHECKING:
    import tokenizers

_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def save_tokenizer(backend: tokenizers.Tokenizer, settings: TokenizerSettings, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be.

    Templates in files of their own, left by another tokenizer, would be read first: `chat_template.jinja` comes to
    hold this one's, others are removed. Raises OutputError for what cannot be written.
    """
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FAST, backend.to_str(pretty=True))
    text = json.dumps(_config(backend, settings), indent=2, ensure_ascii=False)
    write_file(folder / "tokenizer_config.json", text + "\n")
    left = [folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")]
    for path in left:
        if path.name == left[0].name and isinstance(settings.chat_template, str) and path.exists():
            write_file(path, settings.chat_template)
        else:
            path.unlink(missing_ok=True)


def _config(backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> dict[str, Any]:
    """tokenizer_config.json, with defaults that differ between versions of transformers spelled out."""
    added = {
        str(number): {flag: getattr(token, flag) for flag in _FLAGS}
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    }
    named = {name: content for name, content in settings.special.items() if name in SPECIAL_TOKENS}
    # GPT2Tokenizer gives three tokens to a folder that is silent about them, so None is spelled out.
    kept = {name: content for name, content in named.items() if content is not None or settings.gpt2}
    own = {name: content for name, content in settings.special.items() if name not in named and content is not None}
    template = settings.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]  # type: ignore[assignment]
    return {
        **settings.others,
        "tokenizer_class": "GPT2Tokenizer" if settings.gpt2 else "PreTrainedTokenizerFast",
        **kept,
        **({"extra_special_tokens": own} if own else {}),
        **({"additional_special_tokens": settings.additional} if settings.additional else {}),
        "added_tokens_decoder": added,
        "add_prefix_space": settings.add_prefix_space,
        "clean_up_tokenization_spaces": settings.clean_up_tokenization_spaces,
        **({"split_special_tokens": True} if settings.split_special_tokens else {}),
        "padding_side": settings.padding_side,
        "truncation_side": settings.truncation_side,
        "model_input_names": settings.model_input_names,
        **({} if settings.model_max_length == NO_LIMIT else {"model_max_length": settings.model_max_length}),
        **({} if template is None else {"chat_template": template}),
    }
