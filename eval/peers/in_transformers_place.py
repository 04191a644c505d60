"""A plugin of pytest: neoquant's classes in the place of transformers' while transformers' own tests run.

`transformers_tests.py` runs it. NEOQUANT_PLACE is "neoquant" or "transformers" (nothing is put in a place then),
NEOQUANT_GPT2 a folder with GPT-2's tokenizer, which the tests would fetch, NEOQUANT_OUTCOMES the file to write: for
each test its outcome, where it is defined, and the error it failed with.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

NAMES = (
    "GPTNeoConfig", "GPTNeoModel", "GPTNeoForCausalLM", "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification", "GPTNeoForQuestionAnswering", "GPT2Tokenizer", "AutoTokenizer",
)  # fmt: skip
ALSO = {"GPT2TokenizerFast": "GPT2Tokenizer"}
"""transformers 4's name of the tokenizer that is built on the same library as neoquant's."""
HUB_ID = "openai-community/gpt2"

outcomes: dict[str, dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    if os.environ["NEOQUANT_PLACE"] == "neoquant":
        _take_places()


def _take_places() -> None:
    import neoquant

    for name in NAMES:
        setattr(transformers, name, getattr(neoquant, name))
    for theirs, ours in ALSO.items():
        setattr(transformers, theirs, getattr(neoquant, ours))
    for name in NAMES:
        ours = getattr(neoquant, name)
        if hasattr(ours, "base_model_prefix"):
            for private, value in PRIVATE.items():
                setattr(ours, private, value)


def _from_config(cls: Any, config: Any, **options: Any) -> Any:
    return cls(config, attn_implementation=options.get("attn_implementation") or "sdpa")


PRIVATE: dict[str, Any] = {
    "_from_config": classmethod(_from_config),
    "_no_split_modules": [],
    "_keys_to_ignore_on_load_missing": None,
    "_keys_to_ignore_on_load_unexpected": None,
    "_keys_to_ignore_on_save": None,
    "_is_stateful": False,
    "_supports_sdpa": True,
    "_supports_flash_attn": False,
    "_supports_flex_attn": False,
    "_supports_attention_backend": False,
    "_can_compile_fullgraph": False,
}
"""What the tests ask of transformers' classes by private names, in order to choose what to run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = os.environ["NEOQUANT_GPT2"]
    for item in items:
        cls = getattr(item, "cls", None)
        asked = getattr(cls, "from_pretrained_id", None)
        if asked is not None and HUB_ID in ([asked] if isinstance(asked, str) else asked):
            cls.from_pretrained_id = folder if isinstance(asked, str) else [folder]  # type: ignore[union-attr]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    told = {"defined_in": _where(item)}
    if call.excinfo is not None:
        error = call.excinfo.value
        lines = str(error).strip().splitlines() or [""]
        told["error"] = f"{type(error).__name__}: {lines[0][:300]}"
        told["refused"] = "yes" if _is_refusal(error) else ""
    report.user_properties = [*report.user_properties, *told.items()]


def _where(item: Any) -> str:
    """The file of the class, among those that a test's class inherits from, that has the test."""
    classes = [] if item.cls is None else [cls for cls in item.cls.__mro__ if item.originalname in cls.__dict__]
    module = sys.modules[classes[0].__module__] if classes else item.module
    return os.path.relpath(str(module.__file__), item.config.rootpath)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether neoquant said so in words, itself or behind what a test made of it."""
    while error is not None:
        if any(cls.__name__ == "NeoquantError" for cls in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[2]
    known = outcomes.setdefault(name, {"outcome": "passed", "defined_in": "", "error": "", "refused": ""})
    told = {key: value for key, value in report.user_properties if key in known}
    if report.outcome != "passed" and known["outcome"] == "passed":  # of several subtests, the first that fails
        known |= {"outcome": report.outcome, **told}
        outcomes[name] = known
    known["defined_in"] = known["defined_in"] or str(told.get("defined_in", ""))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["NEOQUANT_OUTCOMES"]).write_text(json.dumps(outcomes, indent=1), "utf-8")
