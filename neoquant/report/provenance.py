"""How the page's figures were made: method, data, models, versions, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neoquant.evaluation.inspection_result import Inspection
from neoquant.evaluation.result import Comparison, ModelInfo
from neoquant.evaluation.task_result import TaskComparison
from neoquant.report.formatting import duration, suite_label
from neoquant.report.measured_speed import MeasuredSpeed
from neoquant.report.page_elements import visible
from neoquant.report.verdict import DIVERGENCE, TOLERANCE
from neoquant.sizes import plural, size


def method(result: Comparison) -> list[str]:
    """How figures, intervals and the verdict come about, a paragraph each."""
    unit = result.resampling.unit
    return [
        "All models read the same windows, and every scored token is compared. Perplexity is exp of the mean of −log p "
        "of the next token. KL is the divergence of a model’s prediction from the reference’s over the whole "
        "vocabulary, averaged over tokens. “Same top token” is the share of tokens where both models find the same "
        "next token likeliest.",
        f"All intervals hold 95 %, by leaving out one {unit} at a time (the jackknife): another sample of such {unit}s "
        f"would give other figures. With fewer than three {unit}s an interval says little, and the subset is marked.",
        f"A model passes where both intervals are below the bounds: {100 * TOLERANCE:g} % of perplexity and "
        f"{DIVERGENCE:g} nats of KL. It fails where an interval is above its bound. Where a bound lies inside the "
        "interval, more text must decide. Both bounds are the same measure, since 0.01 nats a token are 1 % of "
        "perplexity. Perplexity alone does not see every change; KL is what the loss would rise by on text that the "
        "reference wrote.",
    ]


def facts(result: Comparison, speed: MeasuredSpeed) -> list[tuple[str, str]]:
    """Label and text, for a table."""
    reference = result.reference
    data, machine = reference.data, reference.environment
    revision = f" at {data.revision}" if data.revision else ""
    times = sorted({f"{e.created}, {duration(e.seconds)}" for e in result.evaluations})
    found = [
        ("data", f"{data.source}{revision}; sha256 of the documents {data.sha256}"),
        ("suite", suite_label(reference.suite)),
        ("tokenizer", f"sha256 {data.tokenizer_sha256}"),
        ("reference", _model_facts(reference.model)),
        *((visible(c.evaluation.model.name), _model_facts(c.evaluation.model)) for c in result.candidates),
        (
            "computed with",
            f"neoquant {machine.neoquant}, torch {machine.torch}, Python {machine.python} on {machine.platform}",
        ),
        ("in", f"{machine.dtype} on {machine.device}, {plural(machine.threads, 'thread')}"),
        ("at", "; ".join(times)),
    ]
    return [*found, ("speed", f"neoquant bench, medians: {speed.settings}")] if speed.programs else found


def notes(result: Comparison, inspections: Sequence[Inspection], tasks: Sequence[TaskComparison] = ()) -> list[str]:
    """Every note of the results, each once."""
    found = [note for evaluation in result.evaluations for note in evaluation.notes]
    found += [f"{i.model.name}, layer by layer: {note}" for i in inspections for note in i.notes]
    found += [note for compared in tasks for evaluation in compared.evaluations for note in evaluation.notes]
    return list(dict.fromkeys(found))


def _model_facts(model: ModelInfo) -> str:
    found = [
        model.source or model.name,
        f"revision {model.revision}" if model.revision else None,
        f"recipe {model.recipe.get('name', 'without a name')}" if model.recipe else None,
        model.format and f"format {model.format}",
        model.calibration and _calibrated(model.calibration),
        size(model.bytes_on_disk) if model.bytes_on_disk is not None else None,
        model.sha256 and f"sha256 of the weights {model.sha256}",
    ]
    return ", ".join(str(part) for part in found if part)


def _calibrated(calibration: dict[str, Any]) -> str:
    said = f"calibrated on {_samples(calibration)}"
    tuned = calibration.get("tuned")
    if isinstance(tuned, dict) and tuned.get("changed"):
        said += f", tuned by {tuned.get('steps')} steps on {_samples(tuned.get('calibration') or {})}"
    return said


def _samples(calibration: dict[str, Any]) -> str:
    rows, length = calibration.get("rows"), calibration.get("length")
    return f"{calibration.get('source')}, {rows} samples of {length} tokens, seed {calibration.get('seed')}"
