"""A small C library for CPUs: compiled when neoquant is installed, never needed.

cpu.h, parallel.c (threads), quantize.c and multiply.c are the library; loader.py finds it, the other modules give it
tensors. It knows nothing of grids or layers.
"""

from __future__ import annotations

from neoquant.native.loader import ISAS, SWITCH, Native, active, runnable

__all__ = ["ISAS", "SWITCH", "Native", "active", "runnable"]
