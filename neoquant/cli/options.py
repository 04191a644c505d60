"""Options that several verbs share, each described once.

Verbs still list the options that they take: typer reads them from a function's signature, has no notion of a group of
options, and a decorator that merges signatures would hide from readers and type checkers what a verb takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

MAX_SEED = 2**63 - 1  # what torch takes


def own_fields(record: type[Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a verb's parameters by name (`typer.Context.params`), those that are fields of a dataclass."""
    return {field.name: params[field.name] for field in fields(record) if field.name in params}


def _seed(text: str) -> int:
    """A range that click knows would end every help text in nineteen digits."""
    try:
        seed = int(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a valid integer.") from None
    if not 0 <= seed <= MAX_SEED:
        raise typer.BadParameter(f"{seed} is not in the range 0 to {MAX_SEED}.")
    return seed


def _set_quiet(ctx: typer.Context, asked: bool) -> bool:
    ctx.obj.quiet |= asked
    return asked


def _set_debug(ctx: typer.Context, asked: bool) -> bool:
    ctx.obj.debug |= asked
    return asked


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_set_quiet, is_eager=True, help="No notes and no progress.")
]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error.")
]

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub id (EleutherAI/gpt-neo-1.3B), or neoquant-demo, which is the default.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="Branch, tag or commit on the hub.", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... [default: cuda if there is one]"),
]
CalibrationDevice = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="Where calibration is computed: cpu, cuda, cuda:1, ..."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Compute in float32, float16, bfloat16, or auto (as stored). "
        "[default: float32 on a CPU, else bfloat16, or float16 where a GPU lacks it]",
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="A",
        help="exact, or int8: also quantize the activations that meet quantized weights. Faster for many tokens; "
        "`neoquant compare` measures the accuracy loss.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        min=0,
        help="Below 1 less random, above more, 0 greedy. [default: the model's, else 0.8]",
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--context", metavar="N", help="Tokens of a sequence, for the memory of generating. [default: all]", min=1
    ),
]
Batch = Annotated[int, typer.Option("--batch", metavar="B", help="Sequences generated together, for the same.", min=1)]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="TYPE",
        help="Hold keys and values of the text so far in float32, float16 or int8: half and a quarter of the memory. "
        "[default: the model's, else as they are computed]",
    ),
]
StaticCache = Annotated[
    bool,
    typer.Option(
        "--static-cache",
        help="On a GPU, replay what a token launches as one CUDA graph, with keys and values in buffers of fixed size.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Only the likeliest tokens of total probability P. [default: the model's, else 0.95]",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="R",
        help="Above 1, tokens of the text become less likely. [default: the model's, else 1]",
    ),
]
SamplingSeed = Annotated[
    int | None,
    typer.Option(
        "--seed", metavar="N", parser=_seed, help="Seed of the sampling, to repeat a result. [default: random]"
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON to FILE; - for stdout.")
]

Force = Annotated[bool, typer.Option("--force", help="Let --json replace a FILE that this command did not write.")]
ForceReport = Annotated[
    bool, typer.Option("--force", help="Let --html and --markdown replace a FILE that this command did not write.")
]

FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="CONDITION",
        help="Exit with code 3 if it holds: 'delta_nll > 0.05', 'any:kl >= 0.1' (any subset). Repeat for more.",
        show_default=False,
    ),
]

