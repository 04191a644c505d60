"""Saved results beside each other, and conditions on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli

from neoquant.errors import RequestError
from neoquant.evaluation import Comparison
from neoquant.evaluation.thresholds import FIELDS, parse

SUITE = ("--context", "16")


@pytest.fixture
def measured(cli: Cli, tiny_model: Path, make_model: Callable[..., Path], text_file: Path) -> Path:
    """base.json, a.json and b.json of one model each, and ab.json, where a and b are compared with base."""
    data = ("--data", text_file, *SUITE)
    a, b = make_model("a", seed=1), make_model("b", seed=2)
    for name, model in (("base", tiny_model), ("a", a), ("b", b)):
        assert cli("eval", model, *data, "--json", f"{name}.json").code == 0
    assert cli("compare", tiny_model, a, b, *data, "--json", "ab.json").code == 0
    assert cli("compare", tiny_model, b, *data, "--json", "only-b.json").code == 0
    assert cli("compare", a, b, *data, "--json", "against-a.json").code == 0
    return Path.cwd()


def read(path: str) -> Comparison:
    return Comparison.from_json(Path(path).read_text(encoding="utf-8"))


def test_saved_results_give_the_same_changes(cli: Cli, measured: Path, tiny_model: Path, text_file: Path) -> None:
    result = cli("compare", "base.json", "a.json", "b.json", "--json", "saved.json")
    assert result.code == 0 and "against tiny-neo" in result.out
    for ours, theirs in zip(read("saved.json").candidates, read("ab.json").candidates, strict=True):
        for name in ("nats_per_token", "low", "high", "bits_per_byte", "bits_per_byte_low"):
            assert getattr(ours.total, name) == pytest.approx(getattr(theirs.total, name), abs=1e-7)
        assert ours.macro.nats_per_token == pytest.approx(theirs.macro.nats_per_token, abs=1e-7)
        assert ours.total.kl is None and theirs.total.kl is not None
        assert [c.subset for c in ours.subsets] == [c.subset for c in theirs.subsets]
    merged = cli("compare", "ab.json", "only-b.json", "a.json", "--json", "merged.json")
    assert merged.code == 0
    assert [c.evaluation.model.name for c in read("merged.json").candidates] == ["a", "b", "b", "a"]
    assert read("merged.json").candidates[2].total.kl == read("ab.json").candidates[1].total.kl

    # refused
    assert "it compares with a (weights" in cli("compare", "ab.json", "against-a.json").error
    assert "base.json holds one model: name a second" in cli("compare", "base.json").error
    assert cli("compare", "base.json", tiny_model).code == 2
    other = text_file.with_name("other.jsonl")
    other.write_text('{"text": "something else"}')
    assert cli("eval", tiny_model, "--data", other, "--context", "8", "--json", "other.json").code == 0
    message = cli("compare", "base.json", "other.json").error
    assert "other.json: not measured as base.json was: context 8, not 16; text (sha256) " in message
    Path("broken.json").write_text('{"schema_version": "neoquant.evaluation/1"}')
    assert "broken.json: not a saved evaluation of this version" in cli("compare", "base.json", "broken.json").error
    assert "nowhere.json: there is no such file" in cli("compare", "base.json", "nowhere.json").error

    # conditions
    change = read("ab.json").candidates[0].total.nats_per_token
    assert cli("compare", "ab.json", "--fail-if", "delta_nll > 1000").code == 0
    failed = cli("compare", "ab.json", "--fail-if", f"delta_nll > {change - 1e-6}", "--fail-if", "any:kl >= 0")
    assert failed.code == 3 and f"failed: a, total: delta_nll {change:.6g} > " in failed.err
    assert failed.err.count("failed: a, ") == 3  # the total's change, and both subsets' divergence
    alone = cli("eval", tiny_model, "--data", text_file, *SUITE, "--fail-if", "perplexity > 1")
    assert alone.code == 3 and "failed: tiny-neo, total: perplexity" in alone.err
    assert "has no kl of total" in cli("compare", "base.json", "a.json", "--fail-if", "kl > 0").err
    assert cli("eval", "nowhere", "--data", text_file, "--fail-if", "quality < 1").code == 2


@pytest.mark.parametrize("text", ["", "delta_nll", "delta_nll = 1", "quality > 1", "kl > much", "some:kl > 1"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(RequestError, match=r"write it like 'delta_nll > 0\.05'.*kl_99\.9"):
        parse(text)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_can_be_named(field: str) -> None:
    assert str(parse(f" any:{field}>= 1e-3 ")) == f"any:{field} >= 0.001"
    assert parse(f"{field} < 2").any_subset is False


def test_an_older_result_gets_the_intervals_that_it_lacks(measured: Path) -> None:
    """What a former version did not write comes from the documents' sums, and is what this version writes."""
    whole = read("ab.json")
    assert whole.candidates[0].total.kl_low is not None
    fields = json.loads(Path("ab.json").read_text(encoding="utf-8"))
    for candidate in fields["candidates"]:
        for change in (candidate["total"], *candidate["subsets"]):
            for name in ("kl_low", "kl_high", "agreement_low", "agreement_high"):
                del change[name]
        for token in candidate["worst_tokens"]:
            del token["top_tokens"], token["top_tokens_reference"]
    old = Comparison.from_json(json.dumps(fields))
    for before, after in zip(old.candidates, whole.candidates, strict=True):
        assert before.total == after.total and before.subsets == after.subsets
        assert not before.worst_tokens[0].top_tokens and len(after.worst_tokens[0].top_tokens) == 3
