"""Quantizers by the name a recipe uses. A new one is a file here, a line in this table and a test file."""

from __future__ import annotations

from neoquant.errors import RequestError
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.gptq import Gptq
from neoquant.quantizers.hessian import Hessian
from neoquant.quantizers.nearest import Nearest

QUANTIZERS: dict[str, type[Quantizer]] = {cls.name: cls for cls in (Nearest, Gptq)}

__all__ = ["QUANTIZERS", "Gptq", "Hessian", "Nearest", "Quantizer", "make_quantizer"]


def make_quantizer(name: str, **options: object) -> Quantizer:
    """The quantizer a user means; `options` are its own (`Quantizer.options`), those left out its defaults.

    Raises RequestError naming what is legal.
    """
    if name not in QUANTIZERS:
        raise RequestError(f"quantizer {name!r} is not one of {', '.join(QUANTIZERS)}")
    cls = QUANTIZERS[name]
    legal = cls.options()
    if foreign := [key for key in options if key not in legal]:
        knowing = [f"{other} has {', '.join(its)}" for other, cls in QUANTIZERS.items() if (its := cls.options())]
        raise RequestError(f"quantizer {name!r} has no option {' or '.join(foreign)}; {'; '.join(knowing)}")
    for key, value in options.items():
        if not _fits(value, legal[key]):
            kind = "a number" if isinstance(legal[key], float) else "a text"
            raise RequestError(f"{key} is {kind} (its default is {legal[key]!r}), got {value!r}")
    return cls(**options)


def _fits(value: object, default: object) -> bool:
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)
