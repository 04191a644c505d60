"""Suites: those that come with the package, files of one's own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from neoquant.data.pile import PILE, pile_subsets
from neoquant.data.suite import FileData, HubData
from neoquant.errors import DataError, RequestError
from neoquant.evaluation import load_suite, suite_names

OWN = """
name = "own"
context = 128
subsets = ["ArXiv"]
documents = 3
[data]
kind = "file"
path = "texts.jsonl"
"""


def test_bundled_suites_are_what_their_names_say() -> None:
    assert {
        "demo",
        "pile-smoke",
        "pile-core",
        "pile-full",
        "pile-uncopyrighted",
        "pile-val",
        "lambada",
        "wikitext2",
    } <= set(suite_names())
    for name in suite_names():
        suite = load_suite(name)
        assert suite.name == name and suite.description
        assert suite.fitted(2048).context in (512, 2048)
        if isinstance(suite.data, HubData) and name != "lambada":
            assert len(suite.data.revision) == 40, "a pinned commit"


def test_own_suite_finds_its_data_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    suite = load_suite(path)
    assert isinstance(suite.data, FileData) and suite.data.path == str(tmp_path / "texts.jsonl")
    assert suite.subsets == ("ArXiv",) and suite.protocol == "rolling"


def test_override() -> None:
    demo = load_suite("demo")
    assert demo.override() == demo
    assert demo.override(context=256).sha256 == demo.sha256
    assert demo.override(documents=2).sha256 is None
    other = load_suite("pile-val").override(file="sample.jsonl", documents=4, protocol="strided", stride=100)
    assert (other.name, other.subsets, other.documents, other.stride) == ("sample.jsonl", (), 4, 100)
    assert other.override(protocol="rolling").stride is None
    assert other.override(stride=50).fitted(2048).context == 2048
    assert demo.override(protocol="strided").fitted(512).stride == 256


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "no suite 'nothing': give one of demo, lambada, pile-core"),
        ("x.toml", "no suite 'x.toml'"),
        ("", "no suite"),
    ],
)
def test_unknown_suite(name: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        load_suite(name)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("documents = 3", "docs = 3", r"own\.toml: docs: Extra inputs are not permitted"),
        ("documents = 3", 'documents = "3"', r"documents: .*found '3'"),
        ("documents = 3", "documents = 0", r"documents: .*greater than or equal to 1 \(found 0\)"),
        ('kind = "file"', 'kind = "tape"', "data: .*'stdlib', 'file', 'hub'"),
        ("context = 128", "stride = 4", "stride belongs to the strided protocol, not to rolling"),
        ("context = 128", 'protocol = "strided"\ncontext = 8\nstride = 8', "stride 8 must be less than the context, 8"),
        ("context = 128", "context = ", r"own\.toml: "),
    ],
)
def test_bad_suite_files(tmp_path: Path, old: str, new: str, reason: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(DataError, match=reason):
        load_suite(path)


def test_illegal_overrides_are_requests() -> None:
    demo = load_suite("demo")
    with pytest.raises(RequestError, match="stride belongs to the strided protocol"):
        demo.override(stride=5)
    with pytest.raises(RequestError, match=r"documents: .*found 0"):
        demo.override(documents=0)
    with pytest.raises(RequestError, match="stride 600 must be less than the context, 512"):
        demo.override(protocol="strided", stride=600)
    with pytest.raises(RequestError, match="context of 512 tokens, but the model has 128 positions"):
        demo.fitted(128)


@pytest.mark.parametrize(
    ("name", "subset"),
    [
        ("pile_cc", "Pile-CC"),
        ("CC", "Pile-CC"),
        ("wikipedia", "Wikipedia (en)"),
        ("Wikipedia (EN)", "Wikipedia (en)"),
        ("dm-mathematics", "DM Mathematics"),
        ("uspto", "USPTO Backgrounds"),
        ("Gutenberg", "Gutenberg (PG-19)"),
        ("youtube", "YoutubeSubtitles"),
    ],
)
def test_subsets_of_the_pile_by_loose_names(name: str, subset: str) -> None:
    for suite in ("pile-smoke", "pile-core", "pile-full"):
        assert load_suite(suite).override(subsets=(name, subset)).subsets == (subset,)


def test_every_subset_of_the_pile_is_known_by_its_name() -> None:
    assert len(PILE) == 22 and pile_subsets(PILE) == PILE
    assert set(load_suite("pile-val").subsets) == set(PILE)
    assert set(load_suite("pile-uncopyrighted").subsets) < set(PILE)


def test_what_is_no_subset_of_the_pile_lists_them() -> None:
    with pytest.raises(
        RequestError, match=r"no subset 'githab'; did you mean Github\? it has ArXiv, .*YoutubeSubtitles"
    ):
        load_suite("pile-core").override(subsets=("githab",))
    with pytest.raises(RequestError, match="'pubmed' may be PubMed Abstracts or PubMed Central: say which"):
        load_suite("pile-core").override(subsets=("pubmed",))
    with pytest.raises(RequestError, match="no subset ''; it has"):
        load_suite("pile-core").override(subsets=("",))
    assert load_suite("pile-core").override(file="own.jsonl", subsets=("mine",)).subsets == ("mine",)
