"""The model card (`README.md`) of a quantized checkpoint: what it is, how it was made and loads, its accuracy loss.

A pure function of a plan: the same request gives the same bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from neoquant.calibration.summary import Layers, by_projection, remarks
from neoquant.formats.base import dtype_name
from neoquant.grids import Grid
from neoquant.quantization.plan import Plan, PlanRow

NOT_MEASURED = "Not measured yet"
_BEGIN, _END = "<!-- neoquant: measured -->", "<!-- neoquant: end -->"

# The class named in config.json ends with -> the hub's word for its task, transformers' class that loads it.
_TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "Model": ("feature-extraction", "AutoModel"),
}

# What transformers needs to read a family.
LIBRARIES = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQModel", "compressed-tensors": "compressed-tensors"}


def render_card(plan: Plan, name: str, layers: Layers | None = None, processes: int = 1) -> str:
    """The card of the checkpoint that `plan` makes in a folder called `name`; `layers` saw calibration text, which so
    many processes shared."""
    parts = [
        _front_matter(
            plan.source,
            plan.revision,
            plan.config,
            {row.grid for row in plan.rows if row.grid is not None},
            plan.format.family,
        ),
        f"# {name}",
        _opening(plan),
        "## Loading",
        _loading(plan.config, plan.format.family, name),
        "## Recipe",
        f"```toml\n{plan.recipe.to_toml()}```",
        "## Sizes",
        _sizes(plan),
        "## Layers",
        _layers(plan),
        *(["\n".join(f"- {note}" for note in plan.notes)] if plan.notes else []),
        *(["## Calibration", _calibration(layers, processes)] if layers else []),
        _measured(f"{NOT_MEASURED}: run `neoquant compare {plan.source_name} {name}`"),
    ]
    return "\n\n".join(parts) + "\n"


def render_conversion_card(
    name: str,
    source: str,
    revision: str | None,
    config: Mapping[str, Any],
    grids: Collection[Grid],
    formats: tuple[str, str],
    family: str | None,
    measured: str | None = None,
) -> str:
    """The card of a checkpoint called `name` that was converted: `formats` are those before and after, `family` the
    second's (None: plain), `measured` what was measured of the very same weights."""
    before, after = formats
    how = "the same codes and scales, spelled anew" if family else "plain weights"
    parts = [
        _front_matter(source, revision, config, grids, family),
        f"# {name}",
        f"{_link(source, revision)}, converted by neoquant from `{before}` to `{after}`: {how}.",
        "## Loading",
        _loading(config, family, name),
        *([_measured(measured)] if measured else []),
    ]
    return "\n\n".join(parts) + "\n"


def render_tuned_card(
    name: str, source: str, config: Mapping[str, Any], family: str, tuning: Mapping[str, Any], card: str
) -> str:
    """The card of a checkpoint called `name`, for whose floating-point part was trained as `tuning` says; `card` is
    that of the quantized one before, called `source`: what it says of recipe, sizes and layers is still so."""
    front = re.match(r"---\n.*?\n---", card, re.DOTALL)
    kept = re.search(r"^## Recipe\n.*?(?=^## (?:Tuning|Measured)\b|\Z)", card, re.DOTALL | re.MULTILINE)
    parts = [
        front[0] if front else _front_matter("", None, config, (), family),
        f"# {name}",
        f"`{source}`, whose scales, biases and norms were then trained by neoquant; codes and format are as they were.",
        "## Loading",
        _loading(config, family, name),
        *([kept[0].rstrip()] if kept else []),
        "## Tuning",
        _tuning(tuning),
        _measured(f"{NOT_MEASURED}: run `neoquant compare {tuning['base']} {name}`"),
    ]
    return "\n\n".join(parts) + "\n"


def tuning_facts(tuning: Mapping[str, Any]) -> str:
    """What tuning did, in a line: of its record."""
    trained = ", ".join(f"{count:,} {kind}" for kind, count in tuning["trained"].items() if count)
    samples, loss = tuning["calibration"], tuning["loss"]
    done = "" if tuning["changed"] else "; the loss did not fall, and nothing was changed"
    return (
        f"{trained}; {tuning['steps']} steps on {samples['rows']} samples of {samples['length']} tokens of "
        f"{samples['source']}, seed {samples['seed']}; KL divergence from {tuning['base']} on "
        f"{loss['samples']} held out {loss['before']:.3g} before, {loss['after']:.3g} after{done}"
    )


