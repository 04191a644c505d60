"""What a calibrated run has done so far, kept beside its output so that the same request can resume.

    .NAME.unfinished/
      rank-1/, ...                        the same of every other process that shares the run, but for the blocks
      run.json                            what identifies the run
      block-4-<digest>.safetensors        what the output holds of that block, and its layers' reports
      hidden-5-<digest>                   the calibration rows as block 5 sees them, float32[R, T, C]
      input-5-<digest>                    what it sees before anything is quantized, for gradients and correction
      behind-5-<digest>                   what is behind its attention then, for correction
      gradient-5-<digest>                 the gradients at what it sees
      curvature-5-<digest>.safetensors    the output-side Hessians of its layers
      scratch-..., *.new                  in the making: of no use to another process

A file gets its name, which holds the beginning of its SHA-256, once all of it is on the disk. A block counts as
finished when its file has its name; the hidden states behind it have theirs before, in every process, and those before
it are removed afterwards. So a process may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from neoquant.calibration.hidden_states import (
    CPU,
    SCRATCH,
    HiddenStates,
    HiddenStatesInMemory,
    HiddenStatesOnDisk,
    read_hidden_states,
    rows_of_batch,
    writing,
)
from neoquant.distributed import SINGLE_PROCESS, ProcessGroup
from neoquant.errors import LostProcessError, OutputError, RequestError
from neoquant.files.locks import close_folder, open_folder, take_lock
from neoquant.files.writing import sync_folder, write_file

_RUN = "run.json"
_NEW = ".new"
_OTHER_HALF = "/other-half"
_DIGITS = 16  # of a digest, in a file's name
_OURS = re.compile(
    rf"\.?(run\.json|(block|curvature)-\d+-[0-9a-f]{{{_DIGITS}}}\.safetensors|"
    rf"(hidden|input|behind|gradient)-\d+(-[0-9a-f]{{{_DIGITS}}})?)(.*\.new)?|{SCRATCH}.*"
)
_RANK = re.compile(r"rank-(\d+)")

Output = dict[str, dict[str, Tensor]]
"""Tensor of the source -> what the output holds in its place, by name."""


@dataclass(frozen=True)
class FinishedBlock:
    """What the output holds of one block, and a report of each of its layers as plain values."""

    output: Output
    reports: dict[str, Any]


class ResumableRun:
    """The unfinished run that makes the folder `out`. In its `with` block no other process can go on with it::

        with ResumableRun(out) as run:
            run.begin(run, blocks)
            for number in range(run.finished):
                ... = run.block(number)
            states = run.states(shape, spilled) or <of the first block>
            for number in range(run.finished, blocks):
                run.keep(number, FinishedBlock(...), states)
            run.remove()

    Leaving it otherwise keeps what is finished. `restart` drops what there is instead of going on. Of several processes
    each keeps states of its own; they call `begin` and `keep` together, and only the first one keeps blocks.
    """

    def __init__(self, out: Path, *, restart: bool = False, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.group = group
        self._out, self._shared = out, out.parent / f".{out.name}.unfinished"
        self.folder = self._shared / f"rank-{group.rank}" if group.rank else self._shared
        self.finished = 0
        self.blocks = 0
        self._restart = restart
        self._lock: int | None = None

    def __enter__(self) -> ResumableRun:
        with writing(self.folder):
            while not self._is_locked():
                close_folder(self._lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.blocks and not self._holds_work():
            self.remove()
        with suppress(OSError):  # it is gone, or holds something
            self.folder.rmdir()
            self._shared.rmdir()
        close_folder(self._lock)
        if kind is None or not self._holds_work():
            return
        place = f"after block {self.finished} of {self.blocks}"
        if not self.finished:
            place = "on the way through the unquantized model"
        if issubclass(kind, KeyboardInterrupt):
            raise kind(f"{place}: the same command resumes there, --restart starts again") from error
        if isinstance(error, LostProcessError):
            error.message += f"; {place}: the same command resumes there"

    def begin(self, run: Mapping[str, Any], blocks: int) -> None:
        """Go on with the run that plain values `run` identify, or begin it.

        Raises:
            RequestError: what is unfinished is another run; the message names what differs.
            OutputError: its files cannot be read, or the folder holds others than a run's.
        """
        self.require_own()
        run = json.loads(json.dumps(run))  # as it will be read
        if self._restart or not (self.folder / _RUN).exists():
            self._clear()
            self._write(_RUN, json.dumps(run, indent=1).encode())
        else:
            self._require_same(run)
        for path in self.folder.iterdir():
            if path.name.startswith(SCRATCH) or path.name.endswith(_NEW):
                path.unlink()
        self.blocks = blocks
        while self.finished < blocks and self._find(f"block-{self.finished}-*.safetensors"):
            self.finished += 1
        self.finished = self.group.broadcast(self.finished)

    def block(self, number: int) -> FinishedBlock:
        """What was kept of a finished block. Raises OutputError if that is damaged."""
        path = self._find(f"block-{number}-*.safetensors")
        if path is None:
            raise self._damaged(f"block-{number}")
        content = self._content(path)
        try:
            start = 8 + int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8:start])["__metadata__"]
            tensors = load(content)
            names = json.loads(metadata["made"])
            output = {row: {name: tensors[name] for name in stored} for row, stored in names.items()}
            return FinishedBlock(output, json.loads(metadata["reports"]))
        except (ValueError, KeyError, SafetensorError):
            raise self._damaged(path.name) from None

    def hidden_states(
        self, shape: tuple[int, int, int], spilled: bool, device: torch.device = CPU
    ) -> HiddenStates | None:
        """The calibration rows [R, T, C] behind the last finished block, or None if there is none."""
        if not self.finished or self.finished == self.blocks:
            return None
        return self.states(f"hidden-{self.finished}", shape, spilled, device)

    def has(self, name: str) -> bool:
        """Whether states of that name are kept."""
        return self._find(f"{name}-*") is not None

    def states(self, name: str, shape: tuple[int, int, int], spilled: bool, device: torch.device = CPU) -> HiddenStates:
        """What `keep_states` kept. Raises OutputError if that is damaged or missing."""
        path = self._find(f"{name}-*")
        found = None if path is None else read_hidden_states(path, shape, _digest_in(path), spilled, device)
        if found is None:
            raise self._damaged(name)
        return found

    def keep_states(self, name: str, states: HiddenStates) -> None:
        """Keep states[R, T, C], which may be used on, as `name`: a kind and the number of a block."""
        path = self.folder / f"{name}{_NEW}"
        digest = states.save(path)
        before = [found for found in self.folder.glob(f"{name}-*") if found.name != f"{name}-{digest[:_DIGITS]}"]
        self._rename(path, f"{name}-{digest[:_DIGITS]}")
        for found in before:  # of a run that got no further, whose sums were added in another order
            found.unlink()

    def drop(self, *names: str) -> None:
        """Let go of kept states."""
        for name in names:
            for path in self.folder.glob(f"{name}-*"):
                path.unlink()

    def has_output_hessians(self, number: int) -> bool:
        """Whether those of a block's layers are kept."""
        return self.has(f"curvature-{number}")

    def keep_output_hessians(self, number: int, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Keep those of a block's layers by name, of both halves of the samples: [heads, D, D] each."""
        pairs = {name: dict(zip((name, name + _OTHER_HALF), pair, strict=True)) for name, pair in found.items()}
        content = save({name: tensor.contiguous() for pair in pairs.values() for name, tensor in pair.items()})
        digest = hashlib.sha256(content).hexdigest()
        self._write(f"curvature-{number}-{digest[:_DIGITS]}.safetensors", content)

    def output_hessians(self, number: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What `keep_output_hessians` kept. Raises OutputError if that is damaged or missing."""
        path = self._find(f"curvature-{number}-*.safetensors")
        if path is None:
            raise self._damaged(f"curvature-{number}")
        found = load(self._content(path))
        return {name: (found[name], found[name + _OTHER_HALF]) for name in found if not name.endswith(_OTHER_HALF)}

    def reached(self, blocks: int) -> int | None:
        """The lowest block whose output-side Hessians are kept; None before that of the last of so many."""
        return next(filter(self.has_output_hessians, range(blocks)), None)

    def new_hidden_states(self, shape: tuple[int, int, int], spilled: bool, device: torch.device = CPU) -> HiddenStates:
        """A place for the rows that the first block sees."""
        batch = rows_of_batch(shape[1])
        if spilled:
            return HiddenStatesOnDisk(shape, batch, self.folder, device=device)
        return HiddenStatesInMemory(shape, batch, device)

    def keep(self, number: int, block: FinishedBlock | None, hidden: HiddenStates) -> None:
        """Keep a block that was finished, in the first process, and the `hidden` states behind it, in all."""
        if number + 1 < self.blocks:
            self.keep_states(f"hidden-{number + 1}", hidden)
        self.group.wait()  # every process can go on behind the block, and so it may count as finished
        if block is not None:
            self._keep_block(number, block)
        self.finished = number + 1
        self.group.wait()  # it does, and what was before it is needed no more
        self.drop(f"hidden-{number}", f"input-{number}", f"behind-{number}", f"curvature-{number}")

    def _keep_block(self, number: int, block: FinishedBlock) -> None:
        tensors = {name: tensor.contiguous() for stored in block.output.values() for name, tensor in stored.items()}
        metadata = {"made": {row: list(stored) for row, stored in block.output.items()}, "reports": block.reports}
        content = save(tensors, {key: json.dumps(value) for key, value in metadata.items()})
        digest = hashlib.sha256(content).hexdigest()
        self._write(f"block-{number}-{digest[:_DIGITS]}.safetensors", content)

    def remove(self) -> None:
        """Forget the run: it is finished, or nothing of it is."""
        self._clear()
        self.blocks = 0
        with suppress(OSError):  # another process's part is in it
            self.folder.rmdir()

    def remove_all(self) -> None:
        """Forget the run in every process, which all call this: it is finished."""
        if self.group.rank:
            self.remove()
        self.group.wait()
        if not self.group.rank:
            self.remove()

    def other_request(self, difference: str) -> RequestError:
        """What is unfinished is not what is asked for."""
        return RequestError(
            f"{self._shared} holds an unfinished run of another request ({difference}): "
            "ask for that to go on with it, or drop it with --restart"
        )

    def _is_locked(self) -> bool:
        """Lock the folder, made if need be; False if it was removed meanwhile. A lock dies with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = open_folder(self.folder)
        except FileNotFoundError:
            self._lock = None
            return False
        if take_lock(self._lock) is False:
            close_folder(self._lock)
            raise OutputError(f"{self._out} is being made by another process")
        if self._lock is None:
            return True
        with_name = self.folder.stat() if self.folder.exists() else None
        return with_name is not None and os.path.samestat(with_name, os.fstat(self._lock))

    def require_own(self) -> None:
        """Nothing is deleted in a folder that only has the name of an unfinished run's."""
        ranks = self._other_ranks()
        for folder in (self.folder, *ranks):
            for path in folder.iterdir():
                if (not _OURS.fullmatch(path.name) or path.is_dir()) and path not in ranks:
                    raise OutputError(
                        f"{folder} holds {path.name}, which is no part of an unfinished run: "
                        "move the folder, or name another one to make"
                    )

    def _require_same(self, run: Mapping[str, Any]) -> None:
        try:
            found = json.loads((self.folder / _RUN).read_bytes())
        except ValueError:
            raise self._damaged(_RUN) from None
        if differences := list(_differences(found, run)):
            raise self.other_request("; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else ""))

    def _damaged(self, name: str) -> OutputError:
        return OutputError(
            f"{self.folder}: {name} is damaged or missing, so there is no going on; begin with --restart"
        )

    def _holds_work(self) -> bool:
        """Whether anything is kept that took longer than reading."""
        return bool(self.finished or self.reached(self.blocks) is not None or self.has("input-1"))

    def _content(self, path: Path) -> bytes:
        """Of a file that holds what its name says. Raises OutputError otherwise."""
        content = path.read_bytes()
        if not hashlib.sha256(content).hexdigest().startswith(_digest_in(path)):
            raise self._damaged(path.name)
        return content

    def _find(self, pattern: str) -> Path | None:
        return next(self.folder.glob(pattern), None)

    def _write(self, name: str, content: bytes) -> None:
        write_file(self.folder / name, content)

    def _rename(self, path: Path, name: str) -> None:
        with writing(path):
            path.rename(self.folder / name)
            sync_folder(self.folder)

    def _clear(self) -> None:
        """Remove what is inside; first what says that there is anything. Processes that are there remove their own."""
        (self.folder / _RUN).unlink(missing_ok=True)
        for folder in self._other_ranks():
            if int(folder.name.rpartition("-")[2]) >= self.group.size:
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        for path in self.folder.iterdir():
            if not path.is_dir():
                path.unlink()
        self.finished = 0

    def _other_ranks(self) -> list[Path]:
        """Folders of other processes in the first one's."""
        if self.group.rank:
            return []
        return [path for path in self.folder.iterdir() if _RANK.fullmatch(path.name) and path.is_dir()]


def has_interrupted_run(out: Path) -> bool:
    """Whether a run that makes `out` was ended before its end."""
    return (out.parent / f".{out.name}.unfinished" / _RUN).exists()


def _digest_in(path: Path) -> str:
    return path.name.split(".")[0].rpartition("-")[2]


def _differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """What plain values differ in, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True), 1):
            yield from _differences(old, new, f"{place} {number}")
    elif before != now:
        yield f"{place} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = "not stated" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) < 24 else text[:20] + '..."'
