"""neoquant inside transformers: its formats and kernels in transformers' own GPT-Neo.

    import neoquant.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("a folder in neoquant's own format")

The import registers neoquant with transformers, which is the only thing that it does: "neoquant" as a quantization
method. Folders of other methods (bitsandbytes, GPTQ, compressed-tensors) stay with what transformers has for them until
`use_for` says otherwise; `from_pretrained` here is transformers' own with neoquant for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.quantizers import auto

from neoquant import demo
from neoquant.errors import RequestError
from neoquant.transformers.quantizer import METHOD, NeoquantConfig, NeoquantQuantizer
from neoquant.transformers.to_transformers import to_transformers

__all__ = ["METHODS", "NeoquantConfig", "NeoquantQuantizer", "from_pretrained", "to_transformers", "use_for"]

METHODS = {
    "bitsandbytes": ("bitsandbytes_4bit", "bitsandbytes_8bit"),
    "gptq": ("gptq",),
    "compressed-tensors": ("compressed-tensors",),
}
"""The methods of others whose folders neoquant reads -> their names in transformers' registry."""

if METHOD not in auto.AUTO_QUANTIZER_MAPPING:  # the module may be imported again
    auto.register_quantization_config(METHOD)(NeoquantConfig)
    auto.register_quantizer(METHOD)(NeoquantQuantizer)


def use_for(*methods: str) -> None:
    """Let transformers load folders of these methods with neoquant from now on, in this process; none are all.

    So do programs that call transformers themselves: pipelines, lm-eval, TRL. Where a plain checkpoint is to be
    quantized by `BitsAndBytesConfig`, neoquant rounds it, to the same bytes.

    Raises RequestError for a method that neoquant does not read.
    """
    for name in _registered(methods or tuple(METHODS)):
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = NeoquantConfig
        auto.AUTO_QUANTIZER_MAPPING[name] = NeoquantQuantizer


def from_pretrained(source: str | Path | None, auto_class: Any = None, **options: Any) -> Any:
    """`auto_class.from_pretrained(source, **options)` with neoquant's layers for every format that it reads.

    Args:
        source: a folder or hub id; None is the bundled model.
        auto_class: one of transformers' classes; None is `AutoModelForCausalLM`.
        options: transformers'.

    While it runs, other threads' loading is neoquant's as well.
    """
    auto_class = transformers.AutoModelForCausalLM if auto_class is None else auto_class
    with _used():
        return auto_class.from_pretrained(str(demo.MODEL if source is None else source), **options)


def _registered(methods: tuple[str, ...]) -> list[str]:
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise RequestError(f"no method is called {unknown[0]!r}; legal are {', '.join(METHODS)}")
    return [name for method in methods for name in METHODS[method]]


@contextmanager
def _used() -> Iterator[None]:
    """`use_for` all methods, and then as it was."""
    tables = (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)
    before = [dict(table) for table in tables]
    use_for()
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.update(entries)