def _tuning(tuning: Mapping[str, Any]) -> str:
    trained, samples, loss = tuning["trained"], tuning["calibration"], tuning["loss"]
    lines = [
        f"Trained against the predictions of `{tuning['base']}`: {trained['scales']:,} scales, {trained['biases']:,} "
        f"numbers in biases, {trained['norms']:,} in norms, by {tuning['steps']} steps of Adam (learning rate "
        f"{tuning['learning_rate']:g}) on {samples['rows']} samples of {samples['length']} tokens of "
        f"{samples['source']} (seed {samples['seed']}). That text is training text: do not evaluate on it.",
        "",
        f"Mean KL divergence on {loss['samples']} of them that were held out, in nats a token: {loss['before']:.4g} "
        f"before, {loss['after']:.4g} after.",
    ]
    if not tuning["changed"]:
        lines += ["", "It did not fall: all weights are as they came."]
    return "\n".join(lines)


def render_saved_card(name: str, config: Mapping[str, Any], grids: Collection[Grid]) -> str:
    """The card of a model called `name` that was saved from memory with this `config.json`, its layers on `grids`."""
    family = (config.get("quantization_config") or {}).get("quant_method")
    kinds = ", ".join(sorted({f"{grid.name} ({grid.bits} bits)" for grid in grids}))
    parts = [
        _front_matter("", None, config, grids, family),
        f"# {name}",
        f"A GPT-Neo, written by neoquant{f'; its linear layers are quantized: {kinds}' if kinds else ''}.",
        "## Loading",
        _loading(config, family, name),
    ]
    return "\n\n".join(parts) + "\n"


def measured_in(card: str) -> str | None:
    """What stands between the markers of a card, if something was measured."""
    found = re.search(rf"{re.escape(_BEGIN)}\n(.*?)\n{re.escape(_END)}", card, re.DOTALL)
    return found[1] if found and not found[1].startswith(NOT_MEASURED) else None


def with_measured(card: str, block: str) -> str:
    """The card with `block` as what was measured: between the markers, in place of a section `## Measured`, or new."""
    section = _measured(block)
    for found in (
        re.search(rf"## Measured\s+{re.escape(_BEGIN)}.*?{re.escape(_END)}", card, re.DOTALL),
        re.search(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}", card, re.DOTALL),
        re.search(r"^## Measured[ \t]*\n.*?(?=\n## |\Z)", card, re.DOTALL | re.MULTILINE),
    ):
        if found:
            rest = card[found.end() :]
            return card[: found.start()] + section + (rest if rest.strip() else "\n")
    return f"{card.rstrip()}\n\n{section}\n" if card.strip() else f"{section}\n"


def _measured(block: str) -> str:
    return f"## Measured\n\n{_BEGIN}\n{block}\n{_END}"


def _head(config: Mapping[str, Any]) -> str:
    """The key of `_TASKS` that fits the class in config.json."""
    architecture = str(next(iter(config.get("architectures") or ["ForCausalLM"])))
    return next((suffix for suffix in _TASKS if architecture.endswith(suffix)), "ForCausalLM")


def _front_matter(
    source: str, revision: str | None, config: Mapping[str, Any], grids: Iterable[Grid], family: str | None
) -> str:
    grids = list(grids)
    names = sorted({grid.name for grid in grids}) + sorted({f"{grid.bits}-bit" for grid in grids})
    # Only a model of the hub has a name there; a folder's may be anything.
    base = [f"base_model: {source}", *(["base_model_relation: quantized"] if family else [])] if revision else []
    lines = [
        "---",
        *base,
        f"library_name: {'transformers' if _is_common(family) else 'neoquant'}",
        f"pipeline_tag: {_TASKS[_head(config)][0]}",
        "tags:",
        *(
            f"- {tag}"
            for tag in dict.fromkeys(["neoquant", "gpt_neo", *(["quantized", *names, family] if family else [])])
        ),
        "---",
    ]
    return "\n".join(lines)


def _is_common(family: str | None) -> bool:
    """Whether transformers reads a checkpoint of this family of formats, None: a plain one."""
    return family is None or family in LIBRARIES


