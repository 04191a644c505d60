"""An evaluation that was interrupted, or shared by several processes, gives the figures of one that was not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Result

from neoquant.cli import Terminated
from neoquant.errors import OutputError
from neoquant.evaluation import Comparison, EvaluatedModel, ModelInfo, Suite, compare, journal, scoring
from neoquant.evaluation.journal import ResumeNote, remove_journal
from neoquant.loading.pretrained import load
from neoquant.progress import Progress


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    path = tmp_path / "texts.jsonl"
    texts = [f"{subset} text {n}, some words of it. " * (n % 3) for n in range(12) for subset in ("one", "two")]
    rows = [{"text": text, "meta": {"pile_set_name": text[:3] or "one"}} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    return Suite(name="mine", context=16, data={"kind": "file", "path": str(path)})


@pytest.fixture
def evaluated(tiny_model: Path, make_model: Callable[..., Path]) -> tuple[list[EvaluatedModel], Any]:
    model, tokenizer = load(tiny_model, dtype="float32", device="cpu")
    others = [load(make_model(f"other{seed}", seed=seed), dtype="float32", device="cpu")[0] for seed in (1, 2)]
    return [EvaluatedModel(m, ModelInfo(name=str(n), sha256=str(n))) for n, m in enumerate([model, *others])], tokenizer


@pytest.fixture(autouse=True)
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CPU_LIMITS", scoring.BatchLimits(positions=64, rows=11))
    monkeypatch.setattr(journal, "INTERVAL", 0.0)


def figures(result: Comparison) -> dict[str, Any]:
    """Everything but the time it took."""
    fields: dict[str, Any] = json.loads(result.to_json())
    for evaluation in (fields["reference"], *(candidate["evaluation"] for candidate in fields["candidates"])):
        del evaluation["seconds"], evaluation["created"]
    return fields


class Stops(Progress):
    """A listener that is interrupted after some calls."""

    def __init__(self, after: int, error: type[BaseException], during: str = "scoring") -> None:
        self.left, self.error, self.during = after, error, during

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
        def advance(amount: float) -> None:
            self.left -= label == self.during
            if self.left < 0:
                raise self.error

        yield advance


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_going_on_gives_the_same_figures(
    evaluated: Any, suite: Suite, tmp_path: Path, error: type[BaseException]
) -> None:
    (base, *others), tokenizer = evaluated
    whole = compare(base, others, tokenizer, suite)
    kept = tmp_path / "result.json.partial"
    for after in (7, 40):
        with pytest.raises(error), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(base, others, tokenizer, suite, journal=kept, progress=Stops(after, error))
        assert kept.is_file()
    with pytest.warns(ResumeNote, match=r"resuming from .*partial: \d+ of \d+ batches are scored"):
        resumed = compare(base, others, tokenizer, suite, journal=kept)
    assert figures(resumed) == figures(whole)
    assert kept.is_file(), "until the result is stored"
    with pytest.warns(ResumeNote):
        assert figures(compare(base, others, tokenizer, suite, journal=kept)) == figures(whole)
    remove_journal(kept)
    assert not list(tmp_path.glob("*.partial*"))


def test_another_evaluation_starts_anew(evaluated: Any, suite: Suite, tmp_path: Path) -> None:
    (base, *others), tokenizer = evaluated
    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        compare(base, others, tokenizer, suite, journal=kept, progress=Stops(9, KeyboardInterrupt))
    longer = suite.override(context=20)
    with pytest.warns(ResumeNote, match="is of another evaluation or damaged"):
        result = compare(base, others, tokenizer, longer, journal=kept)
    assert figures(result) == figures(compare(base, others, tokenizer, longer))
    kept.write_bytes(kept.read_bytes()[:-99])
    with pytest.warns(ResumeNote, match="damaged"):
        compare(base, others, tokenizer, suite, journal=kept)
    kept.write_bytes(b"somebody's notes")
    with pytest.raises(OutputError, match="is no journal of neoquant, and would be replaced"):
        compare(base, others, tokenizer, suite, journal=kept)
    assert kept.read_bytes() == b"somebody's notes"


WORDS = ("--data", "texts.jsonl", "--context", "16")
ONE_BATCH_AT_A_TIME = """
import sys
from neoquant.evaluation import journal, scoring
journal.INTERVAL = 0
scoring.CPU_LIMITS = scoring.BatchLimits(positions=64, rows=11)
if "slow" in sys.argv:
    import time
    sys.argv.remove("slow")
    add = scoring.Accumulator.add
    scoring.Accumulator.add = lambda *a: (time.sleep(0.2), add(*a))
from neoquant.cli import run
run()
"""


def start(folder: Path, *words: str, ranks: int = 1) -> subprocess.Popen[str]:
    script = folder / "run.py"
    script.write_text(ONE_BATCH_AT_A_TIME)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launch, str(script), *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_killed_and_shared(suite: Suite, tiny_model: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """One process; one that is killed outright and started again; two and four processes: the same file and table."""
    words = ("compare", str(tiny_model), str(make_model("other", seed=1)), *WORDS)
    running = {
        name: start(tmp_path, *words, "--json", f"{name}.json", ranks=ranks)
        for name, ranks in (("alone", 1), ("two", 2), ("four", 4))
    }
    killed = start(tmp_path, *words, "--json", "killed.json", "slow")
    partial = tmp_path / "killed.json.partial"
    while killed.poll() is None and not partial.exists():
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert partial.exists()
    tables = {name: finished(process) for name, process in running.items()}
    again = start(tmp_path, *words, "--json", "killed.json")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and "resuming from killed.json.partial" in err
    tables["killed"] = out
    expected = figures(Comparison.from_json((tmp_path / "alone.json").read_text()))
    for name, table in tables.items():
        assert figures(Comparison.from_json((tmp_path / f"{name}.json").read_text())) == expected, name
        assert table.splitlines()[:-1] == tables["alone"].splitlines()[:-1]  # the last line says how long it took
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("error", "code", "word"), [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")]
)
@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_the_last_line_says_how_to_go_on(
    cli: Cli, tiny_model: Path, suite: Suite, verb: str, error: type[BaseException], code: int, word: str
) -> None:
    models = (tiny_model,) if verb == "eval" else (tiny_model, tiny_model)
    words = (verb, *models, "--data", suite.data.path, "--context", "16")  # type: ignore[union-attr]

    def stopped(after: int, *more: str, task: str = "scoring") -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("neoquant.cli.terminal.Notes.task", Stops(after, error, task).task)
            return cli(*words, *more)

    ended = stopped(3)
    assert ended.code == code
    hint = "nothing is kept; with --json FILE the same command would resume"
    assert ended.error == f"{word} before the end: {hint}"
    assert hint in stopped(3, "--json", "-").error
    early = stopped(0, "--json", "x.json", task="reading texts.jsonl")
    assert early.error == f"{word} before anything was scored: the same command starts again"
    begun = stopped(0, "--json", "x.json")
    assert re.fullmatch(rf"{word} after 0 of \d+ batches: the same command resumes from x.json.partial", begun.error)
    kept = stopped(40, "--json", "x.json")
    assert kept.code == code and "damaged" not in kept.err
    last = kept.err.splitlines()[-1]
    assert re.fullmatch(rf"{word} after [1-9]\d* of \d+ batches: the same command resumes from x.json.partial", last)
    done = cli(*words, "--json", "x.json")
    assert done.code == 0 and "resuming from x.json.partial" in done.err
    assert not list(Path.cwd().glob("*.partial*"))
