"""`neoquant chat`: write a text together with a model, turn by turn."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import typer

from neoquant.cli import options
from neoquant.cli.generation import require_cache, settings
from neoquant.cli.models import find_model
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError
from neoquant.sizes import plural

if TYPE_CHECKING:
    from neoquant.generation.config import GenerationConfig
    from neoquant.loading.pretrained import GPTNeoForCausalLM
    from neoquant.tokenizer.tokenizer import Tokenizer

LONGEST_TURN = 60

HELP = "/again: another continuation · /undo: drop the last turn · /reset: start again · /show: the whole text · /quit"


def chat(
    ctx: typer.Context,
    model: options.Model = None,
    roles: Annotated[
        str | None,
        typer.Option(
            "--roles",
            metavar="YOU,MODEL",
            help="Write a dialogue between these two, such as Human,Robot. [default: no roles]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help=f"Longest continuation of a turn. [default: the model's max_new_tokens, else {LONGEST_TURN}]",
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.SamplingSeed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    activations: options.Activations = "exact",
    cache: options.Cache = None,
    static_cache: options.StaticCache = False,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a text together: what you type is appended, and the model continues the whole text.

    GPT-Neo was not trained to answer questions: it continues the text. With --roles, your lines and the model's form a
    dialogue, and the model stops where your next line begins. Defaults come from the model's generation_config.json.
    /help lists the commands; Ctrl-D ends.

    \b
    Examples:
      neoquant chat gpt-neo-1.3B-nf4
      neoquant chat gpt-neo-1.3B-nf4 --roles Human,Robot --temperature 0.7
    """
    terminal: Terminal = ctx.obj
    names = _names(roles)
    require_cache(cache)

    from neoquant.loading.pretrained import load

    network, tokenizer = load(
        find_model(model, terminal, "chat"),
        revision=revision,
        device=device,
        dtype=dtype,
        activations=activations,
        progress=terminal.progress,
    )
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    own = settings(
        network.generation_config,
        terminal,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        cache=cache,
        static_cache=static_cache,
    )
    longest = max_new_tokens or own.max_new_tokens or LONGEST_TURN
    _Chat(network, tokenizer, own, min(longest, _half(network)), names, seed, terminal).run(_typed(terminal))


def _names(roles: str | None) -> tuple[str, str] | None:
    if roles is None:
        return None
    names = [name.strip() for name in roles.split(",")]
    if len(names) != 2 or not all(names):
        raise RequestError(f"--roles {roles!r} is not two names: write them like Human,Robot")
    return names[0], names[1]


def _half(network: GPTNeoForCausalLM) -> int:
    """A continuation leaves half of the context to what was before it."""
    return network.config.max_position_embeddings // 2


def _typed(terminal: Terminal) -> Iterator[str]:
    """Lines, until there are no more."""
    asking = sys.stdin.isatty()
    while True:
        if asking:
            terminal.show_raw("> ")
        line = sys.stdin.readline()
        if not line:
            return
        try:
            yield line.encode("utf-8", "surrogateescape").decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError:
            terminal.note("a line that is not UTF-8 is left out")


@dataclass
class _Chat:
    network: GPTNeoForCausalLM
    tokenizer: Tokenizer
    settings: GenerationConfig
    longest: int
    names: tuple[str, str] | None
    seed: int
    terminal: Terminal
    turns: list[tuple[str, str]] = field(default_factory=list)
    """What was typed, as it stands in the text, and what followed."""

    @property
    def text(self) -> str:
        return "".join(typed + continuation for typed, continuation in self.turns)

    def run(self, lines: Iterator[str]) -> None:
        commands: dict[str, Callable[[], None]] = {
            "/again": self.again, "/undo": self.undo, "/reset": self.turns.clear,
            "/show": lambda: self.terminal.show_raw(self.text + "\n"), "/help": lambda: self.terminal.note(HELP),
        }  # fmt: skip
        for line in lines:
            if line == "/quit":
                return
            if line in commands:
                commands[line]()
            elif line.startswith("/"):
                self.terminal.note(f"{line} is no command; {HELP}")
            elif line or self.names is None:
                self.go_on(self._as_turn(line))

    def _as_turn(self, line: str) -> str:
        if self.names is None:
            return line
        between = "\n" if self.turns else ""
        return f"{between}{self.names[0]}: {line}\n{self.names[1]}:"

    def undo(self) -> None:
        if not self.turns:
            self.terminal.note("there is no turn to undo")
            return
        self.turns.pop()

    def again(self) -> None:
        if not self.turns:
            self.terminal.note("there is no turn to do again")
            return
        self.go_on(self.turns.pop()[0])

    def go_on(self, typed: str) -> None:
        """Continue everything so far and `typed`, show it as it comes, and remember both."""
        import torch

        from neoquant.generation.generate import require_known_tokens, stream
        from neoquant.generation.stopping import ends_with
        from neoquant.generation.text import write_text

        context = self.network.config.max_position_embeddings
        ids = self.tokenizer.prompt_ids(self.text + typed)
        require_known_tokens(self.network, ids)
        room = context - self.longest
        if len(ids) > room:
            self.terminal.note(
                f"the text has {plural(len(ids), 'token')}: the first {len(ids) - room} no longer fit the context"
            )
            ids = ids[-room:]
        stops = (*self.settings.stops(), *((f"\n{self.names[0]}:",) if self.names else ()))
        shown = _Shown(stops, self.terminal)
        started = time.perf_counter()
        made = stream(
            self.network,
            torch.tensor([ids]),
            max_new_tokens=self.longest,
            sampling=replace(self.settings.sampling(len(ids)), seed=self.seed),
            stop=ends_with(stops, self.tokenizer),
            cache_dtype=self.settings.cache_dtype,
            static_cache=self.settings.static_cache,
            steady=True,
        )
        tokens = write_text(made, self.tokenizer, shown.add, self.settings.ends())
        self.turns.append((typed, shown.end()))
        self.seed += 1  # or every turn would draw alike
        seconds = time.perf_counter() - started
        used = f"{len(ids) + tokens} of {plural(context, 'position')}"
        self.terminal.note(f"{plural(tokens, 'token')} in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s; {used}")


class _Shown:
    """Writes a text as it comes, up to what ends it; what may be the beginning of that waits."""

    def __init__(self, stops: tuple[str, ...], terminal: Terminal) -> None:
        self._stops, self._terminal = stops, terminal
        self._text, self._written = "", 0

    def add(self, text: str) -> None:
        self._text += text
        visible = self._visible()
        ended = len(visible) < len(self._text)
        self._write(visible, 0 if ended else max((_overlap(visible, stop) for stop in self._stops), default=0))

    def end(self) -> str:
        """Write what is left, and return all of it."""
        visible = self._visible()
        self._write(visible, 0)
        self._terminal.show_raw("\n")
        return visible

    def _visible(self) -> str:
        return min((self._text.partition(stop)[0] for stop in self._stops), key=len, default=self._text)

    def _write(self, visible: str, waiting: int) -> None:
        upto = len(visible) - waiting
        self._terminal.show_raw(visible[self._written : upto])
        self._written = max(self._written, upto)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
