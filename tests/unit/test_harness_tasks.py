"""`--task`: tasks of lm-evaluation-harness on neoquant's model, against lm_eval's own `hf` model and its own loop.

The tasks are defined here, over small files: lm_eval finds and reads them as it does its own.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, write_tiny_model

import neoquant
from neoquant.demo import MODEL
from neoquant.errors import DataError, RequestError
from neoquant.evaluation import EvaluatedModel, ModelInfo
from neoquant.evaluation.answers import Answers
from neoquant.evaluation.harness import KINDS, read_tasks
from neoquant.evaluation.task_result import TaskComparison, TaskEvaluation
from neoquant.evaluation.task_scores import evaluate_tasks
from neoquant.progress import SILENT

harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed: pip install lm_eval")
transformers = pytest.importorskip("transformers")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from neoquant.evaluation.harness_model import HarnessModel  # noqa: E402  # it needs lm_eval

WORDS = [word for word in Path(neoquant.__file__).with_name("errors.py").read_text().split(" ") if word.strip()]

TASK = """task: {name}
tag: local_tasks
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
output_type: {kind}
test_split: test
training_split: train
doc_to_text: "{text}"
doc_to_target: "{target}"
{choice}
metric_list: [{metrics}]
metadata: {{version: 3.0}}
"""


def write_tasks(folder: Path) -> Path:
    """`choose` (multiple choice), `complete` (one continuation; accuracy and perplexity), `write` (generation), `whole`
    (perplexity of texts), `group` of the first two."""
    folder.mkdir()
    draw = random.Random(5)
    rows = [
        {
            "question": " ".join(draw.sample(WORDS, draw.randint(1, 12))),
            "choices": [" ".join(draw.sample(WORDS, draw.randint(1, 4))) or "x" for _ in range(3)],
            "label": draw.randrange(3),
            "word": draw.choice("ab") + draw.choice("cd"),
        }
        for _ in range(24)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choose = {"choice": "doc_to_choice: choices", "metrics": "{metric: acc}, {metric: acc_norm}", "target": "label"}
    acc = {"choice": "", "metrics": "{metric: acc}, {metric: perplexity}", "target": " {{word}}"}
    exact = {"choice": "", "metrics": "{metric: exact_match}", "target": "{{word}}"}
    byte = {"choice": "", "metrics": "{metric: bits_per_byte}", "target": "{{question}}"}
    kinds = {
        "choose": ("multiple_choice", choose, "{{question}}"),
        "complete": ("loglikelihood", acc, "{{question}}"),
        "write": ("generate_until", exact, "{{question}}"),
        "whole": ("loglikelihood_rolling", byte, ""),
    }
    for name, (kind, fields, text) in kinds.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, kind=kind, text=text, **fields))
    (folder / "group.yaml").write_text("group: group\ntask: [choose, complete]\n")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the data sets' library prepares does not stay."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def requests() -> list[Any]:
    """Ragged: no context, trailing spaces, one token, beyond the context's length, the same twice."""
    draw = random.Random(3)
    pairs = [("", "def f"), ("a line ", "with more"), ("return", " x"), (" ".join(WORDS[:900]), " the end of it")]
    for _ in range(20):
        context = " ".join(draw.sample(WORDS, draw.randint(0, 60)))
        pairs.append((context, " " + " ".join(draw.sample(WORDS, draw.randint(1, 9)))))
    return [Instance("loglikelihood", {}, pair, 0) for pair in [*pairs, pairs[5]]]


def test_a_context_of_nothing_but_spaces_stands_for_none() -> None:
    lm = adapter(MODEL)
    blank, none = (lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)]) for pair in (("  ", "x"), ("", "  x")))
    assert blank == none


def adapter(folder: Path) -> HarnessModel:
    model, tokenizer = neoquant.load(folder, dtype=torch.float32, device="cpu")
    context = model.config.max_position_embeddings
    return HarnessModel(model, tokenizer, context=context, answers=Answers(None, ""), number=0, progress=SILENT)


def test_log_likelihoods_are_those_of_the_harness() -> None:
    """On the bundled weights in float32, against transformers' network."""
    theirs = harness.HFLM(pretrained=str(MODEL), device="cpu", dtype="float32", batch_size=3)
    wanted = theirs.loglikelihood(requests(), disable_tqdm=True)
    found = adapter(MODEL).loglikelihood(requests())
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert len({round(value, 3) for value, _ in found}) > 20


