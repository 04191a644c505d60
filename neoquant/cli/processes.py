"""Several processes that torchrun started with one command line: what they share, what each takes, who speaks."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neoquant.cli.terminal import Terminal
from neoquant.errors import LostProcessError, RequestError
from neoquant.sizes import plural

if TYPE_CHECKING:
    from neoquant.distributed import ProcessGroup


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what handles an interruption handles this."""


@contextmanager
def process_group_of(terminal: Terminal, device: str = "cpu") -> Iterator[ProcessGroup]:
    """The processes that share the work; all but the first keep silent unless they fail.

    `device`: where the tensors lie that they exchange.
    """
    from neoquant.distributed import process_group

    with process_group(cuda=device != "cpu") as group:
        if group.rank:
            terminal.quiet = True
        yield group


def own_device(device: str, group: ProcessGroup) -> str:
    """What `--device` names for this process: of several on a machine, each takes the GPU of its own number.

    Raises RequestError where there are too few, or one was named for all.
    """
    if group.local_size == 1 or device == "cpu":
        return device
    import torch

    if device not in ("cuda", "auto"):
        raise RequestError(
            f"--device {device} is one GPU for {group.local_size} processes: say --device cuda, and each takes its own"
        )
    gpus = torch.cuda.device_count()
    if device == "auto" and not gpus:
        return "cpu"
    if gpus < group.local_size:
        raise RequestError(
            f"{group.local_size} processes on this machine, and {plural(gpus, 'CUDA device')}: start one for each"
        )
    torch.cuda.set_device(group.local_rank)
    return f"cuda:{group.local_rank}"


def say_last(terminal: Terminal, line: str) -> None:
    """Say why it ends here; of several processes that end for one reason, one says it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun ends those that are left, and this one is ending
            signal.signal(number, signal.SIG_IGN)
        from neoquant.distributed import speaks_first

        if not speaks_first():
            return
    terminal.say_last(line)


def interrupt_by_signals() -> None:
    """Have SIGTERM unwind as Ctrl-C does, so that partial results are removed and finished work is kept.

    Under torchrun both come to processes that are unwinding already, and are to let them.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    sys.unraisablehook = _send_again
    if os.environ.get("WORLD_SIZE", "1") != "1":
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, _: Any) -> None:
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt | LostProcessError):
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _send_again(lost: Any) -> None:
    """Python drops what is raised in a destructor or a weak reference's callback: an interruption that came in one, as
    imports have them, comes once more when it has returned."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT
        again = threading.Timer(0.01, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)
