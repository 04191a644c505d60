"""transformers' keywords for where files are: which change nothing here, and what does what the others do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neoquant.errors import RequestError

WITHOUT_EFFECT = ("trust_remote_code", "use_fast", "resume_download", "tqdm_class")
"""How transformers looks for code and shows progress."""

_LOGIN = "set HF_TOKEN, or log in with `hf auth login`"
Answers = Mapping[str, tuple[tuple[Any, ...], str]]
ANSWERED: Answers = {
    "cache_dir": ((None,), "set HF_HUB_CACHE, which huggingface_hub reads when it is imported"),
    "token": ((None, True), _LOGIN),
    "use_auth_token": ((None, True), _LOGIN),
    "local_files_only": ((None, False), "set HF_HUB_OFFLINE=1, or give the folder"),
    "force_download": ((None, False), "remove the model from the hub's cache, with `hf cache rm`"),
    "proxies": ((None,), "set HTTPS_PROXY"),
    "mirror": ((None,), "set HF_ENDPOINT"),
    "subfolder": ((None, ""), "give the folder that the model is in"),
    "variant": ((None,), "give a folder that holds that variant's files alone"),
    "config": ((None,), "the config.json beside the weights counts: change it there"),
}
"""Keyword -> values that ask for nothing, and how what the others ask for is done."""


def require_neutral(name: str, value: Any, answers: Answers) -> None:
    """Raise RequestError, with the answer, where the value of one of these keywords asks for something."""
    neutral, answer = answers[name]
    if not any(value is each or (value == each and type(value) is type(each)) for each in neutral):
        raise RequestError(f"{name}={value!r:.60} is not done here: {answer}")


def without_keywords(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without these keywords. Raises RequestError for one that asks for what is not done here."""
    for name in options.keys() & ANSWERED.keys():
        require_neutral(name, options[name], ANSWERED)
    return {name: value for name, value in options.items() if name not in (*WITHOUT_EFFECT, *ANSWERED)}
