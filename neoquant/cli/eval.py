"""`neoquant eval`: perplexity and bits per byte of one model."""

from __future__ import annotations

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import (
    LoadOptions,
    SuiteOptions,
    choose_suite,
    conditions_of,
    fail_where,
    inputs_of,
    keeping_progress,
    load_evaluated_model,
    publish,
)
from neoquant.cli.harness_tasks import run_tasks, task_options
from neoquant.cli.output import check_output_file, json_kind
from neoquant.cli.processes import process_group_of
from neoquant.cli.terminal import Terminal


def eval_(
    ctx: typer.Context,
    model: options.Model = None,
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
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure a model on a suite: perplexity and bits per byte, for each subset and in total; or with --task, its
    accuracy on tasks of lm-evaluation-harness.

    To measure the accuracy loss of quantization, use `neoquant compare`: it needs fewer documents.

    With --json, an interrupted run resumes when the same command is given again. Under torchrun, several
    processes share the work, with the same result. --fail-if takes nll, perplexity and bits_per_byte; with --task,
    metrics (acc, any:acc_low, ...).

    \b
    Examples:
      neoquant eval gpt-neo-1.3B-nf4 --suite pile-core --json nf4.json
      neoquant eval gpt-neo-1.3B-nf4 --suite pile-smoke --subset ArXiv --subset Github --documents 5
      torchrun --nproc-per-node 4 -m neoquant eval EleutherAI/gpt-neo-1.3B --suite pile-core --json base.json
      neoquant eval gpt-neo-1.3B-nf4 --suite pile-core --data my-texts.jsonl --protocol strided --stride 512
      neoquant eval gpt-neo-1.3B-nf4 --task piqa --task winogrande --json tasks.json
    """
    terminal: Terminal = ctx.obj
    asked = task_options(ctx.params)
    if asked is not None:
        run_tasks(asked, [model], LoadOptions.of(ctx.params), terminal)
        return
    conditions = conditions_of(fail_if, side_by_side=False)
    loading = LoadOptions.of(ctx.params)
    chosen = choose_suite(SuiteOptions.of(ctx.params), model)
    inputs = inputs_of(chosen, suite, model)
    check_output_file(json, json_kind("evaluation"), terminal, inputs=inputs, force=force)
    with keeping_progress(json) as journal, process_group_of(terminal) as group:
        entry, tokenizer = load_evaluated_model(model, terminal, "eval", loading.within(group), revision)

        from neoquant.evaluation import evaluate
        from neoquant.report.table import evaluation_table

        result = evaluate(
            entry.model,
            tokenizer,
            chosen,
            describe=entry.describe,
            calibrated_on=entry.calibrated_on,
            exclude_calibrated=exclude_calibrated,
            progress=terminal.progress,
            journal=journal,
            process_group=group,
        )
    if group.rank:
        return
    publish(result, evaluation_table(result), result.notes, json, terminal)
    fail_where(conditions, result, terminal)
