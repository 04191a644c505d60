"""What is typed wrong, and what help says: no model is needed for any of it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from conftest import Cli

from neoquant.cli import app
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError
from neoquant.sizes import parse_size

REPOSITORY = Path(__file__).resolve().parents[2]
VERBS = ("plan", "quantize", "eval", "compare", "inspect", "report", "generate", "bench", "info", "tune")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(cli: Cli, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.code == 0 and not result.err
    assert "Examples:" in result.out and f"neoquant {verb} " in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 120


def test_help_lists_every_verb_whole(cli: Cli) -> None:
    out = cli("--help").out
    assert all(re.search(rf"^  {verb} +[A-Z].*\.$", out, re.MULTILINE) for verb in VERBS)
    assert "..." not in out.split("Commands:")[1]


def test_no_arguments_is_help(cli: Cli) -> None:
    assert cli() == cli("--help")


def test_version(cli: Cli) -> None:
    assert re.fullmatch(r"neoquant \d+\.\d+\.\d+\n", cli("--version").out)


def examples() -> list[str]:
    """Every command line that help, the README and the Makefile show."""
    group = typer.main.get_command(app)
    texts = [str(command.help) for command in (group, *group.commands.values())]  # type: ignore[attr-defined]
    texts += [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile")]
    verbs = "|".join(VERBS)
    found = re.findall(rf"(?:^|\||/)[ \t]*neoquant ((?:{verbs}) [^\n|`]*)", "\n".join(texts), re.MULTILINE)
    return sorted({re.split(r"\s{3,}", line.replace("$(DEMO)", "out"))[0] for line in found})


@pytest.mark.parametrize("line", examples())
def test_every_example_is_a_legal_command_line(line: str) -> None:
    verb, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    command.make_context(verb, words, obj=Terminal())  # raises for what the verb does not know


def test_there_are_examples() -> None:
    assert len(examples()) > 15


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quantise"], "'quantize'"),
        (["quantize", "--bit", "4"], "--bits"),
        (["quantize", "--bits"], "--bits"),
        (["quantize", "--bits", "four"], "four"),
        (["quantize", "--shard-size", "big"], "500MB"),
        (["quantize", "a", "b"], "b"),
        (["compare", "a"], "model"),
        (["generate", "--max-new-tokens", "0", "-p", "x"], "0"),
        (["generate", "--seed", str(2**64), "-p", "x"], "--seed"),
        (["generate", "--greedy", "--top-k", "3", "-p", "x"], "--top-k"),
        (["info", "--env", "model"], "--env"),
        (["eval", "some-model"], "pile-core"),
        (["eval", "some-model", "--suite", "pile"], "pile-core"),
        (["plan", "--recipe", "no-such-recipe"], "no-such-recipe"),
        (["plan", "--recipe", "nf4", "--bits", "4"], "--bits"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli: Cli, words: list[str], expected: str) -> None:
    result = cli(*words)
    assert result.code == 2
    assert result.error.startswith("error: ") and expected.lower() in result.error.lower()


@pytest.mark.parametrize(
    ("bits", "type"),
    [
        (5, None),
        (3, "nf4"),
        (5, "affine"),
        (16, None),
        (8, "nf4"),
        (4, "int8"),
        (2, "fp4"),
        (None, "nf5"),
        (0, "nf4"),
        (-4, "nf4"),
    ],
)
def test_illegal_pairs_are_refused_naming_the_legal_ones(
    cli: Cli, tiny_model: Path, bits: int | None, type: str | None
) -> None:
    words = [*(["--bits", bits] if bits is not None else []), *(["--type", type] if type else [])]
    result = cli("quantize", tiny_model, *words)
    assert result.code == 2
    assert all(name in result.error for name in ("nf4", "fp4", "int8", "4", "8"))


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("500MB", 500_000_000), ("5 gb", 5 * 10**9), ("1.5GiB", 3 * 2**29), ("64k", None)]
)
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(RequestError, match="64k"):
            parse_size(text, "--shard-size")
    else:
        assert parse_size(text, "--shard-size") == size


IDLE = {"--rows": "4", "--length": "16", "--seed": "0", "--max-memory": "1GB"}


@pytest.mark.parametrize(
    ("verb", "option"),
    [(verb, option) for verb in ("quantize", "plan") for option in IDLE if (verb, option) != ("plan", "--seed")],
)
def test_options_of_calibration_are_refused_without_it(cli: Cli, tiny_model: Path, verb: str, option: str) -> None:
    result = cli(verb, tiny_model, option, IDLE[option])
    assert result.code == 2 and option in result.error and "--calibration" in result.error
    if verb == "plan":  # a recipe that needs samples is planned without their text
        assert cli("plan", tiny_model, "--recipe", "gptq3", option, IDLE[option]).code == 0


def test_a_folder_cannot_hide_the_bundled_model(cli: Cli, tiny_model: Path) -> None:
    refused = cli("quantize", tiny_model, "--out", "neoquant-demo")
    assert refused.code == 2 and "a folder neoquant-demo here would hide the model" in refused.error
    assert not list(Path.cwd().iterdir())
    shutil.copytree(tiny_model, "neoquant-demo")
    there = cli("info", "neoquant-demo")
    assert there.code == 0 and "the folder of that name here" in there.err


def test_a_task_without_trained_weights_is_refused(cli: Cli, tiny_model: Path) -> None:
    result = cli("generate", tiny_model, "--task", "text-classification", "--prompt", "Fine.")
    assert result.code == 1 and "has no weights for score.weight: it is not trained for text-cl" in result.error
