"""What a calibrated run will need, from the model's shape and the calibration's alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from neoquant.calibration.hidden_states import rows_of_batch
from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig

_RESIDENT_BYTES = 300_000_000  # of a process that has imported torch and quantized tiny layers
_WIDEST_KEPT = 512_000_000  # inner activations are kept up to here: it saves a tenth of the time
_SQUARES = 8  # matrices [I, I] alive at once while a Hessian is inverted: measured, itself included
_WEIGHTS = 4  # and of a weight's size [O, I] while that is rounded


@dataclass(frozen=True)
class CalibrationMemory:
    """What rows x length tokens take: bytes at the peak of memory, and on the disk until the run is finished."""

    rows: int
    length: int

    memory: int
    disk: int
    spilled: bool
    """Whether the rows' hidden states are in files instead of memory."""
    keeps_inner: bool
    """Whether the MLP's inner activations are kept, instead of computed twice."""


def estimate_memory(config: GPTNeoConfig, rows: int, length: int, max_memory: int | None = None) -> CalibrationMemory:
    """What rows x length tokens of calibration need, with their hidden states in files if memory is too small.

    Raises:
        RequestError: one block alone needs more than `max_memory`.
    """
    plenty, little = (_estimate(config, rows, length, spilled) for spilled in (False, True))
    if max_memory is None or plenty.memory <= max_memory:
        return plenty
    if little.memory <= max_memory:
        return little
    raise RequestError(
        f"calibrating needs about {little.memory / 1e6:,.0f} MB for one block, "
        f"more than the {max_memory / 1e6:,.0f} MB it may take"
    )


def _estimate(config: GPTNeoConfig, rows: int, length: int, spilled: bool) -> CalibrationMemory:
    C, inner = config.hidden_size, config.inner_size
    states = 4 * rows * length * C
    block = 4 * (4 * C * C + 2 * C * inner)
    piece = 4 * min(rows, rows_of_batch(length)) * length * (2 * inner + 4 * C)
    held = 0 if spilled else states
    attention = 2 * held + _SQUARES * 4 * C * C  # what out_proj sees is held as well
    wide = 4 * rows * length * inner
    keeps_inner = not spilled and wide <= _WIDEST_KEPT
    mlp = held + keeps_inner * wide + _SQUARES * 4 * inner * inner + _WEIGHTS * 4 * C * inner
    finished = config.num_layers * block // 4  # 8 bits a weight at most
    return CalibrationMemory(
        rows,
        length,
        _RESIDENT_BYTES + block + piece + max(attention, mlp),
        finished + (4 if spilled else 2) * states,
        spilled,
        keeps_inner,
    )


def guess_seconds(config: GPTNeoConfig, rows: int, length: int) -> float:
    """About how long a calibrated run will take on this machine's CPU: its multiplications, at a rate measured now."""
    return _multiplications(config, rows * length) / _rate()


def _multiplications(config: GPTNeoConfig, tokens: int) -> float:
    """Of one run, in pairs of a multiplication and an addition."""
    C, inner = config.hidden_size, config.inner_size
    forward = tokens * (4 * C * C + 4 * C * inner)  # some are made twice
    moments = 0.55 * tokens * (3 * C * C + inner * inner)
    factors = 0.7 * (3 * C**3 + inner**3)
    rounding = 0.75 * (4 * C**3 + inner * C * C + C * inner * inner)
    return config.num_layers * (forward + moments + factors + rounding)


def _rate(size: int = 1024, duration: float = 0.2) -> float:
    """Multiplications a second of float32 matrix products, less what a run's smaller operations take."""
    x = torch.rand(size, size)
    x @ x
    started, done = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < duration:
        x @ x
        done += 1
    return 0.6 * done * size**3 / took