# How to quantize: the same for `plan` and `quantize`.
Bits = Annotated[
    int | None, typer.Option("--bits", metavar="N", help="2, 3, 4 or 8. [default: what --type needs, else 4]")
]
Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="T",
        help="nf4, fp4 or mxfp4 with 4 bits, int8 with 8, affine (integers in groups, round-to-nearest), hqq (the "
        "same, by HQQ) or gptq (by GPTQ, with --calibration) with 2, 3, 4 or 8, trellis (paths down the rows) with 2 "
        "or 3. [default: nf4, int8 with 8 bits, affine with 2 or 3]",
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", metavar="N", help="Weights that share a scale (nf4, fp4): 32 ... 4096. [default: 64]"),
]
NoDoubleQuant = Annotated[
    bool,
    typer.Option(
        "--no-double-quant", help="Keep the scales in float32 (nf4, fp4): 4.5 bits a weight instead of 4.127."
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="N",
        help="Group size (affine, trellis): weights of a row that share a scale, 16, 32, 64, 128, 256, or -1 for whole "
        "rows. [default: 128, trellis 64]",
    ),
]
Symmetric = Annotated[
    bool,
    typer.Option("--symmetric", help="Groups without a zero-point (affine): smaller, a little less accurate."),
]
FloatZero = Annotated[
    bool,
    typer.Option(
        "--float-zero",
        help="Zero-points in float16 (affine), as the HQQ library has them, instead of bytes: more accurate with 3 "
        "bits and hqq, 0.125 bits a weight more in groups of 64; only the format neoquant holds them.",
    ),
]
Quantizer = Annotated[
    str | None,
    typer.Option(
        "--quantizer",
        metavar="NAME",
        help="What rounds weights to the grid: nearest (RTN), hqq (no calibration, affine only) or gptq. "
        "[default: nearest, or gptq with --calibration]",
    ),
]
QuantizerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--quantizer-option",
        metavar="NAME=VALUE",
        help="An option of the quantizer, as in a recipe: hqq has norm and iterations. Repeat for more.",
        show_default=False,
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        "--order",
        metavar="O",
        help="Activation order of GPTQ (desc_act): static (large activations first, groups as they lie), off, or "
        "dynamic (large ones first, groups likewise; not for bitsandbytes). [default: static]",
    ),
]
Scales = Annotated[
    str | None,
    typer.Option(
        "--scales",
        metavar="S",
        help="How GPTQ finds scales: range (of the weights), mse or weighted (by activations). [default: range]",
    ),
]
Damping = Annotated[
    float | None,
    typer.Option("--damping", metavar="X", help="Damping of GPTQ, relative to the mean diagonal. [default: 0.01]"),
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        metavar="WHAT",
        help="What GPTQ minimizes: the model's loss, by its gradients (model), the error of attention's output for "
        "queries, keys and values (attention), or each layer's own (layer). [default: attention]",
    ),
]
Correction = Annotated[
    float | None,
    typer.Option(
        "--correction",
        metavar="X",
        help="How far GPTQ moves weights to make up for what earlier layers changed, 0 to 1; 0.5 goes well with "
        "--objective model. [default: 0]",
    ),
]
TargetBits = Annotated[
    float | None,
    typer.Option(
        "--target-bits",
        metavar="B",
        help="Mixed precision: each layer on a trellis of 2 or 3 bits or groups of 3, 4 or 8, for the least foreseen "
        "loss at B bits a weight of the linears. Needs --calibration.",
        show_default=False,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        metavar="SIZE",
        help="The same, by the size of the weight files, like 450MB. Embeddings take part: nf4, int8 or kept, unless "
        "--embeddings says which.",
        show_default=False,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="GLOB",
        help="Do not quantize these layers, e.g. '*.c_proj' or 'transformer.h.0.*'. Repeat for more.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        help="Rules for each layer instead of --bits and --type: a TOML file, or the name of a built-in recipe.",
        show_default=False,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="F",
        help="bitsandbytes, gptq or compressed-tensors (transformers reads these, with the library of that name; gptq "
        "with GPTQModel) or neoquant (holds all). [default: the first that fits]",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="Quantize by GPTQ, with samples of this text: pile, demo, a suite's name, or a file.",
        show_default=False,
    ),
]
Rows = Annotated[
    int | None,
    typer.Option("--rows", metavar="N", help="Number of calibration samples. [default: 128]", show_default=False),
]
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        metavar="N",
        help="Sequence length of a sample. [default: 2048 or the model's context]",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        parser=_seed,
        help="Seed for drawing the calibration samples. [default: 0]",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Memory limit of a calibrated run, like 3GB: hidden states beyond it go to files.",
        show_default=False,
    ),
]
KeptDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Type of tensors that are not quantized: float16 or bfloat16. [default: the source's, if half]",
    ),
]
Embeddings = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        metavar="E",
        help="Token embedding and head: int8 or nf4 (format neoquant), or keep. "
        "[default: int8 in the format neoquant, else keep]",
    ),
]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest weight file: 500MB, 5GB, ...")]

# What to evaluate on: the same for `eval` and `compare`.
Suite = Annotated[
    str | None,
    typer.Option(
        "--suite",
        metavar="NAME|FILE",
        help="demo, pile-smoke, pile-core, lambada, wikitext2, ... or a TOML file. [default for neoquant-demo: demo]",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE|FOLDER",
        help="Documents to read, in place of the suite's own: .jsonl, .jsonl.zst or plain text, or a folder.",
    ),
]
Subset = Annotated[
    list[str] | None,
    typer.Option("--subset", metavar="NAME", help="Only this subset. Repeat for more.", show_default=False),
]
Documents = Annotated[int | None, typer.Option("--documents", metavar="N", help="Limit of documents in each subset.")]
Context = Annotated[
    int | None, typer.Option("--context", metavar="N", help="Tokens a window, at most the model's own context.")
]
ExcludeCalibrated = Annotated[
    bool,
    typer.Option("--exclude-calibrated", help="Skip documents that any of the models was calibrated on."),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        "--protocol", metavar="P", help="rolling (each token once), joined (as GPTQ papers), strided or last-word."
    ),
]
Stride = Annotated[int | None, typer.Option("--stride", metavar="N", help="Tokens scored a window (strided).")]

# Tasks of lm-evaluation-harness, instead of text: the same for `eval` and `compare`.
Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="A task, group or tag of lm-evaluation-harness that scores given answers: piqa, hellaswag, winogrande, "
        "arc_easy, ... Repeat for more. Needs the extra lm-eval.",
        show_default=False,
    ),
]
TaskPath = Annotated[
    Path | None,
    typer.Option("--task-path", metavar="FOLDER", help="Definitions of further tasks (lm-eval's YAML)."),
]
Fewshot = Annotated[
    int | None,
    typer.Option("--fewshot", metavar="N", help="Examples before each question. [default: the task's, else 0]", min=0),
]
