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

NAMES = (
    "GPTNeoConfig", "GPTNeoModel", "GPTNeoForCausalLM", "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification", "GPTNeoForQuestionAnswering", "GPT2Tokenizer", "AutoTokenizer",
)  # fmt: skip
ALSO = {"GPT2TokenizerFast": "GPT2Tokenizer"}
"""transformers 4's name of the tokenizer that is built on the same library as neoquant's."""
HUB_ID = "openai-community/gpt2"

outcomes: dict[str, dict[str, str]] = {}


def pytest_collection_modifyitems() -> None:
    """The tests are read: their modules' names, and what their classes list, become neoquant's."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("tests.")]
    if os.environ["NEOQUANT_PLACE"] == "neoquant":
        places = _places()
        for module in modules:
            _replace(module, places)
    for module in modules:
        for cls in vars(module).values():
            asked = vars(cls).get("from_pretrained_id") if isinstance(cls, type) else None
            if HUB_ID in ([asked] if isinstance(asked, str) else asked or ()):
                cls.from_pretrained_id = [os.environ["NEOQUANT_GPT2"]]


def _places() -> dict[str, Any]:
    """transformers' name -> neoquant's class, which answers to the private names that tests choose by."""
    import neoquant

    places = {name: getattr(neoquant, name) for name in NAMES}
    for ours in places.values():
        if hasattr(ours, "base_model_prefix"):
            for private, value in PRIVATE.items():
                setattr(ours, private, value)
    return places | {theirs: places[ours] for theirs, ours in ALSO.items()}


def _replace(module: Any, places: dict[str, Any]) -> None:
    def ours(value: Any) -> Any:
        if isinstance(value, type) and value.__module__.startswith("transformers."):
            return places.get(value.__name__, value)
        if type(value) in (tuple, list):
            return type(value)(ours(each) for each in value)
        if type(value) is dict:  # no other mapping: some of transformers' import everything when they are read
            return {key: ours(each) for key, each in value.items()}
        return value

    for name, value in list(vars(module).items()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            for attribute, held in list(vars(value).items()):
                if not attribute.startswith("__"):
                    replaced = ours(held)
                    if replaced is not held:
                        setattr(value, attribute, replaced)
        elif isinstance(value, type) and not name.startswith("__"):
            setattr(module, name, ours(value))


def _from_config(cls: Any, config: Any, **options: Any) -> Any:
    return cls(config, attn_implementation=options.get("attn_implementation") or "sdpa")


def _prepare_inputs_for_generation(self: Any, input_ids: Any, inputs_embeds: Any = None, **others: Any) -> Any:
    """Tests read what it takes; `generate` does not call it, and neither may a test that is to pass."""
    raise NotImplementedError("neoquant's generate prepares its inputs itself")


PRIVATE: dict[str, Any] = {
    "_from_config": classmethod(_from_config),
    "_no_split_modules": [],
    "_keys_to_ignore_on_load_missing": None,
    "_keys_to_ignore_on_load_unexpected": None,
    "_keys_to_ignore_on_save": None,
    "_keep_in_fp32_modules": (),
    "_keep_in_fp32_modules_strict": (),
    "_can_set_experts_implementation": classmethod(lambda cls: False),
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "_is_stateful": False,
    "_can_set_attn_implementation": classmethod(lambda cls: True),
    "_supports_sdpa": True,
    "_supports_flash_attn": False,
    "_supports_flex_attn": False,
    "_supports_attention_backend": False,
    "_can_compile_fullgraph": False,
}
"""What the tests ask of transformers' classes by private names, in order to choose what to run."""


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
    classes = [] if item.cls is None else [cls for cls in item.cls.__mro__ if item.name in cls.__dict__]
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
