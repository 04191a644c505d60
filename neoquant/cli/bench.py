"""`neoquant bench`: how fast a model runs, and what memory it takes."""

from __future__ import annotations

from typing import Annotated

import typer

from neoquant.cli import options
from neoquant.cli.models import find_model
from neoquant.cli.output import check_output_file, json_kind, write_text
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError


def bench(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="One or more folders or hub ids, or neoquant-demo, which is the default.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="PEERS", help="transformers, openvino, or both with a comma.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="The model before quantization, for peers that cannot run MODEL itself."
        ),
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(
            "--python",
            metavar="PEER=PATH",
            help="Python interpreter that has a peer installed, if it is not this one. Repeat for more.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", metavar="N", help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", help="Tokens to generate, 2 or more.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Runs of each program.")] = 3,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads of each program. [default: what torch takes]")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where the programs run: cpu, cuda, cuda:1, ...")
    ] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Compute in float32, float16 or bfloat16. "
            "[default: float32 on a CPU, else bfloat16, or float16 where a GPU lacks it]",
        ),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            "--activations", metavar="A", help="exact, int8, or both with a comma: how neoquant treats activations."
        ),
    ] = "exact",
    batch: Annotated[int, typer.Option("--batch", metavar="B", help="Prompts read and continued together.")] = 1,
    cache: options.Cache = None,
    static_cache: options.StaticCache = False,
    json: options.Json = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure loading, prefill, decoding and peak memory, on the CPU or a GPU, beside other programs.

    Each run is a process of its own, and the programs take turns. transformers runs the plain model, and
    bitsandbytes folders as well; OpenVINO runs the plain model in int4, as optimum-intel exports it. The prompt
    is random tokens. `neoquant report` shows the results of --json beside size and accuracy loss.

    \b
    Examples:
      neoquant bench gpt-neo-1.3B-nf4 gpt-neo-1.3B-int8
      neoquant bench gpt-neo-1.3B-nf4 --against transformers,openvino --base EleutherAI/gpt-neo-1.3B
      neoquant bench gpt-neo-1.3B-nf4 --against transformers --device cuda --static-cache
      neoquant bench gpt-neo-1.3B-nf4 --against openvino --base gpt-neo-1.3B --python openvino=ov/bin/python
    """
    terminal: Terminal = ctx.obj
    check_output_file(json, json_kind("benchmark"), terminal, inputs=[*(models or ()), base], force=force)
    pythons = [pair.partition("=") for pair in python or ()]
    for name, _, path in pythons:
        if not path:
            raise RequestError(f"--python {name!r}: write it like transformers=/path/to/python")

    from neoquant.benchmark.run import Request, measure
    from neoquant.model.devices import resolve_device
    from neoquant.model.dtypes import default_dtype
    from neoquant.report.benchmark import speed_table

    if threads is None:
        import torch

        threads = torch.get_num_threads()
    chosen: list[str | None] = [*models] if models else [None]
    request = Request(
        models=[str(find_model(model, terminal, "bench")) for model in chosen],
        against=_names(against or ""),
        base=None if base is None else str(find_model(base, terminal, "bench")),
        prompt=prompt_tokens,
        new=new_tokens,
        repeats=repeats,
        threads=threads,
        dtype=dtype or str(default_dtype(resolve_device(device))).removeprefix("torch."),
        batch=batch,
        cache=cache,
        device=device,
        static_cache=static_cache,
        activations=_names(activations),
        pythons={name: path for name, _, path in pythons},
    )
    result = measure(request, progress=terminal.progress)
    if json is not None:
        write_text(json, result.to_json() + "\n", terminal)
    for note in result.notes:
        terminal.note(f"note: {note}")
    terminal.show(speed_table(result))


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]
