"""Tasks and turns on the command line: what is printed where, and what is remembered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neoquant
from neoquant.cli.chat import _Shown
from neoquant.cli.terminal import Terminal
from neoquant.hf.pipelines import TASKS

Cli = Callable[..., Any]


def test_the_documentation_pages_command_is_the_positional_one(cli: Cli, tiny_model: Path) -> None:
    words = ("--max-new-tokens", 6, "--seed", 3)
    named = cli("generate", "--task", "text-generation", "--model", tiny_model, "--device", "cpu", *words, stdin="ab\n")
    assert named.code == 0
    assert named.out == cli("generate", tiny_model, "--prompt", "ab", *words).out
    assert named.out.startswith("ab")


@pytest.mark.parametrize(
    ("task", "more", "line"),
    [
        ("text-classification", (), {"label", "score"}),
        ("token-classification", (), {"entity", "score", "index", "word", "start", "end"}),
        ("question-answering", ("--question", "Who?"), {"score", "start", "end", "answer"}),
    ],
)
def test_other_tasks_print_a_line_for_each_text(
    cli: Cli, tiny_model: Path, tmp_path: Path, task: str, more: tuple[str, ...], line: set[str]
) -> None:
    with pytest.warns(neoquant.LoadWarning):
        TASKS[task].model_class.from_pretrained(tiny_model).save_pretrained(tmp_path / "head")
    neoquant.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "head")
    result = cli("generate", tmp_path / "head", "--task", task, *more, stdin="one text\n\nanother\n")
    lines = [json.loads(text) for text in result.out.splitlines()]
    expected = neoquant.pipeline(task, tmp_path / "head")
    texts: list[Any] = ["one text", "another"]
    one, other = expected([{"question": "Who?", "context": text} for text in texts] if more else texts)
    assert lines == [one, None, other]  # a blank line has its line too, so that outputs line up with inputs
    assert set(one[0] if isinstance(one, list) else one) == line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "b"), "two models are named"),
        (("--task", "translation"), "task is 'translation'; legal are"),
        (("--task", "text-classification", "--greedy"), "generates nothing: leave out --greedy"),
        (("--task", "text-classification", "--question", "x"), "--question belongs to --task"),
        (("--question", "x"), "--question belongs to --task"),
        (("--task", "question-answering"), "give --question TEXT"),
    ],
)
def test_contradictions_are_refused(cli: Cli, tiny_model: Path, words: tuple[str, ...], message: str) -> None:
    result = cli("generate", tiny_model, *words, stdin="x\n")
    assert result.code == 2 and message in result.error


def test_a_chat_goes_on_with_everything_that_was_said(cli: Cli, tiny_model: Path) -> None:
    result = cli("chat", tiny_model, "--temperature", 0, "--max-new-tokens", 4, stdin="ab\ncd\n/show\n")
    first, second, *shown = result.out.split("\n", 2)
    network, tokenizer = neoquant.load(tiny_model)
    text = ""
    for typed, said in (("ab", first), ("cd", second)):
        ids = tokenizer(text + typed, return_tensors="pt").input_ids
        new = network.generate(ids, max_new_tokens=4)[0, ids.shape[1] :]
        assert said == tokenizer.decode(new, skip_special_tokens=True)
        text += typed + said
    assert shown == [text + "\n"]
    assert len(re.findall(r"\d+ tokens in .* s, .* tokens/s; \d+ of 32 positions", result.err)) == 2


def test_turns_can_be_taken_back_and_done_again(cli: Cli, tiny_model: Path) -> None:
    words = ("chat", tiny_model, "--max-new-tokens", 5, "--seed", 4)
    plain = cli(*words, stdin="ab\n").out
    result = cli(*words, stdin="ab\n/again\n/undo\n/undo\n/again\n/what\n/help\n/quit\nnot read\n")
    first, second, _ = result.out.split("\n", 2)
    assert first + "\n" == plain and second != first
    for note in ("no turn to undo", "no turn to do again", "/what is no command", "/reset: start again"):
        assert note in result.err
    assert cli(*words, stdin="ab\n/reset\nxy\n/show\n").out.count("xy") == 1
    assert cli(*words, stdin="").out == ""


def test_a_long_chat_says_what_it_cannot_see_any_more(cli: Cli, tiny_model: Path) -> None:
    result = cli("chat", tiny_model, "--max-new-tokens", 400, stdin="a" * 30 + "\n")
    assert result.code == 0
    assert "the text has 30 tokens: the first 14 no longer fit the context" in result.err


def test_a_dialogue_has_two_names(cli: Cli, tiny_model: Path) -> None:
    result = cli("chat", tiny_model, "--roles", "A, B", "--max-new-tokens", 3, stdin="x\n\ny\n/show\n")
    assert result.out.count("A: x\nB:") == result.out.count("\nA: y\nB:") == 1
    assert "is not two names" in cli("chat", tiny_model, "--roles", "A", stdin="").error


def test_nothing_that_may_be_the_end_is_written_early(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _Shown(("\nA:",), Terminal())
    written = []
    for letter in "hi\nAh\nA: x":
        shown.add(letter)
        written.append(capsys.readouterr().out)
    assert "".join(written) == "hi\nAh" and written[2:5] == ["", "", "\nAh"]
    assert shown.end() == "hi\nAh" and capsys.readouterr().out == "\n"
