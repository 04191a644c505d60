"""Scores on tasks: means and changes of made-up values, saved and compared, in every kind of report. No model runs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from conftest import Cli
from results import HOSTILE, make_candidate, make_comparison, make_evaluation

from neoquant.errors import DataError, OutputError, RequestError
from neoquant.evaluation.answers import Answers, digest
from neoquant.evaluation.proportions import mean_score_interval, paired_interval
from neoquant.evaluation.task_result import MetricScore, TaskComparison, TaskEvaluation, TaskScore
from neoquant.evaluation.task_scores import _means, compare_tasks
from neoquant.evaluation.task_thresholds import parse_task_condition, require_figures
from neoquant.report.gather import Gathered
from neoquant.report.markdown import markdown_report
from neoquant.report.page import render_page

BASE = {"piqa": [1.0, 0.0, 1.0, 1.0, 0.0], "arc_easy": [1.0, 1.0, 0.0]}
OTHER = {"piqa": [1.0, 1.0, 0.0, 1.0, 0.0], "arc_easy": [0.0, 0.0, 0.0]}


def make_tasks(name: str, values: dict[str, list[float]], **fields: object) -> TaskEvaluation:
    made = make_evaluation(name)
    scores = []
    for task, column in values.items():
        low, high = mean_score_interval(column) or (None, None)
        metric = MetricScore(
            name="acc", higher_is_better=True, value=fmean(column), low=low, high=high, values=tuple(column)
        )
        described = {"version": "1.0", "source": "hub/piqa", "fewshot": 0, "documents": len(column), "sha256": task}
        scores.append(TaskScore.model_validate({"task": task, "metrics": (metric,), **described}))
    interval = [("acc", m.value, None) for s in scores for m in s.metrics]
    described = {
        "lm_eval": "0.4.13",
        "tokenizer_sha256": "cd",
        "context": 2048,
        "seconds": 2.0,
        "created": "2026-01-01",
    }
    return TaskEvaluation.model_validate(
        {"model": made.model, "environment": made.environment, "tasks": tuple(scores), "means": _means(interval)}
        | described
        | fields
    )


def test_changes_are_paired() -> None:
    (candidate,) = compare_tasks([make_tasks("base", BASE), make_tasks("nf4", OTHER)]).candidates
    piqa, arc = candidate.changes
    assert (piqa.task, piqa.metric, piqa.gained, piqa.lost) == ("piqa", "acc", 1, 1) and piqa.value == 0
    assert (arc.gained, arc.lost) == (0, 2) and arc.value == pytest.approx(-2 / 3)
    assert (arc.low, arc.high) == paired_interval(BASE["arc_easy"], OTHER["arc_easy"])
    (mean,) = candidate.means
    assert (mean.metric, mean.tasks) == ("acc", 2) and mean.value == pytest.approx(-1 / 3)
    assert mean.low is not None and arc.low is not None and arc.low < mean.low < mean.value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"context": 512}, "context 512, not 2048"),
        ({"tokenizer_sha256": "ef"}, r"tokenizer \(sha256\) ef, not cd"),
        ({"tasks": make_tasks("x", {**OTHER, "piqa": OTHER["piqa"][:4]}).tasks[:1]}, "tasks piqa, not piqa, arc_easy"),
    ],
)
def test_other_documents_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=f"nf4: not measured as base was: {says}"):
        compare_tasks([make_tasks("base", BASE), make_tasks("nf4", OTHER, **change)])


def test_one_result_is_not_compared() -> None:
    with pytest.raises(RequestError, match="one model"):
        compare_tasks([make_tasks("base", BASE)])


def test_a_value_is_missing() -> None:
    fields = json.loads(make_tasks("base", BASE).to_json())
    fields["tasks"][0]["metrics"][0]["values"].pop()
    with pytest.raises(DataError, match="4 values of 5 documents"):
        TaskEvaluation.from_json(json.dumps(fields))


def test_json_goes_and_comes_back() -> None:
    result = compare_tasks([make_tasks("base", BASE), make_tasks(HOSTILE, OTHER)])
    again = TaskComparison.from_json(result.to_json())
    assert again.candidates[0].changes == result.candidates[0].changes and again.reference == result.reference


def test_saved_results_are_compared_and_reported(cli: Cli) -> None:
    for name, values in (("base", BASE), ("nf4", OTHER)):
        Path(f"{name}.json").write_text(make_tasks(name, values).to_json())
    result = cli("compare", "base.json", "nf4.json", "--json", "tasks.json")
    assert result.code == 0 and "100.00" not in result.out and "66.67 → 0.00" in result.out
    assert "mean of 2 tasks" in result.out
    Path("loss.json").write_text(make_comparison(make_candidate("nf4"), base="base").to_json())
    report = cli("report", "loss.json", "tasks.json", "--html", "page.html", "--markdown", "-")
    assert report.code == 0 and "| arc_easy | acc | nf4 | 3 |" in report.out
    assert "Task by task" in Path("page.html").read_text()
    assert "66.67 → 0.00" in cli("report", "loss.json", "tasks.json").out


def test_what_is_not_compared(cli: Cli) -> None:
    Path("base.json").write_text(make_tasks("base", BASE).to_json())
    Path("tasks.json").write_text(compare_tasks([make_tasks("base", BASE), make_tasks("nf4", OTHER)]).to_json())
    Path("loss.json").write_text(make_comparison(make_candidate("nf4")).to_json())
    for words, says in (
        (("base.json", "tasks.json"), "it is a neoquant.task-comparison/1"),
        (("base.json", "loss.json"), "it is a neoquant.comparison/2"),
        (
            ("base.json", "base.json", "--fail-if", "kl > 1"),
            "these tasks have acc, delta_acc; each also with _low and _high",
        ),
        (("base.json", "base.json", "--fail-if", "delta_acc = 1"), "write it like 'delta_acc < -0.02'"),
        (("base.json", "base.json", "--task", "piqa"), "--task runs models"),
    ):
        assert says in cli("compare", *words).error
    assert "make one with neoquant compare" in cli("report", "tasks.json").error
    assert "of one model" in cli("report", "loss.json", "base.json").error


def test_conditions_end_with_3_where_they_hold(cli: Cli) -> None:
    """Of the mean over tasks, or of any task; of a metric, its change, or an end of an interval."""
    for name, values in {"base": BASE, "nf4": OTHER}.items():
        Path(f"{name}.json").write_text(make_tasks(name, values).to_json())
    (candidate,) = compare_tasks([make_tasks("base", BASE), make_tasks("nf4", OTHER)]).candidates
    (mean,), arc = candidate.means, candidate.changes[1]
    assert mean.high is not None and arc.high is not None
    for condition, holds in {
        "delta_acc < -0.3": True,
        "delta_acc < -0.34": False,
        "any:delta_acc < -0.6": True,
        "any:delta_acc > 0": False,
        "acc <= 0.3": True,
        "any:acc > 0.7": False,
        f"delta_acc_high >= {mean.high}": True,
        f"any:delta_acc_high < {arc.high}": False,
    }.items():
        result = cli("compare", "base.json", "nf4.json", "--fail-if", condition)
        assert result.code == (3 if holds else 0), condition
        assert ("failed: nf4, " in result.err) == holds
    both = cli("compare", "base.json", "nf4.json", "--fail-if", "any:delta_acc < 1", "--fail-if", "delta_acc_low < 1")
    assert [line.split(": ")[1] for line in both.err.splitlines() if line.startswith("failed")] == [
        "nf4, piqa", "nf4, arc_easy", "nf4, mean of 2 tasks",
    ]  # fmt: skip


def test_conditions_on_what_no_task_has_come_before_the_work() -> None:
    for figure, compared, legal in (
        ("acc", False, True),
        ("acc_norm_low", False, True),
        ("delta_acc", False, False),
        ("delta_acc_high", True, True),
        ("acc,strict_low", False, True),
        ("f1", True, False),
        ("low", True, False),
    ):
        conditions = [parse_task_condition(f"any:{figure} < 0.5")]
        if legal:
            require_figures(conditions, ["acc", "acc_norm"], compared)
        else:
            with pytest.raises(RequestError, match="these tasks have acc, acc_norm"):
                require_figures(conditions, ["acc", "acc_norm"], compared)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--task", "piqa", "--suite", "demo"), "--suite is for text and --task for tasks"),
        (("--task", "piqa", "--exclude-calibrated"), "--exclude-calibrated is for text"),
        (("--task", "piqa", "--fail-if", "any:acc"), "write it like 'delta_acc < -0.02'"),
        (("--task-path", "x"), "--task-path is for tasks: name one with --task"),
        (("--fewshot", "0"), "--fewshot is for tasks"),
    ],
)
def test_options_that_do_not_go_together(cli: Cli, words: tuple[str, ...], says: str) -> None:
    result = cli("eval", "nowhere", *words)
    assert result.code == 2 and says in result.error


def test_tasks_are_not_shared_among_processes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in cli("eval", "nowhere", "--task", "piqa").error


def test_without_the_harness(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    result = cli("eval", "nowhere", "--task", "piqa")
    assert result.code == 2 and "pip install 'neoquant[lm-eval]'" in result.error


def test_the_page_shows_names_as_text() -> None:
    """Of tasks, models and notes."""
    made = make_tasks("base", BASE)
    hostile = made.tasks[0].model_copy(update={"task": HOSTILE})
    results = [
        made.model_copy(update={"tasks": (hostile, *made.tasks[1:]), "notes": (HOSTILE,)}),
        make_tasks(HOSTILE, OTHER).model_copy(update={"tasks": (hostile, *make_tasks("x", OTHER).tasks[1:])}),
    ]
    tasks = (compare_tasks(results),)
    page = render_page(Gathered(make_comparison(make_candidate("nf4")), (), tasks=tasks))
    assert "<script" not in page and "&lt;script" in page and "\x1b" not in page and "\u202e" not in page
    assert "<script" not in markdown_report(make_comparison(make_candidate("nf4")), tasks=tasks)


def test_answers_are_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "result.json.partial"
    one, two = digest([1, 2], [3]), digest([1], [2, 3])
    assert one != two
    Answers(path, "key").add({one: (1.5, True)})
    with path.open("a") as file:
        file.write(f'["{two}", 2.')  # the process ended here
    with pytest.warns(UserWarning, match="1 requests are answered"):
        again = Answers(path, "key")
    assert again.get(one) == (1.5, True) and again.get(two) is None
    again.add({two: (0.1 + 0.2, False)})
    with pytest.warns(UserWarning, match="2 requests are answered"):
        assert Answers(path, "key").get(two) == (0.1 + 0.2, False)
    with pytest.warns(UserWarning, match="another evaluation"):
        assert Answers(path, "other models").get(one) is None


def test_another_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(OutputError, match="holds no answers"):
        Answers(path, "key")
    assert path.read_text() == "mine"
