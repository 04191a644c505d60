"""The text of a prompt, as it was typed or piped in."""

from __future__ import annotations

import sys

from neoquant.errors import RequestError


def prompt_text(stated: str | None) -> str:
    """What `--prompt` states, or else standard input, without the line end that `echo` adds.

    Raises:
        RequestError: nothing is piped in, it is not UTF-8, or longer than a text that is tokenized at once.
    """
    if stated is not None:
        return _decoded(stated.encode("utf-8", "surrogateescape"), "--prompt")
    if sys.stdin.isatty():
        raise RequestError("no text: give --prompt TEXT, or pipe a text in")
    from neoquant.data.documents import VARIABLE, text_limit

    limit = text_limit()
    piped = getattr(sys.stdin, "buffer", None)
    content: bytes = piped.read(limit + 1) if piped else sys.stdin.read(limit + 1).encode("utf-8", "surrogateescape")
    if len(content) > limit:
        raise RequestError(f"standard input has more than {limit:,} bytes; set {VARIABLE} to read more")
    return _decoded(content, "standard input").removesuffix("\n")


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not UTF-8: byte {error.start + 1} is {content[error.start]:#04x}") from None
