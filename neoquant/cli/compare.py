"""`neoquant compare`: the accuracy loss of models against the one they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import (
    LoadOptions,
    SuiteOptions,
    choose_suite,
    conditions_of,
    fail_where,
    inputs_of,
    is_result,
    keeping_progress,
    load_compared_models,
    publish,
)
from neoquant.cli.harness_tasks import compared_tasks, run_tasks, task_options
from neoquant.cli.output import check_output_file, json_kind
from neoquant.cli.processes import process_group_of
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError

if TYPE_CHECKING:
    from neoquant.evaluation import Comparison
    from neoquant.evaluation.thresholds import Condition


def compare(
    ctx: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="The reference: a folder, hub id, or neoquant-demo.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Models made from it.", show_default=False),
    ] = None,
    suite: options.Suite = None,
    data: options.Data = None,
    subset: options.Subset = None,
    documents: options.Documents = None,
    exclude_calibrated: options.ExcludeCalibrated = False,
    context: options.Context = None,
    protocol: options.Protocol = None,
    stride: options.Stride = None,
    task: options.Task = None,
    task_path: options.TaskPath = None,
    fewshot: options.Fewshot = None,
    json: options.Json = None,
    force: options.Force = False,
    fail_if: options.FailIf = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    activations: options.Activations = "exact",
    cache: options.Cache = None,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure the accuracy loss of models against BASE, token by token on the same windows of text; or with --task,
    answer by answer on tasks of lm-evaluation-harness.

    Shows perplexity and bits per byte of both, the change, the KL divergence and the share of tokens with
    the same top token, each with its 95 % interval over documents, and size and bits per weight. --revision
    applies to BASE, --activations and --cache to the others: --cache measures what holding keys and values
    in fewer bits loses.

    BASE and MODEL may also be files that --json wrote: then no model runs, and results of another text or
    protocol are refused. With --json, an interrupted run resumes when the command is given again.

    --fail-if FIELD OP NUMBER (>, >=, <, <=) exits with code 3 if it holds for a model, after everything is
    written. A field is of the total, or with any: before it of any subset. Fields of one model: nll,
    perplexity, bits_per_byte. Of the change: delta_nll, delta_nll_low, delta_nll_high, delta_bits_per_byte,
    perplexity_ratio. Of both predictions: agreement, kl, kl_median, kl_99, kl_99.9, kl_max, probability_rms.
    With --task, a metric or its change, or an end of its interval, of the mean over tasks, or with any: of
    any task: acc, delta_acc, delta_acc_low, delta_acc_high, delta_acc_norm, ...

    \b
    Examples:
      neoquant compare neoquant-demo neoquant-demo-nf4 --suite demo
      neoquant compare EleutherAI/gpt-neo-1.3B gpt-neo-1.3B-nf4 gpt-neo-1.3B-int8 --suite pile-core --json loss.json
      neoquant compare gpt-neo-1.3B-nf4 gpt-neo-1.3B-nf4 --activations int8 --suite pile-smoke
      neoquant compare EleutherAI/gpt-neo-1.3B gpt-neo-1.3B-nf4 --task hellaswag --task arc_easy --json tasks.json
      neoquant compare base.json nf4.json --fail-if "delta_nll > 0.05" --fail-if "any:delta_nll > 0.1"
    """
    terminal: Terminal = ctx.obj
    models = models or []
    asked = task_options(ctx.params)
    loading = LoadOptions.of(ctx.params)
    saved = [is_result(name) for name in (base, *models)]
    if any(saved) and not all(saved):
        raise RequestError(
            "give models or saved results, not both: evaluate the model first, with neoquant eval --json FILE"
        )
    if all(saved):
        if asked is not None:
            raise RequestError("--task runs models: saved results on tasks are compared without it")
        if compared_tasks([base, *models], json, force, fail_if, terminal):
            return
        # from saved evaluations nothing that needs both models side by side can be had, from comparisons it can
        conditions = conditions_of(fail_if, side_by_side=True)
        check_output_file(json, json_kind("comparison"), terminal, inputs=[base, *models], force=force)
        _show(_compare_saved([base, *models], terminal), conditions, json, terminal)
        return
    if not models:
        raise RequestError(f"name one or more models to compare with {base}")
    if asked is not None:
        run_tasks(asked, [base, *models], loading, terminal)
        return
    conditions = conditions_of(fail_if, side_by_side=True)
    chosen = choose_suite(SuiteOptions.of(ctx.params), base)
    inputs = inputs_of(chosen, suite, base, *models)
    check_output_file(json, json_kind("comparison"), terminal, inputs=inputs, force=force)
    with keeping_progress(json) as journal, process_group_of(terminal) as group:
        reference, others, tokenizer = load_compared_models(base, revision, models, loading.within(group), terminal)

        from neoquant.evaluation import compare

        result = compare(
            reference,
            others,
            tokenizer,
            chosen,
            exclude_calibrated=exclude_calibrated,
            progress=terminal.progress,
            journal=journal,
            process_group=group,
        )
    if not group.rank:
        _show(result, conditions, json, terminal)


def _show(result: Comparison, conditions: list[Condition], json: Path | None, terminal: Terminal) -> None:
    from neoquant.report.table import comparison_table

    notes = [note for evaluation in result.evaluations for note in evaluation.notes]
    publish(result, comparison_table(result), notes, json, terminal)
    fail_where(conditions, result, terminal)


def _compare_saved(files: list[str], terminal: Terminal) -> Comparison:
    from neoquant.evaluation.saved_results import compare_saved, differing_environments, read_result

    result = compare_saved([read_result(file) for file in files], files)
    for note in differing_environments(result.evaluations):
        terminal.note(f"note: {note}")
    return result
