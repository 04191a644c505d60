"""What a calibrated run will need, from the model's shape and the calibration's alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from neoquant.calibration.hidden_states import rows_of_batch
from neoquant.calibration.loss_hessian import POSITIONS, coupled_rows
from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig
from neoquant.sizes import size
from neoquant.triton import gptq as triton

_FREE = 0.9  # of a GPU's free memory: what is allocated is not all of it in one piece
CUDA_LIBRARIES = 290_000_000 if torch.version.cuda else 0
"""Resident bytes by which a torch built for CUDA is larger than one for the CPU, once imported (2.13 and 2.14)."""

_RESIDENT_BYTES = 300_000_000 + CUDA_LIBRARIES  # of a process that has imported torch and quantized tiny layers
_WIDEST_KEPT = 512_000_000  # inner activations are kept up to here: it saves a tenth of the time
_SQUARES = 8  # matrices [I, I] alive at once while a Hessian is inverted: measured, itself included
_WEIGHTS = 4  # and of a weight's size [O, I] while that is rounded
_GRADIENT_TOKENS = 32_768  # that pass through the unquantized model, and back: of a text's first rows
_ACTIVATIONS = 14  # of a piece's hidden states, and
_INNER_ACTIVATIONS = 5  # of its inner activations, that are alive at once while gradients run through a block

_CHAINED_SECONDS = 3e-7  # that the search on a trellis takes for a weight: measured, one thread
_COUPLED_SECONDS = 4e-6  # and where rows are coupled


@dataclass(frozen=True)
class Methods:
    """What a calibrated run does beside GPTQ's own.

    gradients  are computed for the model's loss
    reference  what blocks see in the unquantized model is kept, for what outputs lack
    """

    gradients: bool = False
    reference: bool = False


PLAIN = Methods()


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
    methods: Methods = PLAIN
    device: str = "cpu"
    """Where it is computed, and `memory` taken."""
    processes: int = 1
    """That share the rows; `memory` and `disk` are what each of them takes."""


def gradient_rows(rows: int, length: int) -> int:
    """Of so many rows, those that pass through the unquantized model, whose gradients are looked at: the first ones."""
    return max(1, min(rows, _GRADIENT_TOKENS // length))


def estimate_memory(
    config: GPTNeoConfig,
    rows: int,
    length: int,
    max_memory: int | None = None,
    methods: Methods = PLAIN,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> CalibrationMemory:
    """What rows x length tokens of calibration, shared by so many processes, need of each, on its device, with their
    hidden states in files if memory is too small: `max_memory`, or what is free on a GPU.

    Raises:
        RequestError: one block alone needs more than that.
    """
    device = torch.device(device)
    if device.type != "cpu":
        free = int(torch.cuda.mem_get_info(device)[0] * _FREE)
        max_memory = free if max_memory is None else min(max_memory, free)
    plenty, little = (
        replace(_estimate(config, rows, length, spilled, methods, processes), device=str(device))
        for spilled in (False, True)
    )
    if max_memory is None or plenty.memory <= max_memory:
        return plenty
    if little.memory <= max_memory:
        return little
    raise RequestError(
        f"calibrating needs about {size(little.memory)} for one block, more than the {size(max_memory)} it may take"
    )


def _estimate(
    config: GPTNeoConfig, all_rows: int, length: int, spilled: bool, methods: Methods, processes: int
) -> CalibrationMemory:
    C, inner = config.hidden_size, config.inner_size
    first = -(gradient_rows(all_rows, length) // -processes)
    rows = first - ((all_rows - gradient_rows(all_rows, length)) // -processes)
    states = 4 * rows * length * C
    block = 4 * (4 * C * C + 2 * C * inner)
    piece = 4 * min(rows, rows_of_batch(length)) * length * (2 * inner + 4 * C)
    kept = 4 * first * length * C
    held = 0 if spilled else states
    attention = 2 * held + _SQUARES * 4 * C * C  # what out_proj sees is held as well
    wide = 4 * rows * length * inner
    keeps_inner = not spilled and wide <= _WIDEST_KEPT
    mlp = held + keeps_inner * wide + _SQUARES * 4 * inner * inner + _WEIGHTS * 4 * C * inner
    finished = config.num_layers * block // 4  # 8 bits a weight at most
    peak, disk = block + piece + max(attention, mlp), finished + (4 if spilled else 2) * states
    if methods.reference:  # before a block, behind its attention and after it, and what outputs lack
        peak += (0 if spilled else 3) * kept + piece + 2 * 4 * C * inner
        disk += (3 if spilled else 0) * kept
    if methods.gradients:
        # output-side Hessians of one block, of two halves
        curvature = 2 * 4 * (5 * C * C + inner * coupled_rows(config.inner_size, config.hidden_size))
        peak = max(peak + curvature, _gradient_memory(config, first, length, spilled) + block)
        disk += config.num_layers * curvature
    if methods != PLAIN:
        disk += ((2 if methods.reference else 1) * config.num_layers + 4) * kept
    peak += _RESIDENT_BYTES
    return CalibrationMemory(all_rows, length, peak, disk, spilled, keeps_inner, methods, processes=processes)


def _gradient_memory(config: GPTNeoConfig, rows: int, length: int, spilled: bool) -> int:
    """Bytes beside a block while gradients of so many rows run back: at the head, or through a block."""
    C, inner, V = config.hidden_size, config.inner_size, config.vocab_size
    held = 0 if spilled else 2 * 4 * rows * length * C
    tokens = min(rows, rows_of_batch(length)) * length
    head = 4 * (V * C + 3 * POSITIONS * V + 4 * tokens * C)
    scores = 4 * config.num_heads * tokens * length
    moments = 2 * (6 * C * C + 3 * inner * coupled_rows(config.inner_size, config.hidden_size))
    through = 4 * tokens * (_ACTIVATIONS * C + _INNER_ACTIVATIONS * inner) + scores + 4 * moments
    return held + max(head, through)


def guess_seconds(
    config: GPTNeoConfig,
    rows: int,
    length: int,
    methods: Methods = PLAIN,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> float:
    """About how long a calibrated run will take: its multiplications, at a rate measured now; those of rounding are the
    CPU's where a GPU does the others but has no Triton. Processes have a GPU each, but share the CPU."""
    rounding = _multiplications_of_rounding(config)
    count = _multiplications(config, rows * length) - rounding
    if methods.reference:
        count += _multiplications_of_reference(config, gradient_rows(rows, length) * length, methods.gradients)
    if methods.gradients:
        count += _multiplications_of_gradients(config, gradient_rows(rows, length) * length)
    device = torch.device(device)
    if device.type == "cpu":
        return (rounding + count) / _rate(device)
    rate = processes * _rate(device)
    return count / rate + rounding / (_rate(torch.device("cpu")) if triton.refuse() else rate)


