"""Tasks of lm-evaluation-harness (`lm_eval`): found, read and scored by that library, answered by neoquant's model.

lm_eval is optional, and is imported where a task is asked for. It runs definitions and code of many authors, which
raise whatever they like: every such error becomes a DataError with the task's name.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from neoquant.data.fingerprints import fingerprint, hash_texts
from neoquant.errors import DataError, NeoquantError, RequestError, locate
from neoquant.evaluation.proportions import mean_score_interval
from neoquant.evaluation.task_result import MetricScore, TaskScore
from neoquant.progress import Progress

EXTRA = "lm-eval"
"""What `pip install neoquant[...]` calls it."""

KINDS = ("multiple_choice", "loglikelihood")
"""lm-eval's kinds of tasks that need log-likelihoods of continuations and nothing else."""

_SEED = 1234
"""lm-eval's own, of the examples before a question."""

_OTHER_KINDS = {
    "generate_until": "its answers are generated text, and neoquant runs tasks that score given continuations",
    "loglikelihood_rolling": "it measures the perplexity of texts: --suite wikitext2 and the like do",
}


class HarnessTask(NamedTuple):
    """A task of lm-eval, its data read, and the metrics that are means over documents."""

    name: str
    task: Any  # lm_eval.api.task.Task
    metrics: tuple[str, ...]
    left_out: tuple[str, ...]  # metrics that are no means


def harness_version() -> str:
    """lm-eval's. Raises RequestError, which says how to install it, where it is not."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"--task needs lm-evaluation-harness, which cannot be imported ({error}): pip install 'neoquant[{EXTRA}]'"
        ) from None
    return version("lm_eval")


def read_tasks(
    names: Sequence[str], folder: Path | None, fewshot: int | None, progress: Progress
) -> tuple[HarnessTask, ...]:
    """The tasks of these names, groups and tags taken apart, with their data from the hub or its cache.

    Args:
        names: as lm-eval knows them.
        folder: of further definitions (YAML), which come before lm-eval's own.
        fewshot: examples before each question; a task that fixes none at all keeps to that.

    Raises:
        RequestError: lm-eval is not installed, there is no task of a name, or one needs what cannot be done here.
        DataError: a definition or its data cannot be read.
    """
    harness_version()
    with _quiet():
        with progress.task("finding tasks", total=None):
            index = _index(names, folder)
        for name in names:
            for leaf, kind in _leaves(name, index.task_index):
                _require_kind(leaf, kind)
        found: dict[str, Any] = {}
        with progress.task("reading tasks", total=len(names)) as advance:
            for name in names:
                found.update(sorted(_load(index, name).items()))  # a tag's tasks come in any order
                advance(1)
    return tuple(_prepared(name, task, fewshot) for name, task in found.items())


def _index(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of definitions; that of its own, which takes half a minute, only where they are needed."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise RequestError(f"--task-path {folder} is not a folder")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    index = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in index.task_index:
            near = difflib.get_close_matches(name, index.all_tasks, 3)
            hint = f"; near it are {', '.join(near)}" if near else "; `lm-eval ls tasks` lists them"
            raise RequestError(f"lm-eval {harness_version()} has no task {name!r}{hint}")
    return index


def _leaves(name: str, index: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Every task under a name, and its kind where the definition states it: before any data is read."""
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name in ("TASK", "PY_TASK"):
        yield name, (entry.cfg or {}).get("output_type")
        return
    children = (entry.cfg or {}).get("task", []) if entry.kind.name == "GROUP" else sorted(entry.tags)
    for child in [children] if isinstance(children, str) else children:
        if isinstance(child, str) and child != name:
            yield from _leaves(child, index)


def _require_kind(name: str, kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        raise RequestError(f"{name} cannot be run: {_OTHER_KINDS.get(kind, f'its kind is {kind}')}")


def _load(index: Any, name: str) -> dict[str, Any]:
    with _naming(name, "cannot be loaded"):
        tasks: dict[str, Any] = index.load([name])["tasks"]
    return tasks


def _prepared(name: str, task: Any, fewshot: int | None) -> HarnessTask:
    from lm_eval.api.metrics import mean

    _require_kind(name, str(task.OUTPUT_TYPE))
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise RequestError(f"{name} cannot be run: it needs more than text, or runs code that lm-eval calls unsafe")
    own = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=own or 0 if fewshot is None or own == 0 else fewshot)
    aggregations = task.aggregation()
    means = tuple(metric for metric, function in aggregations.items() if function is mean)
    others = tuple(metric for metric in aggregations if metric not in means)
    if not means:
        raise RequestError(f"{name} cannot be run: none of its metrics ({', '.join(others)}) is a mean over documents")
    return HarnessTask(name, task, means, others)