@pytest.mark.parametrize("recipe", ["nf4", "int8", "hqq3", "mxfp4"])
def test_every_format_answers(tmp_path: Path, recipe: str) -> None:
    """With quantized embeddings where the format holds them; against the whole logits, a request at a time."""
    neoquant.quantize(MODEL, tmp_path / "q", recipe)
    lm = adapter(tmp_path / "q")
    found = lm.loglikelihood(requests()[:8])
    for request, (nats, greedy) in zip(requests()[:8], found, strict=True):
        context, continuation = request.args
        spaces = len(context) - len(context.rstrip())
        stem = context[: len(context) - spaces]
        before = lm.tok_encode(stem) if stem else [lm.prefix_token_id]
        ids = lm.tok_encode(context + continuation) if stem else [*before, *lm.tok_encode(continuation)]
        length = len(ids) - len(before)
        ids = ids[-lm.context - 1 :]
        with torch.inference_mode():
            logits = lm.model(torch.tensor([ids[:-1]])).logits[0, -length:].double()
        target = torch.tensor(ids[-length:])
        assert nats == pytest.approx(float(logits.log_softmax(-1).gather(-1, target[:, None]).sum()), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("fewshot", [0, 2])
def test_scores_are_those_of_the_harness(tasks: Path, fewshot: int) -> None:
    model, tokenizer = neoquant.load(MODEL, dtype=torch.float32, device="cpu")
    found = read_tasks(["group"], tasks, fewshot, SILENT)
    (ours,) = evaluate_tasks([EvaluatedModel(model, ModelInfo(name="demo"))], tokenizer, found, documents=10)
    theirs = simple_evaluate(
        harness.HFLM(pretrained=str(MODEL), device="cpu", dtype="float32"),
        tasks=["choose", "complete"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=fewshot,
        limit=10,
        bootstrap_iters=0,
    )
    scores = {(score.task, metric.name): metric for score in ours.tasks for metric in score.metrics}
    assert list(scores) == [("choose", "acc"), ("choose", "acc_norm"), ("complete", "acc")]
    for (task, metric), score in scores.items():
        assert score.value == pytest.approx(theirs["results"][task][f"{metric},none"])
        assert list(score.values) == [sample[metric] for sample in theirs["samples"][task]]
    assert 0 < scores["choose", "acc"].value < 1
    assert [score.fewshot for score in ours.tasks] == [fewshot] * 2
    assert {score.documents for score in ours.tasks} == {10} and {score.version for score in ours.tasks} == {"3.0"}
    assert ours.notes == ("complete: perplexity left out, since no mean over documents",)
    assert ours.means[0].value == pytest.approx((scores["choose", "acc"].value + scores["complete", "acc"].value) / 2)


def test_eval_and_compare(cli: Cli, tasks: Path, tmp_path: Path) -> None:
    """The saved results of two models give the comparison of both, document by document."""
    base, words = (
        write_tiny_model(tmp_path / "base", max_position_embeddings=512),
        ("--task", "group", "--task-path", tasks),
    )
    assert cli("quantize", base, "--type", "nf4", "--out", "nf4").code == 0
    for name in (base, "nf4"):
        assert cli("eval", name, *words, "--json", f"{Path(name).name}.json").code == 0
    result = cli("compare", base, "nf4", *words, "--json", "both.json")
    assert result.code == 0 and "nf4 against base" in result.out and not Path("both.json.partial").exists()
    assert cli("compare", "base.json", "nf4.json", "--json", "saved.json").code == 0
    both, saved = (TaskComparison.from_json(Path(name).read_text()) for name in ("both.json", "saved.json"))
    assert both.candidates[0].changes == saved.candidates[0].changes
    first = both.reference.tasks[0]
    assert (first.task, first.source, first.documents) == ("choose", "questions.jsonl", 24)


def test_an_interrupted_run_resumes(cli: Cli, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is answered twice, and the result is that of one run."""
    base, words = (
        write_tiny_model(tmp_path / "base", max_position_embeddings=512),
        ("--task", "group", "--task-path", tasks, "--json"),
    )
    assert cli("eval", base, *words, "whole.json").code == 0
    add, asked = Answers.add, []

    def interrupt(self: Answers, answers: dict[str, Any]) -> None:
        add(self, answers)
        asked.extend(answers)
        if len(asked) > 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "add", interrupt)
    assert cli("eval", base, *words, "parts.json").code == 130
    again: list[str] = []
    monkeypatch.setattr(Answers, "add", lambda self, answers: (add(self, answers), again.extend(answers))[0])
    assert cli("eval", base, *words, "parts.json").code == 0
    assert again and not set(again) & set(asked)
    one, two = (TaskEvaluation.from_json(Path(name).read_text()) for name in ("whole.json", "parts.json"))
    assert one.tasks == two.tasks and not Path("parts.json.partial").exists()


def test_documents_that_were_calibrated_on_are_counted(tasks: Path) -> None:
    from neoquant.data.fingerprints import fingerprint

    rows = [json.loads(line) for line in (tasks / "questions.jsonl").read_text().splitlines()]
    known = frozenset({fingerprint(rows[1]["question"]), fingerprint(f"{rows[4]['question']} {rows[4]['word']}")})
    model, tokenizer = neoquant.load(MODEL, dtype=torch.float32, device="cpu")
    entry = EvaluatedModel(model, ModelInfo(name="demo"), known)
    (result,) = evaluate_tasks([entry], tokenizer, read_tasks(["complete"], tasks, None, SILENT), documents=6)
    assert result.tasks[0].calibrated_on == 2
    assert "demo was calibrated on 2 of the 6 documents of complete: its figures flatter it" in result.notes


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["write"], "write cannot be run: its answers are generated text"),
        (["choose", "whole"], "whole cannot be run: it measures the perplexity of texts: --suite"),
        (["local_tasks"], "cannot be run"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_before_their_data_is_read(
    cli: Cli, tasks: Path, names: list[str], says: str
) -> None:
    result = cli("eval", "nowhere", "--task-path", tasks, *(word for name in names for word in ("--task", name)))
    assert result.code == 2 and says in result.error
    assert "write" not in KINDS


def test_an_unknown_task_names_what_is_near(cli: Cli, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder's and the harness's own, whose index takes half a minute: here it is the folder's alone."""
    import lm_eval.tasks

    class Few(TaskManager):  # type: ignore[misc]
        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    result = cli("eval", "nowhere", "--task", "chose", "--task-path", tasks)
    assert result.code == 2 and "has no task 'chose'; near it are choose" in result.error
    assert "is not a folder" in cli("eval", "nowhere", "--task", "choose", "--task-path", "none").error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("questions.jsonl", "none.jsonl"), "choose cannot be loaded: FileNotFoundError"),
        (("{{question}}", "{{answer.text}}"), "choose cannot be loaded: UndefinedError"),
        (("doc_to_choice: choices", "doc_to_choice: missing"), "choose cannot be loaded"),
        (("{metric: acc}, {metric: acc_norm}", "{metric: mcc}"), "none of its metrics (mcc) is a mean"),
        (("output_type: multiple_choice", "output_type: other"), "its kind is other"),
    ],
)
def test_damaged_definitions(cli: Cli, tasks: Path, tmp_path: Path, change: tuple[str, str], says: str) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "choose.yaml").write_text((tasks / "choose.yaml").read_text().replace(*change))
    assert says in cli("eval", "nowhere", "--task", "choose", "--task-path", folder).error


def test_the_hub_is_not_reached(cli: Cli, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub (offline mode)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    result = cli("eval", "nowhere", "--task", "choose", "--task-path", tasks)
    assert result.code == 1 and "choose cannot be loaded: ConnectionError: Couldn't reach" in result.error


def test_a_continuation_beyond_the_context(tasks: Path) -> None:
    model, tokenizer = neoquant.load(MODEL, dtype=torch.float32, device="cpu")
    entry, found = EvaluatedModel(model, ModelInfo(name="demo")), read_tasks(["choose"], tasks, None, SILENT)
    with pytest.raises(DataError, match=r"choose: the continuation .* has \d+ tokens; 1 to 2 can be scored"):
        evaluate_tasks([entry], tokenizer, found, context=2)
    with pytest.raises(RequestError, match="a context of 100,000 tokens"):
        evaluate_tasks([entry], tokenizer, found, context=100_000)
