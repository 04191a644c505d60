"""Finds the compiled library, and chooses its instruction set and its threads.

The library is optional: where it was not compiled, or is switched off, `active()` says why, and everything runs
through torch and bitsandbytes. Nothing is loaded on import. The environment variable NEOQUANT_ISA, read when the
library is first wanted, forces an instruction set: `portable`, `avx2`, `avxvnni`, `avx512`, `avx512vnni`, `amx`,
`neon`, or `off` for none of it. NEOQUANT_TEAM chooses whose threads it runs on: `own` (pool.c), or `openmp` for those
of torch.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from neoquant.errors import RequestError

ISAS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "neon")
"""By their number in cpu.h, each better than those before."""

SWITCH = "NEOQUANT_ISA"
TEAMS = ("own", "openmp")
TEAM_SWITCH = "NEOQUANT_TEAM"
FOLDER = Path(__file__).parent  # where the library was put when neoquant was installed
VERSION = 18  # of the C functions' signatures, as in parallel.c

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_LEVELS = (*(_POINTER,) * 4, _LONG, _INT, *(_POINTER,) * 3)  # where the values of columns may lie
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "nq_use_team": (_POINTER,),
    "nq_round_blocks": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT),
    "nq_round_rows": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT, _INT),
    "nq_round_nested": (_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT),
    "nq_affine": (_POINTER, _INT, *(_LONG,) * 3, _INT, _INT, _POINTER, _POINTER, _INT, _POINTER, _INT, _INT),
    "nq_pack_nibbles": (_POINTER, _POINTER, _LONG, _INT),
    "nq_unpack_nibbles": (_POINTER, _POINTER, _LONG, _INT),
    "nq_pack": (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "nq_unpack": (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "nq_gptq_block": (*(_POINTER,) * 3, *(_LONG,) * 3, *_LEVELS, *(_POINTER,) * 2, _LONG, *(_POINTER,) * 2, _INT, _INT),
    "nq_trellis_block": (
        *(_POINTER,) * 2,
        *(_LONG,) * 3,
        *(_POINTER,) * 3,
        _LONG,
        _INT,
        *(_POINTER,) * 7,
        _INT,
        _INT,
    ),
    "nq_multiply": (_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT, _INT),
    "nq_multiply_int8": (_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT, _INT),
    "nq_likeliest": (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "nq_decode": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT),
    "nq_steps": (
        *(_POINTER,) * 2,
        _LONG,
        _POINTER,
        *(_LONG,) * 2,
        _POINTER,
        _LONG,
        _POINTER,
        _INT,
        _INT,
    ),
}

_RESULTS = dict.fromkeys(
    ("nq_affine", "nq_trellis_block", "nq_multiply", "nq_multiply_int8", "nq_steps"), _INT
)  # the others give nothing
_NO_MEMORY = -1  # cpu.h


class NativeWarning(UserWarning):
    """The native library is there, and cannot be used."""


@dataclass(frozen=True)
class Native:
    """What is active: the library (None: nothing), the number of its instruction set, and the reason, for a reader."""

    library: ctypes.CDLL | None
    isa: int
    reason: str

    def call(self, function: str, *arguments: object) -> int | None:
        """Call a C function; tensors are given by their `data_ptr()`. Raises MemoryError where it found no memory."""
        result: int | None = getattr(self.library, function)(*arguments)
        if result == _NO_MEMORY:
            raise MemoryError(f"the native library found no memory to work in ({function.removeprefix('nq_')})")
        return result


@cache
def active() -> Native:
    """The library as this process uses it, found once.

    Raises RequestError where NEOQUANT_ISA or NEOQUANT_TEAM name what there is not, or what this machine cannot run.
    """
    whose = os.environ.get(TEAM_SWITCH, "")
    if whose not in ("", *TEAMS):
        raise RequestError(f"{TEAM_SWITCH} is {whose!r}; legal are {' and '.join(TEAMS)}")
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "off", *ISAS):
        raise RequestError(f"{SWITCH} is {wanted!r}; legal are {', '.join(ISAS)} and off")
    if wanted == "off":
        return Native(None, 0, f"switched off by {SWITCH}=off")
    library, reason = _load()
    if library is None:
        if wanted:
            raise RequestError(f"{SWITCH} is {wanted!r}, but there is no native library: {reason}")
        return Native(None, 0, reason)
    if wanted and not library.nq_runs(ISAS.index(wanted)):
        raise RequestError(f"{SWITCH} is {wanted!r}, but this machine runs {', '.join(_runnable(library))}")
    isa = wanted or _runnable(library)[-1]  # only then: to look for AMX is to ask the system for it
    why = f"forced by {SWITCH}" if wanted else "is the best here"
    return Native(library, ISAS.index(isa), f"{isa} {why}, {_join_team(library, whose)}")


def runnable() -> list[str]:
    """The instruction sets that this machine runs; empty without a library."""
    library, _ = _load()
    return [] if library is None else _runnable(library)


def _runnable(library: ctypes.CDLL) -> list[str]:
    return [name for number, name in enumerate(ISAS) if library.nq_runs(number)]


def address(tensor: torch.Tensor | None) -> int | None:
    """Of a tensor's data, as a C function takes it."""
    return None if tensor is None else tensor.data_ptr()