def guess_search_seconds(weights: int, methods: Methods) -> float:
    """About how long the search for the paths of so many weights on a trellis will take, beside `guess_seconds`."""
    return weights * (_COUPLED_SECONDS if methods.gradients else _CHAINED_SECONDS) / torch.get_num_threads()


def _multiplications(config: GPTNeoConfig, tokens: int) -> float:
    """Of one run, in pairs of a multiplication and an addition."""
    C, inner = config.hidden_size, config.inner_size
    forward = tokens * (4 * C * C + 4 * C * inner)  # some are made twice
    moments = 0.55 * tokens * (3 * C * C + inner * inner)
    factors = 0.7 * (3 * C**3 + inner**3)
    return config.num_layers * (forward + moments + factors) + _multiplications_of_rounding(config)


def _multiplications_of_rounding(config: GPTNeoConfig) -> float:
    C, inner = config.hidden_size, config.inner_size
    return config.num_layers * 0.75 * (4 * C**3 + inner * C * C + C * inner * inner)


def _multiplications_of_reference(config: GPTNeoConfig, tokens: int, walked: bool) -> float:
    """Of what outputs lack, and of the unquantized model unless it is `walked`."""
    C, inner = config.hidden_size, config.inner_size
    forward = 0 if walked else tokens * (4 * C * C + 2 * C * inner)
    lacking = tokens * (4 * C * C + 2 * C * inner)
    return config.num_layers * (forward + lacking + 4 * C**3 + 0.6 * C * inner * (C + inner))


def _multiplications_of_gradients(config: GPTNeoConfig, tokens: int) -> float:
    """Of the walk to the head and back, and of rounding with coupled rows."""
    C, inner, piece = config.hidden_size, config.inner_size, coupled_rows(config.inner_size, config.hidden_size)
    passes = tokens * (12 * C * C + 5 * C * inner)  # forwards, forwards again but for c_proj, and back
    moments = 0.6 * tokens * (5 * C * C + inner * piece)
    factors = 0.7 * (5 * C**3 + inner * piece**2)
    coupling = 0.5 * (4 * C**3 + C * C * inner + C * inner * piece)
    return config.num_layers * (passes + moments + factors + coupling) + tokens * C * config.vocab_size


def _rate(device: torch.device, size: int = 1024, duration: float = 0.2) -> float:
    """Multiplications a second of float32 matrix products, less what a run's smaller operations take."""
    x = torch.rand(size, size, device=device)
    float((x @ x)[0, 0])
    started, done = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < duration:
        float((x @ x)[0, 0])  # a GPU has finished when a number is there
        done += 1
    return 0.6 * done * size**3 / took
