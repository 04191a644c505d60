"""`neoquant generate`: continue a text, or, with `--task`, label texts or find answers in them."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from neoquant.cli import options
from neoquant.cli.generation import settings
from neoquant.cli.models import find_model
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError

DEFAULT_TOKENS = 100
GENERATION = "text-generation"


def generate(
    ctx: typer.Context,
    model: options.Model = None,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="T",
            help="text-generation, text-classification, token-classification or question-answering: all but the first "
            "take a text a line, and print a line of JSON for each.",
        ),
    ] = GENERATION,
    named: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Another way to name the model.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue. [default: read from stdin]")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help=f"[default: the model's own, else {DEFAULT_TOKENS}, or what the context allows]",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", metavar="T", help="Below 1 is safer, above is wilder. [default: the model's, else 0.8]"
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="K", help="Only the K likeliest tokens. [default: the model's, else all]"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Only the likeliest tokens that make up P together. [default: the model's, else 0.95]",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            metavar="R",
            help="Above 1, tokens already there become less likely. [default: the model's, else 1]",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", metavar="TEXT", help="What to look for (question-answering).", show_default=False),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token; nothing is random.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            max=2**63 - 1,  # what torch takes
            help="Repeat what this seed gave. [default: a fresh one, told]",
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    activations: options.Activations = "exact",
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Continue a text; it appears as it is made, and stops at the model's end of text.

    What no option says is as the model's generation_config.json (or, without one, its config.json) has it.

    \b
    Examples:
      neoquant generate gpt-neo-1.3B-nf4 --prompt "Hello, I'm a language model"
      neoquant generate gpt-neo-1.3B-nf4 --prompt "Once upon a time" --temperature 0.7 --seed 7
      echo "def mean(values):" | neoquant generate neoquant-demo --greedy
      echo -e "Hello" | neoquant generate --task text-generation --model EleutherAI/gpt-neo-1.3B --device 0
      cat lines.txt | neoquant generate --task text-classification my-finetune
    """
    terminal: Terminal = ctx.obj
    if model is not None and named is not None:
        raise RequestError(f"two models are named, {model!r} and --model {named!r}: one is needed")
    model = named if model is None else model
    randomness = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    stated = [option for option, value in randomness.items() if value is not None]
    if greedy and stated:
        raise RequestError(f"--greedy leaves nothing to chance, so {', '.join(stated)} cannot be given with it")
    text = _read_prompt() if prompt is None else prompt
    if task != GENERATION:
        about_words: dict[str, Any] = {**randomness, "--greedy": greedy or None, "--max-new-tokens": max_new_tokens}
        about_words["--activations"] = None if activations == "exact" else activations
        about_words["--repetition-penalty"] = repetition_penalty
        extra = [option for option, value in about_words.items() if value is not None]
        if extra:
            raise RequestError(f"--task {task} generates nothing, so {', '.join(extra)} cannot be given with it")
        source = find_model(model, terminal, "generate")
        _answer(task, source, text, question, {"revision": revision, "device": device, "dtype": dtype}, terminal)
        return
    if question is not None:
        raise RequestError("--question goes with --task question-answering")

    import torch

    from neoquant.generation.generate import check_room, stream
    from neoquant.generation.stopping import ends_with
    from neoquant.generation.text import TextStream
    from neoquant.loading.pretrained import load

    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    source = find_model(model, terminal, "generate")
    network, tokenizer = load(
        source, revision=revision, device=device, dtype=dtype, activations=activations, progress=terminal.progress
    )
    chosen_settings = settings(
        network.generation_config,
        terminal,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )
    ids = tokenizer.prompt_ids(text)
    sampling = replace(chosen_settings.sampling(len(ids)), seed=seed)
    if max_new_tokens is None:
        context = network.config.max_position_embeddings
        max_new_tokens = chosen_settings.new_tokens(len(ids), context, default=DEFAULT_TOKENS)
    check_room(network, len(ids), max_new_tokens)  # before the prompt is printed

    started, tokens = time.perf_counter(), 0
    _write(text)
    out = TextStream(tokenizer, _write)
    stop = ends_with(chosen_settings.stops(), tokenizer)
    ends = chosen_settings.ends()
    try:
        for chosen in stream(network, torch.tensor([ids]), max_new_tokens=max_new_tokens, sampling=sampling, stop=stop):
            tokens += 1
            if int(chosen[0]) not in ends:
                out.put(int(chosen[0]))
    finally:
        out.end()
        _write("\n")
    seconds = time.perf_counter() - started
    repeat = "" if sampling.temperature == 0 else f"; again: --seed {seed}"
    terminal.note(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s{repeat}")


def _answer(
    task: str, source: str | Path, text: str, question: str | None, where: dict[str, Any], terminal: Terminal
) -> None:
    """Print what a task's pipeline says of each line, in the order of the lines."""
    from neoquant.hf.pipelines import ALIASES, pipeline

    inputs: list[Any] = [line for line in text.splitlines() if line.strip()]
    if ALIASES.get(task, task) == "question-answering":
        if question is None:
            raise RequestError("question-answering looks for an answer in a text: say to what, with --question TEXT")
        inputs = [{"question": question, "context": line} for line in inputs]
    elif question is not None:
        raise RequestError("--question goes with --task question-answering")
    for result in pipeline(task, source, **where)(inputs):
        terminal.show(json.dumps(result, ensure_ascii=False))


def _read_prompt() -> str:
    """What is piped in, without the line end that `echo` adds.

    Raises:
        RequestError: nothing is piped in.
    """
    if sys.stdin.isatty():
        raise RequestError("nothing to continue: give --prompt TEXT, or pipe a text in")
    return sys.stdin.read().removesuffix("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
