"""Quantizers by the name a recipe uses. A new one is a file here, a line in this table and a test file."""

from __future__ import annotations

from typing import Any

from neoquant.errors import RequestError
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.gptq import Gptq
from neoquant.quantizers.hessian import Hessian
from neoquant.quantizers.hqq import Hqq
from neoquant.quantizers.nearest import Nearest

QUANTIZERS: dict[str, type[Quantizer]] = {cls.name: cls for cls in (Nearest, Gptq, Hqq)}

CALIBRATED_QUANTIZER = Gptq.name
"""The quantizer that calibration samples imply where none is named."""

__all__ = [
    "CALIBRATED_QUANTIZER",
    "QUANTIZERS",
    "Gptq",
    "Hessian",
    "Nearest",
    "Quantizer",
    "calibrated_quantizers",
    "make_quantizer",
    "parse_option",
    "quantizer_with_options",
]


def make_quantizer(name: str, **options: object) -> Quantizer:
    """The quantizer a user means; `options` are its own (`Quantizer.options`), those left out its defaults.

    Raises RequestError naming what is legal.
    """
    cls = _quantizer_class(name)
    legal = cls.options()
    if foreign := [key for key in options if key not in legal]:
        raise RequestError(f"quantizer {name!r} has no option {' or '.join(foreign)}; {_all_options()}")
    for key, value in options.items():
        if not _fits(value, legal[key]):
            raise RequestError(f"{key} is {_kind(legal[key])} (its default is {legal[key]!r}), got {value!r}")
    return cls(**options)


def calibrated_quantizers() -> list[str]:
    """Names of the quantizers that need calibration."""
    return [name for name, cls in QUANTIZERS.items() if cls.needs_calibration]


def quantizer_with_options(names: list[str]) -> str:
    """The only quantizer that has all options of these names.

    Raises RequestError if there is none, or if there are several.
    """
    found = [name for name, cls in QUANTIZERS.items() if set(names) <= cls.options().keys()]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"{' and '.join(found)} have the option {' and '.join(names)}: name one of these quantizers")
    raise RequestError(f"no quantizer has the option {' and '.join(names)}; {_all_options()}")


def parse_option(quantizer: str, key: str, text: str) -> Any:
    """The value that `text` spells of the quantizer's option `key`: a number, true or false, or the text itself.

    Raises RequestError if the quantizer or the option does not exist, or if the option takes another kind of value.
    """
    default = _quantizer_class(quantizer).options().get(key)
    if isinstance(default, bool) and text in ("true", "false"):
        return text == "true"
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        try:
            return type(default)(text)
        except ValueError:
            pass  # `make_quantizer` says what is legal
    return text


def _quantizer_class(name: str) -> type[Quantizer]:
    if name not in QUANTIZERS:
        raise RequestError(f"quantizer {name!r} is not one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


def _all_options() -> str:
    options = {name: cls.options() for name, cls in QUANTIZERS.items()}
    return "; ".join(f"{name} has {', '.join(its)}" for name, its in options.items() if its)


def _fits(value: object, default: object) -> bool:
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def _kind(default: object) -> str:
    if isinstance(default, bool):
        return "true or false"
    return "a text" if isinstance(default, str) else "a number"
