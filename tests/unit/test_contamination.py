"""Evaluation text that a model was calibrated on: found however it is cut, said, and left out where that is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import Bytes
from conftest import Cli
from hypothesis import given
from hypothesis import strategies as st

from neoquant import load
from neoquant.calibration.dataset import draw, drawn_from, load_calibration
from neoquant.data.documents import read_documents
from neoquant.data.fingerprints import fingerprint
from neoquant.errors import DataError
from neoquant.evaluation import EvaluatedModel, ModelInfo, Suite, compare, evaluate, load_suite
from neoquant.progress import SILENT

TEXTS = [f"{letter} text of its own, {number} " * 3 for number, letter in enumerate("abcdef")]


def write(path: Path, texts: list[str]) -> Path:
    rows = [json.dumps({"text": text, "meta": {"pile_set_name": "AB"[n % 2]}}) for n, text in enumerate(texts)]
    path.write_text("\n".join(rows))
    return path


def suite(path: Path, **fields: Any) -> Suite:
    return Suite(name="mine", data={"kind": "file", "path": str(path)}, **fields)


@given(
    texts=st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=6),
    rows=st.integers(1, 3),
    length=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_rows_are_traced_to_their_texts(texts: list[list[int]], rows: int, length: int, seed: int) -> None:
    """Ids that name their text show what a row holds."""
    named = [[number + 1] * len(text) for number, text in enumerate(texts)]
    if sum(len(text) + 1 for text in texts) < length:
        return
    drawn = draw(named, 0, rows, length, seed)
    assert drawn_from(texts, rows, length, seed) == sorted({int(n) - 1 for n in drawn.flatten() if n})


def test_a_document_is_known_however_it_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", TEXTS)
    whole = [document.fingerprint for document in read_documents(suite(path), SILENT)[1]]
    cut = [document.fingerprint for document in read_documents(suite(path, characters=3), SILENT)[1]]
    assert whole == cut == [fingerprint(text) for text in TEXTS] and len(set(whole)) == len(TEXTS)
    assert fingerprint(f" {TEXTS[0]}\n") == whole[0]
    rows = load_calibration(path, Bytes(), rows=50, length=8)
    assert set(rows.documents) == set(whole)
    (one,) = load_calibration(path, Bytes(), rows=1, length=1, seed=2).documents
    assert one in whole and "documents" not in rows.describe()


@pytest.mark.parametrize("protocol", ["rolling", "joined"])
def test_what_was_calibrated_on_is_counted_or_left_out(tiny_model: Path, tmp_path: Path, protocol: str) -> None:
    model = load(tiny_model, device="cpu")[0]
    known = frozenset(fingerprint(TEXTS[number]) for number in (1, 4)) | {"of another text"}
    path, rest = write(tmp_path / "all.jsonl", TEXTS), tmp_path / "rest.jsonl"
    rows = path.read_text().splitlines()
    rest.write_text("\n".join(rows[number] for number in (0, 2, 3, 5)))
    chosen = suite(path, protocol=protocol, context=16)

    met = evaluate(model, Bytes(), chosen, describe=ModelInfo(name="it"), calibrated_on=known)
    assert (met.calibrated_on, met.data.excluded) == (2, 0)
    assert met.notes[-1].startswith("it was calibrated on 2 of the 6 documents: its figures flatter it; leave them")
    plain, other = EvaluatedModel(model, ModelInfo(name="base")), EvaluatedModel(model, ModelInfo(name="it"), known)
    result = compare(plain, [other], Bytes(), chosen, exclude_calibrated=True)
    expected = evaluate(model, Bytes(), suite(rest, protocol=protocol, context=16), describe=ModelInfo(name="x"))
    for evaluation in (result.reference, result.candidates[0].evaluation):
        assert (evaluation.calibrated_on, evaluation.data.excluded) == (0, 2)
        assert evaluation.total.nats == pytest.approx(expected.total.nats) and evaluation.total.documents == 4
        assert "calibrated on and left out: 2 of 6 documents" in evaluation.notes
    paired = compare(plain, [other], Bytes(), chosen)
    assert [paired.reference.calibrated_on, paired.candidates[0].evaluation.calibrated_on] == [0, 2]

    subset = frozenset(fingerprint(text) for text in TEXTS[1::2])
    gone = evaluate(
        model, Bytes(), chosen, describe=ModelInfo(name="it"), calibrated_on=subset, exclude_calibrated=True
    )
    assert [score.subset for score in gone.subsets] == ["A"]
    assert "calibrated on and left out: 3 of 6 documents, with them all of B" in gone.notes
    everything = frozenset(map(fingerprint, TEXTS))
    with pytest.raises(DataError, match="calibrated on all of 6 documents"):
        evaluate(
            model, Bytes(), chosen, describe=ModelInfo(name="it"), calibrated_on=everything, exclude_calibrated=True
        )


def test_the_command_line_says_it(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    shown, unseen = write(tmp_path / "shown.jsonl", TEXTS[:2]), write(tmp_path / "all.jsonl", TEXTS[:4])
    given = ("--calibration", shown, "--rows", "20", "--length", "16")
    assert cli("quantize", tiny_model, "--type", "gptq", "--group-size", "16", *given, "--out", "made").code == 0
    record = json.loads(Path("made/calibration.json").read_text())
    assert sorted(record["documents"]) == sorted(map(fingerprint, TEXTS[:2]))
    result = cli("compare", tiny_model, "made", "--data", unseen, "--json", "cost.json")
    assert "note: made was calibrated on 2 of the 4 documents: its figures flatter it" in result.err
    result = cli("compare", tiny_model, "made", "--data", unseen, "--exclude-calibrated", "--json", "cost.json")
    assert "calibrated on and left out: 2 of 4 documents" in result.err and "flatter" not in result.err
    assert json.loads(Path("cost.json").read_text())["reference"]["data"]["excluded"] == 2
    assert "flatter" in cli("eval", "made", "--data", unseen).err
    assert "flatter" not in cli("eval", tiny_model, "--data", unseen).err
    look = ("inspect", "made", "--against", tiny_model, "--data", unseen, "--json", "layers.json")
    assert "made was calibrated on 2 of the 4 documents: its figures flatter it" in cli(*look).err
    assert json.loads(Path("layers.json").read_text())["calibrated_on"] == 2
    assert "calibrated on and left out: 2 of 4 documents" in cli(*look, "--exclude-calibrated").err
    assert json.loads(Path("layers.json").read_text())["data"]["excluded"] == 2
    assert "calibrated on all of 2 documents" in cli("eval", "made", "--data", shown, "--exclude-calibrated").error


def test_calibration_on_the_pile(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    pile = load_suite("pile-uncopyrighted")
    asked: dict[str, Any] = {}

    class Rows:
        info = datasets.DatasetInfo()

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for number in range(12):
                for subset in pile.subsets:
                    yield {"text": f"{subset} {number} " * 5000, "meta": {"pile_set_name": subset}}

    def load_dataset(name: str, **options: Any) -> Rows:
        asked.update(options, name=name)
        return Rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert pile.data.kind == "hub" and pile.characters is not None and pile.documents is not None
    drawn = load_calibration("pile", Bytes(), rows=40, length=64, seed=3)
    assert asked["name"] == pile.data.dataset and asked["revision"] == pile.data.revision
    assert drawn.ids.shape == (40, 64) and pile.data.revision in drawn.source
    possible = {fingerprint(f"{name} {number} " * 5000) for name in pile.subsets for number in range(pile.documents)}
    assert 20 < len(drawn.documents) <= 80 and set(drawn.documents) <= possible


def test_calibration_for_the_bundled_model_and_its_suite_share_nothing() -> None:
    drawn = load_calibration("demo", Bytes(), rows=2000, length=512)
    held_out = {document.fingerprint for document in read_documents(load_suite("demo"), SILENT)[1]}
    assert len(drawn.documents) > 20 and held_out.isdisjoint(drawn.documents)
    assert drawn.source.startswith("Python standard library at 3.")
