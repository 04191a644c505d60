"""Quantizers by the name a recipe uses. A new one is a file here, a line in this table and a test file."""

from __future__ import annotations

from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.gptq import Gptq
from neoquant.quantizers.hessian import Hessian
from neoquant.quantizers.nearest import Nearest

QUANTIZERS: dict[str, type[Quantizer]] = {cls.name: cls for cls in (Nearest, Gptq)}

__all__ = ["QUANTIZERS", "Gptq", "Hessian", "Nearest", "Quantizer"]