def _opening(plan: Plan) -> str:
    return (
        f"{_link(plan.source_name, plan.revision)}, quantized by neoquant with the recipe `{plan.recipe.name}` "
        f"into the format `{plan.format.name}`: {plan.bits_per_weight_linears:.3f} bits for each weight of the block "
        f"linears, {plan.bits_per_weight_model:.3f} for each parameter of the whole model."
    )


def _loading(config: Mapping[str, Any], family: str | None, name: str) -> str:
    call = "model, tokenizer = neoquant.load"
    if _head(config) != "ForCausalLM":
        call = f"model = neoquant.GPTNeo{_head(config)}.from_pretrained"
    ours = f'import neoquant\n\n{call}("{name}")'
    blocks = [f"```python\n{ours}\n```"]
    if _is_common(family):
        cls = _TASKS[_head(config)][1]
        theirs = f'from transformers import {cls}\n\nmodel = {cls}.from_pretrained("{name}")'
        library = f" and {LIBRARIES[family]}" if family else ""
        blocks += [f"or with transformers{library}:", f"```python\n{theirs}\n```"]
    else:
        blocks.append("transformers does not read this format.")
    return "\n\n".join(blocks)


def _link(source: str, revision: str | None) -> str:
    """To a model on the hub; a folder's name by itself."""
    return f"[{source}](https://huggingface.co/{source}) at revision `{revision}`" if revision else f"`{source}`"


def _sizes(plan: Plan) -> str:
    return "\n".join(
        [
            "| | before | after |",
            "| --- | ---: | ---: |",
            f"| weights, MB | {plan.source_bytes / 1e6:,.1f} | {plan.weights_bytes / 1e6:,.1f} |",
            f"| bits per weight, blocks' linear layers | {_source_bits(plan, True):.3f} "
            f"| {plan.bits_per_weight_linears:.3f} |",
            f"| bits per parameter, whole model | {_source_bits(plan, False):.3f} | {plan.bits_per_weight_model:.3f} |",
        ]
    )


def _source_bits(plan: Plan, linears: bool) -> float:
    rows = [row for row in plan.rows if row.is_linear or not linears]
    return 8 * sum(row.source.nbytes for row in rows) / sum(row.source.numel for row in rows)


def _layers(plan: Plan) -> str:
    """How many weight matrices went where, and why; biases and norms in one line."""
    kinds = Counter(_kind(row) for row in plan.rows if row.action != "drop")
    lines = ["| weights | tensors | stored as | why |", "| --- | ---: | --- | --- |"]
    lines += [f"| {what} | {count} | {where} | {why} |" for (what, where, why), count in kinds.items()]
    return "\n".join(lines)


def _calibration(layers: Layers, processes: int) -> str:
    """The output errors of each kind of layer by round-to-nearest and as stored, and remarks."""
    lines = [f"{processes} processes shared the samples.", ""] if processes > 1 else []
    lines += [
        "Output errors, relative mean squares on the calibration text, medians over the blocks:",
        "",
        "| | layers | RTN | as stored | ratio | largest ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| `{kind.name}` | {kind.layers} | {kind.error_nearest:.2e} | {kind.error:.2e} "
        f"| {kind.ratio:.2f} | {kind.ratio_worst:.2f} |"
        for kind in by_projection(layers)
    ]
    found = remarks(layers)
    return "\n".join([*lines, *(["", *(f"- {remark}" for remark in found)] if found else [])])


def _kind(row: PlanRow) -> tuple[str, str, str]:
    if row.action == "copy":
        return "biases and norms", dtype_name(row.stored[0].dtype), "small"
    why = f"`{row.reason}`" if row.reason.startswith("match") else row.reason
    what = re.sub(r"\.h\.\d+\.", ".h.*.", row.layer)
    if row.grid is None:
        return f"`{what}`", dtype_name(row.stored[0].dtype), why
    options = ", ".join(f"{key} {value}" for key, value in row.grid.describe().items() if key not in ("name", "bits"))
    assert row.quantizer is not None  # who chooses codes on the grid
    return f"`{what}`", f"{row.grid.name}{f' ({options})' if options else ''}, {row.quantizer.label}", why