def threads() -> int:
    """How many threads a call may use: as many as torch does."""
    return torch.get_num_threads()


@contextmanager
def leaving_cores(count: int) -> Iterator[None]:
    """Inside, torch and the library leave so many cores to others of our threads, as far as there are more than one.

    A team of threads stays awake for a while after each of torch's operations, and would take them away. How many
    threads torch has is one setting of the process: where several of its threads enter, the last one to leave says.
    """
    global _whole
    before, outer = torch.get_num_threads(), _whole
    torch.set_num_threads(max(1, before - count))
    _whole = before if outer is None else outer
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _whole = outer


class TorchAlone:
    """Inside, torch computes on the calling thread.

    Those of its team that one operation wakes stay awake for milliseconds (GOMP_SPINCOUNT), and take the cores from the
    library's threads. So operations that are small beside what the library does next are not worth waking it.
    """

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._before)


def team_size() -> int:
    """How many threads torch has, or had outside `leaving_cores`."""
    return torch.get_num_threads() if _whole is None else _whole


_whole: int | None = None


def _unusable(reason: str) -> str:
    """`reason`, after a warning: somebody built the library, and waits for its speed."""
    warnings.warn(f"the native library is not used, torch takes its place: {reason}", NativeWarning, stacklevel=2)
    return reason


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library with its signatures set; or None and why."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"_cpu{suffix}").exists()]
    if not found:
        return None, "not compiled when neoquant was installed (no C compiler, or NEOQUANT_NO_EXTENSION was set)"
    newest = max(found, key=lambda path: path.stat().st_mtime)  # earlier releases gave it a name for each Python
    try:
        library = ctypes.CDLL(str(newest))
        version = library.nq_version()
        if version != VERSION:
            return None, _unusable(f"{newest.name} is of version {version}, not {VERSION}: install neoquant again")
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, _RESULTS.get(name)
    except (OSError, AttributeError) as error:
        return None, _unusable(f"{newest.name} cannot be used: {error}")
    return library, ""


def _join_team(library: ctypes.CDLL, whose: str) -> str:
    """Have the library run on threads of its own, or on torch's; which, for a reader."""
    team = _torch_team() if whose == "openmp" else None
    if whose == "openmp" and team is None:
        raise RequestError(f"{TEAM_SWITCH} is 'openmp', but this torch has no OpenMP that could be used; legal is own")
    library.nq_use_team(team)
    chosen = f" by {TEAM_SWITCH}" if whose else ""
    return f"on torch's OpenMP threads{chosen}" if team else f"on threads of its own{chosen}"


def _torch_team() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch itself is linked to, if it is to one."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        team = ctypes.CDLL(str(torch_library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(team, ctypes.c_void_p).value
