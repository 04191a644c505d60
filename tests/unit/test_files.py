"""Files are written whole or not at all, and read within bounds."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from neoquant.checkpoint.headers import MAX_HEADER_BYTES
from neoquant.data import documents
from neoquant.data.zstd_frames import MAX_WINDOW
from neoquant.errors import DataError, OutputError, RecipeError, RequestError
from neoquant.files import reading
from neoquant.files.names import is_safe_name, safe_name
from neoquant.files.reading import read_json, read_text, read_toml
from neoquant.files.writing import replacing, write_file
from neoquant.model.config_values import MAX_LAYERS, MAX_SIZE
from neoquant.tokenizer.bounds import MAX_GROWTH, MAX_TOKEN


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_file(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: in a process of its own, with the old file there."""
    path = tmp_path / "x.json"
    path.write_text("old")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from neoquant.files.writing import write_file\n"
        "write_file(sys.argv[1], 'x' * 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "OutputError" in done.stderr and "x.json cannot be written: File too large" in done.stderr
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_mode_and_links_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "x.json", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_file(link, "new")
    assert link.is_symlink() and path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640
    umask = os.umask(0o022)
    try:
        write_file(tmp_path / "fresh", "x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o644


def test_devices_are_written_to(tmp_path: Path) -> None:
    write_file("/dev/null", "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(OutputError, match="nowhere/x cannot be written: No such file"):
        write_file(tmp_path / "nowhere" / "x", "x")


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (Path("/dev/zero"), "is a device or a pipe"),
        (tmp_path / "pipe", "is a device or a pipe"),
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere", "there is no such file"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=reason):
            read_toml(path, error=RecipeError)


def test_long_files_are_refused_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(reading.MAX_BYTES + 1)
    with pytest.raises(DataError, match=r"x\.json: has 16,777,217 bytes, and at most 16,777,216 are read; set"):
        read_text(path, error=DataError)
    monkeypatch.setenv(reading.VARIABLE, "17MB")
    assert len(read_text(path, error=DataError)) == reading.MAX_BYTES + 1
    monkeypatch.setenv(reading.VARIABLE, "much")
    with pytest.raises(RequestError, match="NEOQUANT_MAX_FILE_SIZE 'much' is not a size"):
        read_text(path, error=DataError)


def test_the_bounds_are_documented() -> None:
    """The guide's table has every bound, and the variable that raises it."""
    guide = Path(__file__).parents[2].joinpath("docs", "guide.md").read_text("utf-8")
    rows = [row for row in guide.partition("## Bounds")[2].partition("\n## ")[0].splitlines() if row.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    stated = [(int(most.split()[0].replace(",", "")), more.strip("`")) for _, most, more in cells]
    assert stated == [
        (reading.MAX_BYTES, reading.VARIABLE),
        (reading.MAX_LARGE_BYTES, reading.VARIABLE),
        (documents.MAX_TEXT_BYTES, documents.VARIABLE),
        (documents.MAX_FILE_BYTES, reading.VARIABLE),
        (MAX_WINDOW, ""),
        (MAX_HEADER_BYTES, ""),
        (MAX_LAYERS, ""),
        (MAX_SIZE, ""),
        (MAX_TOKEN, ""),
        (MAX_GROWTH, ""),
    ]


def test_what_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, reason in ((b"{", "not JSON"), (b"[" * 99_999, "nested too deeply"), (b"\xff", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"x\.json: .*{reason}"):
            read_json(path, error=DataError)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_names_that_are_parts_of_paths() -> None:
    for name in ("nf4", "gptq-3.1_x", "ä", ".hidden"):
        assert is_safe_name(name) and safe_name(name) == name
    for name in ("", ".", "..", "...", "a/b", "../x", "a\\b", "a b", "a\n", "x" * 300, "\x1b[31m"):
        assert not is_safe_name(name) and is_safe_name(safe_name(name))