def run_task(entry: HarnessTask, lm: Any, limit: int | None, calibrated_on: Collection[str]) -> TaskScore:
    """What the model behind `lm` scores on the first `limit` documents.

    Raises:
        DataError: the definition fails on a document, or a continuation cannot be scored.
    """
    name, task = entry.name, entry.task
    with _quiet(), _naming(name, "cannot be asked"), contextlib.redirect_stderr(io.StringIO()):  # tqdm's bars
        random.seed(0)
        task.set_fewshot_seed(seed=_SEED)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    instances = list(task.instances)
    repeated = [instance for instance in instances for _ in range(instance.repeats)]
    with locate(name):
        for instance, answer in zip(repeated, lm.loglikelihood(repeated), strict=True):
            instance.resps.append(answer)
    with _quiet(), _naming(name, "cannot be scored"):
        task.apply_filters()
        documents = list(task.doc_iterator(rank=0, limit=limit, world_size=1))
        asked: dict[int, list[Any]] = {}
        for instance in instances:
            asked.setdefault(instance.doc_id, []).append(instance)
        targets = [str(task.doc_to_target(document)) for _, document in documents]
        columns = _score(entry, documents, asked)
    known = frozenset(calibrated_on)
    return TaskScore(
        task=name,
        version=None if task.VERSION is None else str(_definition_version(task)),
        source=_source(task),
        fewshot=int(task.get_config("num_fewshot") or 0),
        documents=len(documents),
        sha256=hash_texts([text for i in instances for text in map(str, i.args)] + targets),
        metrics=tuple(_metric(entry, metric, values) for metric, values in columns.items()),
        calibrated_on=sum(
            not known.isdisjoint(_fingerprints(document, asked[number])) for number, document in documents
        )
        if known
        else 0,
    )


def _score(entry: HarnessTask, documents: list[tuple[int, Any]], asked: dict[int, list[Any]]) -> dict[str, list[float]]:
    """The values of every metric that is a mean, by its name and filter, a value a document."""
    columns: dict[str, list[float]] = {}
    filters = list(next(iter(asked.values()))[0].filtered_resps)
    for key in filters:
        for number, document in documents:
            instances = sorted(asked[number], key=lambda instance: instance.idx)
            found = entry.task.process_results(document, [instance.filtered_resps[key] for instance in instances])
            for metric in entry.metrics:
                if metric in found:
                    name = metric if key == "none" else f"{metric},{key}"
                    columns.setdefault(name, []).append(float(found[metric]))
    return columns


def _metric(entry: HarnessTask, name: str, values: list[float]) -> MetricScore:
    interval = mean_score_interval(values)
    return MetricScore(
        name=name,
        higher_is_better=bool(entry.task.higher_is_better().get(name.partition(",")[0], True)),
        value=sum(values) / len(values),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        values=tuple(values),
    )


def _fingerprints(document: Any, instances: list[Any]) -> Iterator[str]:
    """Of the texts by which a document may have been calibrated on: its fields, and what the model was asked."""
    if isinstance(document, dict):
        yield from (fingerprint(value) for value in document.values() if isinstance(value, str))
    yield from (fingerprint("".join(map(str, instance.args))) for instance in instances)


def _definition_version(task: Any) -> Any:
    metadata = task.get_config("metadata") or {}
    return metadata.get("version", task.VERSION)


def _source(task: Any) -> str:
    """The data set's name and configuration; of local files their names, without where they lie."""
    path, name = str(task.DATASET_PATH), task.DATASET_NAME
    files = (task.get_config("dataset_kwargs") or {}).get("data_files")
    if files:
        listed = files.values() if isinstance(files, dict) else [files]
        flat = [file for part in listed for file in ([part] if isinstance(part, str) else part)]
        return ", ".join(dict.fromkeys(Path(str(file)).name for file in flat))
    return path if name is None else f"{path} ({name})"


@contextlib.contextmanager
def _naming(task: str, what: str) -> Iterator[None]:
    """Any error of lm-eval, or of a task's own code, as a DataError of one line that names the task."""
    try:
        yield
    except NeoquantError:
        raise
    except Exception as error:  # whatever a task's own code raises
        first = next(iter(str(error).strip().splitlines()), "")
        hint = "; data that was read before is found without the hub" if isinstance(error, ConnectionError) else ""
        raise DataError(f"{task} {what}: {type(error).__name__}: {first}{hint}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval, the data sets' library and the hub's say nothing: what matters is in the error."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "httpx", "filelock")]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.utils.enable_progress_bars()
