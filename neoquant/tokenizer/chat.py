"""Conversations as text, by the templates that model folders carry (Jinja, in transformers' dialect)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from neoquant.errors import RequestError

if TYPE_CHECKING:
    import jinja2


def choose_template(own: str | Mapping[str, str] | None, asked: str | None, tools: bool) -> str:
    """The template to take: what is `asked` for, itself or by its name among the folder's `own`, or the folder's.

    Several are named; "tool_use" is for `tools`, "default" for all else. Raises RequestError where there is none.
    """
    named = own if isinstance(own, Mapping) else {}
    if asked is not None:
        return named.get(asked, asked)
    if isinstance(own, str):
        return own
    for name in ("tool_use", "default") if tools else ("default",):
        if name in named:
            return named[name]
    there = f"; its templates are {', '.join(named)}" if named else ""
    raise RequestError(f"the tokenizer has no chat template{there}: give one, chat_template=...")


_MARK = "THE-FINAL-MESSAGE-ENDS-HERE "  # ends in a space, which shows whether the template trims


def render_unfinished(template: str, values: Mapping[str, Any], part: str) -> str:
    """`render_chat` up to where the last message's `part` ("content") ends, so that a model goes on with it.

    The last text of a part in pieces counts. Where the template trims, so is what comes out. Raises RequestError where
    there is nothing to go on with, or the template leaves it out.
    """
    *before, last = values["messages"]
    marked = _marked(last.get(part))
    if marked is None:
        raise RequestError(f"continue_final_message goes on with {part!r}, and the last message has no such text")
    text = render_chat(template, {**values, "messages": [*before, {**last, part: marked}]})
    found = text.rpartition(_MARK.strip())[0]
    if _MARK.strip() not in text:
        raise RequestError(f"continue_final_message goes on with {part!r}, which the chat template leaves out")
    return found if text[len(found) :].startswith(_MARK) else found.rstrip()


def _marked(part: Any) -> Any:
    """The part with the mark behind its text; None where it has none."""
    if isinstance(part, str):
        return part + _MARK
    pieces = list(part) if isinstance(part, list | tuple) else []
    for place in reversed(range(len(pieces))):
        if isinstance(pieces[place], Mapping) and "text" in pieces[place]:
            pieces[place] = {**pieces[place], "text": pieces[place]["text"] + _MARK}
            return pieces
    return None


def render_chat(template: str, values: Mapping[str, Any]) -> str:
    """The text that a template makes of `messages` and other values, in Jinja's sandbox.

    Raises RequestError for a template that is none, does what the sandbox forbids, or refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        return _compiled(template).render(**values)
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"the chat template cannot be rendered: {error}") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; Jinja's own filter would escape what HTML gives a meaning to."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
