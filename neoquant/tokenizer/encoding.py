"""Texts as token ids: what calling a tokenizer gives, padded where asked, as lists or tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import Self

from neoquant.errors import RequestError

TENSORS = ("pt", "np")
SIDES = ("left", "right")


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask` (0 on padding), reached as keys or attributes; `**encoding` feeds a model.

    Tensors are int64 `[B, T]`. Without `return_tensors` they are lists, of one text a flat one.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"an encoding of {', '.join(self)} has no {name!r}") from None

    def to(self, device: torch.device | str | int) -> Self:
        """Move every tensor to `device`, and return this encoding."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device)
        return self


def pad(rows: Sequence[Sequence[Any]], width: int, filler: Any, side: str) -> list[list[Any]]:
    """Each row with `filler` on its `side` until it is `width` long."""
    if side not in SIDES:
        raise RequestError(f"padding_side is {side!r}; legal are {' and '.join(SIDES)}")
    padded = []
    for row in rows:
        filling = [filler] * (width - len(row))
        padded.append([*filling, *row] if side == "left" else [*row, *filling])
    return padded


def as_tensors(columns: dict[str, list[list[Any]]], kind: str) -> BatchEncoding:
    """Rows of equal length as tensors. Raises RequestError for rows of several lengths, or another `kind`."""
    if kind not in TENSORS:
        raise RequestError(f"return_tensors is {kind!r}; legal are {', '.join(TENSORS)} and None")
    lengths = sorted({len(row) for row in columns["input_ids"]})
    if len(lengths) > 1:
        raise RequestError(
            f"texts of {lengths[0]} to {lengths[-1]} tokens make no tensor: pass padding=True, or truncation"
        )
    tensors = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in columns.items()}
    return BatchEncoding(tensors if kind == "pt" else {name: tensor.numpy() for name, tensor in tensors.items()})
