"""`neoquant generate`: continue a text, or, with `--task`, label texts or find answers in them."""

from __future__ import annotations

from typing import Annotated

import typer

from neoquant.cli import options
from neoquant.cli.continue_text import DEFAULT_TOKENS, Choices, continue_text
from neoquant.cli.generation import require_cache
from neoquant.cli.models import Loading, find_model
from neoquant.cli.prompt import prompt_text
from neoquant.cli.run_task import run_task
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError

GENERATION = "text-generation"


def generate(
    ctx: typer.Context,
    model: options.Model = None,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="T",
            help="text-generation, text-classification, token-classification or question-answering. All but the first "
            "read one text a line, and print one line of JSON for each.",
        ),
    ] = GENERATION,
    named: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The model, in place of MODEL.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text. [default: read from stdin]")
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
    temperature: options.Temperature = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="K", help="Only the K likeliest tokens. [default: the model's, else all]"),
    ] = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    question: Annotated[
        str | None,
        typer.Option("--question", metavar="TEXT", help="The question (question-answering).", show_default=False),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: options.SamplingSeed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    activations: options.Activations = "exact",
    cache: options.Cache = None,
    static_cache: options.StaticCache = False,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="MODEL|lookup",
            help="A faster model of the same tokenizer guesses tokens, which MODEL checks together; lookup guesses "
            "what followed where the text ended likewise before. Greedy texts stay as they are, sampled ones keep "
            "their distribution.",
            show_default=False,
        ),
    ] = None,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Continue a text up to the model's end of text; with --task, label texts or find answers in them.

    Defaults come from the model's generation_config.json or, without one, from its config.json.

    \b
    Examples:
      neoquant generate gpt-neo-1.3B-nf4 --prompt "Hello, I'm a language model"
      neoquant generate gpt-neo-1.3B-nf4 --prompt "Once upon a time" --temperature 0.7 --seed 7
      echo "def mean(values):" | neoquant generate neoquant-demo --greedy --draft lookup
      echo -e "Hello" | neoquant generate --task text-generation --model EleutherAI/gpt-neo-1.3B --device 0
      cat lines.txt | neoquant generate --task text-classification my-finetune
    """
    terminal: Terminal = ctx.obj
    if model is not None and named is not None:
        raise RequestError(f"two models are named, {model!r} and --model {named!r}: one is needed")
    model = named if model is None else model
    randomness = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    if greedy and (given := [option for option, value in randomness.items() if value is not None]):
        raise RequestError(f"--greedy is not random: leave out {', '.join(given)}")
    loading = Loading(revision=revision, device=device, dtype=dtype)
    if task == GENERATION:
        if question is not None:
            raise RequestError("--question belongs to --task question-answering")
        require_cache(cache)
        choices = Choices(**options.own_fields(Choices, ctx.params))
        text = prompt_text(prompt)
        continue_text(find_model(model, terminal, "generate"), text, choices, loading, activations, terminal)
        return
    from neoquant.hf.pipelines import require_task

    require_task(task)
    sampling: dict[str, object] = {**randomness, "--greedy": greedy or None, "--max-new-tokens": max_new_tokens}
    sampling |= {"--repetition-penalty": repetition_penalty, "--cache": cache, "--draft": draft}
    sampling |= {"--static-cache": static_cache or None}
    sampling |= {"--activations": None if activations == "exact" else activations}
    if given := [option for option, value in sampling.items() if value is not None]:
        raise RequestError(f"--task {task} generates nothing: leave out {', '.join(given)}")
    text = prompt_text(prompt)
    run_task(task, find_model(model, terminal, "generate"), text, question, loading, terminal)
