"""A small C library for CPUs: compiled when neoquant is installed, never needed.

pool.c and parallel.c (threads), quantize.c, gptq.c and multiply.c are the library. Its products are written once, in
products.inc.h and the parts that it includes, in a few operations that simd_*.h names for each instruction set; step.c
joins them to what a block does for one position, and likeliest.c finds the largest logit. loader.py finds the library,
the other modules give it tensors. It knows nothing of grids.
"""

from __future__ import annotations

from neoquant.native.loader import (
    ISAS,
    SWITCH,
    TEAM_SWITCH,
    Native,
    TorchAlone,
    active,
    leaving_cores,
    runnable,
    team_size,
)

__all__ = ["ISAS", "SWITCH", "TEAM_SWITCH", "Native", "TorchAlone", "active", "leaving_cores", "runnable", "team_size"]
