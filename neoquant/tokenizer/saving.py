"""A tokenizer's files, written so that transformers 4 and 5 and neoquant read the same tokenizer from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant.errors import RequestError
from neoquant.files.writing import explaining, write_file
from neoquant.tokenizer.settings import FAST, NO_LIMIT, SPECIAL_TOKENS, TokenizerSettings

if TYPE_CHECKING:
    import tokenizers

CONFIG = "tokenizer_config.json"
MAIN_TEMPLATE, OTHER_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def save_tokenizer(
    backend: tokenizers.Tokenizer, settings: TokenizerSettings, folder: Path, jinja_files: bool = True
) -> tuple[str, ...]:
    """Write `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be; returns the paths.

    Chat templates are written to files of their own, or (`jinja_files=False`) into `tokenizer_config.json`; files of
    another tokenizer's templates, which would be read first, are removed. Raises OutputError for what cannot be
    written, RequestError for the name of a template that is no file's.
    """
    templates = _template_files(settings.chat_template) if jinja_files else {}
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FAST, backend.to_str(pretty=True))
    text = json.dumps(stated_config(backend, settings, not jinja_files), indent=2, ensure_ascii=False)
    write_file(folder / CONFIG, text + "\n")
    for path in (folder / MAIN_TEMPLATE, *(folder / OTHER_TEMPLATES).glob("*.jinja")):
        if str(path.relative_to(folder)) not in templates:
            path.unlink(missing_ok=True)
    for name, template in templates.items():
        with explaining(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, template)
    return tuple(str(folder / name) for name in (FAST, CONFIG, *templates))


def _template_files(template: str | Mapping[str, str] | None) -> dict[str, str]:
    """File -> template. Raises RequestError for a name that would lead out of the folder."""
    named = {"default": template} if isinstance(template, str) else template or {}
    files = {}
    for name, text in named.items():
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise RequestError(f"a chat template is called {name!r}, which is no file's name: save_jinja_files=False")
        files[MAIN_TEMPLATE if name == "default" else f"{OTHER_TEMPLATES}/{name}.jinja"] = text
    return files


def stated_config(backend: tokenizers.Tokenizer, settings: TokenizerSettings, templates: bool) -> dict[str, Any]:
    """tokenizer_config.json, with defaults that differ between versions of transformers spelled out, and with chat
    `templates` or without."""
    added = {
        str(number): {flag: getattr(token, flag) for flag in _FLAGS}
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    }
    named = {name: content for name, content in settings.special.items() if name in SPECIAL_TOKENS}
    # GPT2Tokenizer gives three tokens to a folder that is silent about them, so None is spelled out.
    kept = {name: content for name, content in named.items() if content is not None or settings.gpt2}
    own = {name: content for name, content in settings.special.items() if name not in named and content is not None}
    template = settings.chat_template if templates else None
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
