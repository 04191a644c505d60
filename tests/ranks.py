"""Command lines run by several processes, as torchrun runs them, without starting Python and torch anew for each.

As a script: reads requests, JSON line by line, and forks the processes of each. Does what torchrun's agent does: keeps
a store that outlives the processes, and sends SIGTERM to those that are left when one fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 240.0  # seconds after which a run hangs


class Ended(NamedTuple):
    """How the processes of a run ended, by rank; what they wrote together."""

    codes: list[int]
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failed run must print, all of its processes together."""
        lines = self.err.strip().splitlines()
        assert 0 not in self.codes and len(lines) == 1 and not self.out, self
        return lines[0]


class Ranks:
    """`ranks(2, "quantize", folder, ...)` runs a command line in two processes.

    `patch` is Python that each process runs first, with its `rank`; `interrupt`: a file whose appearance brings SIGINT
    to all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._driver = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, ranks: int, *words: object, patch: str = "", interrupt: str = "") -> Ended:
        assert self._driver.stdin is not None and self._driver.stdout is not None
        request = {"ranks": ranks, "words": list(map(str, words)), "patch": patch, "interrupt": interrupt}
        print(json.dumps(request), file=self._driver.stdin, flush=True)
        return Ended(**json.loads(self._driver.stdout.readline()))

    def close(self) -> None:
        assert self._driver.stdin is not None and self._driver.stdout is not None
        self._driver.stdin.close()
        self._driver.wait()
        self._driver.stdout.close()


def _serve() -> None:
    import torch.distributed as dist

    for number, line in enumerate(sys.stdin):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        print(json.dumps(_run(json.loads(line), number, store.port)), flush=True)


def _run(request: dict[str, Any], number: int, port: int) -> dict[str, Any]:
    streams = [Path(f"{number}.{name}") for name in ("out", "err")]
    files = [path.open("wb") for path in streams]
    ranks = [_fork(request, rank, number, port, [file.fileno() for file in files]) for rank in range(request["ranks"])]
    codes = _wait(ranks, Path(request["interrupt"]) if request["interrupt"] else None)
    for file in files:
        file.close()
    out, err = (path.read_text() for path in streams)
    return {"codes": codes, "out": out, "err": err}


def _fork(request: dict[str, Any], rank: int, number: int, port: int, streams: list[int]) -> int:
    process = os.fork()
    if process:
        return process
    os.close(0)  # the requests are the parent's
    sys.stdin = None  # type: ignore[assignment]
    for target, stream in enumerate(streams, 1):
        os.dup2(stream, target)
    size = request["ranks"]
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": str(number),
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    code: Any = 99
    try:
        from neoquant.cli import run

        sys.argv = ["neoquant", *request["words"]]
        exec(request["patch"], {"rank": rank})
        run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(ranks: list[int], interrupt: Path | None) -> list[int]:
    codes: dict[int, int] = {}
    began, told = time.monotonic(), False
    while len(codes) < len(ranks):
        for process in ranks:
            if process not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(ended[1])
        left = [process for process in ranks if process not in codes]
        word = None
        if interrupt is not None and interrupt.exists():
            word, interrupt, told = signal.SIGINT, None, True
        elif any(codes.values()) and not told:
            word, told = signal.SIGTERM, True
        elif time.monotonic() - began > PATIENCE:
            word = signal.SIGKILL
        if word is not None:
            for process in left:
                os.kill(process, word)
        time.sleep(0.02)
    return [codes[process] for process in ranks]


if __name__ == "__main__":
    _serve()
