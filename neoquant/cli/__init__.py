"""The command line: one file a verb, and here what is the same for all of them.

Nothing heavy is imported before a verb runs, so that `neoquant --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import neoquant
from neoquant.cli import (
    bench,
    chat,
    compare,
    convert,
    eval,
    generate,
    info,
    inspect,
    plan,
    progress_lines,
    push,
    quantize,
    report,
    sweep,
    tune,
)
from neoquant.cli.options import Debug, Quiet
from neoquant.cli.processes import Terminated, interrupt_by_signals, say_last
from neoquant.cli.terminal import Terminal
from neoquant.errors import NeoquantError

INTERRUPTED = 130  # what shells report of a program ended by SIGINT
TERMINATED = 143  # ... and by SIGTERM

app = typer.Typer(
    name="neoquant",
    rich_markup_mode=None,  # plain help: half the time, and it can be searched, piped and read aloud
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, verb, purpose in (
    ("plan", plan.plan, "Show what quantizing would do, from headers alone."),
    ("quantize", quantize.quantize, "Quantize a model into a new folder."),
    ("tune", tune.tune, "Train scales, biases and norms of a quantized model."),
    ("convert", convert.convert, "Convert a model to another format, without rounding."),
    ("eval", eval.eval_, "Measure perplexity and bits per byte."),
    ("compare", compare.compare, "Measure the accuracy loss of quantized models."),
    ("sweep", sweep.sweep, "Quantize and compare models x recipes x suites."),
    ("inspect", inspect.inspect, "Measure the accuracy loss layer by layer."),
    ("report", report.report, "Turn saved results into a page, a table or a model card."),
    ("generate", generate.generate, "Continue a text."),
    ("chat", chat.chat, "Write a text together with a model, turn by turn."),
    ("bench", bench.bench, "Measure speed and memory, beside other programs."),
    ("push", push.push, "Upload a model to the hub."),
    ("info", info.info, "Describe a model, or this machine."),
):
    app.command(name, short_help=purpose)(verb)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"neoquant {neoquant.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize GPT-Neo, save it in formats that other programs read, and measure the accuracy loss.

    \b
    A first look, with the small model that comes with neoquant:
      neoquant quantize --bits 4 --type nf4
      neoquant compare  neoquant-demo neoquant-demo-nf4 --suite demo
    \b
    With a real one:
      neoquant plan     EleutherAI/gpt-neo-1.3B --bits 4 --type nf4
      neoquant quantize EleutherAI/gpt-neo-1.3B --bits 4 --type nf4
      neoquant generate gpt-neo-1.3B-nf4 --prompt "Hello, I'm a language model"
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Results go to stdout, everything else to stderr."""
    terminal = Terminal()
    if progress_lines.is_asked_for():
        progress_lines.end_with_starter()
    typed = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        try:
            command = typer.main.get_command(app)
            with _our_warnings_only(terminal), command.make_context("neoquant", typed, obj=terminal) as ctx:
                command.invoke(ctx)
            sys.stdout.flush()
            return 0
        except typer.Exit as exit:
            return exit.exit_code
        except typer.Abort:
            raise
        except BrokenPipeError:
            # Whoever read our output has gone (`| head`): there is nobody to tell. Python would complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if terminal.debug:
                traceback.print_exc()
            message, code = explain(error)
            say_last(terminal, f"error: {message}")
            return code
    except (typer.Abort, KeyboardInterrupt) as error:  # which may come while an error is told
        terminated = isinstance(error, Terminated)
        say_last(terminal, " ".join(["terminated" if terminated else "interrupted", *map(str, error.args)]))
        return TERMINATED if terminated else INTERRUPTED
    finally:
        for give_back in terminal.at_end:
            give_back()


@contextmanager
def _our_warnings_only(terminal: Terminal) -> Iterator[None]:
    """Warnings of neoquant's own become notes; those that libraries address to developers are dropped."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("neoquant"):
            terminal.note(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # where in the code it was raised is no news
        yield


def explain(error: Exception) -> tuple[str, int]:
    """The message for an error, in one line, and the exit code: 1 it could not be done, 2 the request is not legal."""
    if isinstance(error, NeoquantError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # typer's own, whichever version raised it
        return _usage_message(error), 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; close other programs, or try a smaller --context or another --device", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}", 1
    return f"{type(error).__name__}: {error} (this is a bug: run with --debug to see where, and report it)", 1


def _usage_message(error: Any) -> str:
    """Typer's sentence about an unknown or malformed option, and where the known ones are listed."""
    message = str(error.format_message()).rstrip(".")
    if hasattr(error.__cause__, "errors"):  # pydantic converts the values for typer, and knows what was given
        message += f", got {error.__cause__.errors()[0]['input']!r}"
    ctx = getattr(error, "ctx", None)
    help = f" (see {ctx.command_path} --help)" if ctx is not None else ""
    return f"{message[:1].lower()}{message[1:]}{help}"


def _have_openmp_wait_briefly() -> None:
    """Threads of torch's OpenMP sleep after less than a millisecond without work: they stand in the way of the
    native library's, and of other programs. Read when torch is imported; `bench` measures others as they are."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() and sys.argv[1:2] != ["bench"]:
        os.environ["GOMP_SPINCOUNT"] = "10000"


def run() -> None:
    """The `neoquant` command."""
    if "_NEOQUANT_COMPLETE" in os.environ:  # set by what --install-completion gives to the shell
        app(prog_name="neoquant")
    # Python has none where it was closed.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is no UTF-8 is found where the text is used
    _have_openmp_wait_briefly()
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries tell developers is not for users
    interrupt_by_signals()
    sys.exit(main())
