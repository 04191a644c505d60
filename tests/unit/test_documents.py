"""Reading documents: every kind of data, good and bad."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from neoquant.data.documents import Document, Source, read_documents
from neoquant.data.suite import Suite
from neoquant.errors import DataError, HubError
from neoquant.progress import SILENT


def suite(path: Path, **fields: Any) -> Suite:
    return Suite(name="mine", data={"kind": "file", "path": str(path)}, **fields)


def read(chosen: Suite) -> list[Document]:
    return read_documents(chosen, SILENT)[1]


def row(text: str, subset: str | None = None) -> str:
    return json.dumps({"text": text} | ({"meta": {"pile_set_name": subset}} if subset else {}))


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    rows = [row(f"{subset} {n}", subset) for n in range(3) for subset in ("Pile-CC", "Wikipedia (en)", "ArXiv")]
    path = tmp_path / "pile.jsonl"
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return path


def test_json_lines(pile: Path) -> None:
    documents = read(suite(pile))
    assert len(documents) == 9
    assert documents[1] == Document("line 2", "Wikipedia (en)", "Wikipedia (en) 0")


def test_subsets_are_found_by_loose_names_and_limited(pile: Path) -> None:
    documents = read(suite(pile, subsets=["wikipedia", "PILE_CC"], documents=2))
    assert [(d.subset, d.text[-1]) for d in documents] == [
        ("Pile-CC", "0"),
        ("Wikipedia (en)", "0"),
        ("Pile-CC", "1"),
        ("Wikipedia (en)", "1"),
    ]


def test_documents_are_cut(pile: Path) -> None:
    assert {d.text for d in read(suite(pile, characters=3))} == {"Pil", "Wik", "ArX"}


def test_a_subset_that_is_not_there_names_those_that_are(pile: Path) -> None:
    with pytest.raises(DataError, match=r"pile\.jsonl: no document of subset 'Books3': it holds ArXiv, Pile-CC, Wiki"):
        read(suite(pile, subsets=["ArXiv", "Books3"]))


def test_zstandard(pile: Path, tmp_path: Path) -> None:
    packed = tmp_path / "pile.jsonl.zst"
    half = len(pile.read_bytes()) // 2
    frames = (pile.read_bytes()[:half], pile.read_bytes()[half:])  # a file may hold several frames
    packed.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    assert read(suite(packed)) == read(suite(pile))


def test_damaged_zstandard(pile: Path, tmp_path: Path) -> None:
    packed = tmp_path / "pile.jsonl.zst"
    packed.write_bytes(b"not zstandard at all")
    with pytest.raises(DataError, match=r"pile\.jsonl\.zst: not a whole zstandard file"):
        read(suite(packed))


def test_truncated_zstandard(tmp_path: Path) -> None:
    lines = "\n".join(row(f"{n} {n * n} {hash(str(n))}") for n in range(20_000))
    packed = tmp_path / "long.jsonl.zst"
    whole = zstandard.compress(lines.encode())
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"long\.jsonl\.zst: "):
        read(suite(packed))


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text("Ein Größenvergleich", encoding="utf-8")
    assert read(suite(path)) == [Document("essay.txt", "essay", "Ein Größenvergleich")]


def test_folder_of_texts(tmp_path: Path) -> None:
    folder = tmp_path / "essays"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.txt").write_text(name)
    assert read(suite(folder)) == [Document("a.txt", "essays", "a"), Document("b.txt", "essays", "b")]


def test_folder_of_the_piles_files(pile: Path, tmp_path: Path) -> None:
    """A local mirror: compressed or not, in the order of their names; what says no subset counts towards the folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "00.jsonl.zst").write_bytes(zstandard.compress(pile.read_bytes()))
    (folder / "01.jsonl").write_text(row("mine"))
    (folder / "README.md").write_text("nothing to read")
    documents = read(suite(folder))
    assert [d.text for d in documents[:9]] == [d.text for d in read(suite(pile))]
    assert documents[0].id == "00.jsonl.zst line 1" and len(documents) == 10
    assert (documents[9].subset, documents[9].text) == ("mirror", "mine")
    (folder / "02.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"mirror: 02\.jsonl: line 1: not JSON"):
        read(suite(folder))


def test_rows_without_a_subset_count_towards_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wikitext.jsonl"
    path.write_text(row("x") + "\n" + row("y", "ArXiv"))
    assert [d.subset for d in read(suite(path))] == ["wikitext", "ArXiv"]


def test_invalid_utf8_is_mended_and_said(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = [row("sauber").encode(), b'{"text": "br\xf6ken"}', rb'{"text": "half \ud83d, whole \ud83d\ude00"}']
    path.write_bytes(b"\n".join(lines))
    documents = read(suite(path))
    assert [d.text for d in documents] == ["sauber", "br\ufffdken", "half \ufffd, whole 😀"]
    assert [d.mended for d in documents] == [False, True, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (row("x") + "\n{half", r"data\.jsonl: line 2: not JSON"),
        ('{"content": "x"}', r"""data\.jsonl: line 1: the row has no text, only \['content'\]; expected a string"""),
        ("[1]", r"data\.jsonl: line 1: a row is \[1\], expected an object"),
        ("", r"data\.jsonl: it holds no document"),
    ],
)
def test_bad_lines(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(suite(path))


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none.jsonl", "no such file"),
        ("x.csv", r"cannot read \.csv"),
        ("empty", r"holds no \.jsonl, "),
    ):
        with pytest.raises(DataError, match=message):
            read(suite(tmp_path / name))


def test_standard_library() -> None:
    data = {"kind": "stdlib", "modules": {"code": ["heapq", "json.decoder", "json"]}, "topics": {"prose": ["debugger"]}}
    documents = read(Suite(name="own", data=data))
    assert [(d.id, d.subset) for d in documents][-2:] == [("json", "code"), ("debugger", "prose")]
    assert "def heappush" in documents[0].text and "class JSONDecoder" in documents[1].text
    assert "pdb" in documents[-1].text


@pytest.mark.parametrize(("field", "name"), [("modules", "no_such_module"), ("topics", "no-such-topic")])
def test_standard_library_without_it(field: str, name: str) -> None:
    with pytest.raises(DataError, match=name):
        read(Suite(name="own", data={"kind": "stdlib", field: {"code": [name]}}))


def hub(dataset: str, **fields: Any) -> Suite:
    data = {"kind": "hub", "dataset": dataset, "split": "train", "revision": "0" * 40}
    return Suite(name="hub", data=data, **fields)


def test_hub_through_a_folder(pile: Path) -> None:
    """`datasets` reads a folder of files as it reads a repository of the hub."""
    source, documents = read_documents(hub(str(pile.parent), subsets=["arxiv"], documents=2), SILENT)
    assert source == Source(f"{pile.parent}, train", None)
    assert documents == [Document("row 3", "ArXiv", "ArXiv 0"), Document("row 6", "ArXiv", "ArXiv 1")]


def test_hub_streams_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}
    taken = 0

    class Rows:
        info = datasets.DatasetInfo()

        def __iter__(self) -> Iterator[dict[str, Any]]:
            nonlocal taken
            while True:
                taken += 1
                yield {"text": str(taken), "meta": {"pile_set_name": "Github"}}

    def load_dataset(name: str, **options: Any) -> Rows:
        asked.update(options, name=name)
        return Rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source, documents = read_documents(hub("someone/pile", subsets=["Github"], documents=3), SILENT)
    assert asked == {"name": "someone/pile", "split": "train", "revision": "0" * 40, "streaming": True}
    assert source == Source("someone/pile, train", "0" * 40)
    assert [d.text for d in documents] == ["1", "2", "3"] and taken == 3


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, **options: Any) -> Any:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        HubError, match=r"data set someone/pile: split 'train' at revision 000000000000 .*local \.jsonl"
    ):
        read_documents(hub("someone/pile"), SILENT)
