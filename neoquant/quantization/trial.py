"""A few samples through the model as it is and through others beside it, block by block: what each of those loses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neoquant.checkpoint import Checkpoint
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.model.names import BASE_PREFIX
from neoquant.quantization.plan import EMBEDDING_GRIDS
from neoquant.quantization.plan_rows import quantizable_type
from neoquant.quantization.reverse import head_name, read_head
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

POSITIONS = 64  # whose logits, of two models in double precision, are alive at once


class Trial:
    """The hidden states of samples ids[R, T] as the next block sees them: in the model as it is, in those whose blocks
    are each on one of several grids, and in those whose embeddings are quantized, by what a recipe calls that."""

    def __init__(
        self, checkpoint: Checkpoint, config: GPTNeoConfig, ids: Tensor, grids: int, tables: Iterable[str]
    ) -> None:
        self.checkpoint, self.config, self.ids = checkpoint, config, ids
        self.masks = AttentionMasks(ids.shape[1], ids.shape[1], config.window_size, None, ids.device)
        self.plain = self._embedded(None)
        self.on_grids = [self.plain] * grids
        self.tables = {name: self._embedded(name) for name in tables}

    def through(self, block: Block, made: Mapping[str, list[QuantizedTensor]]) -> None:
        """Pass the block, which is as it was afterwards; `made` are the weights of its linears on each grid."""
        for number, x in enumerate(self.on_grids):
            with _replaced(block, {name: each[number] for name, each in made.items()}):
                self.on_grids[number] = block(x, self.masks)
        self.plain = block(self.plain, self.masks)
        self.tables = {name: block(x, self.masks) for name, x in self.tables.items()}

    def losses(self) -> tuple[list[float], dict[str, float]]:
        """Mean KL divergence from the model as it is, behind the last block, nats a token: on each grid, and by what
        embeddings are."""
        ln_f, table = read_head(self.checkpoint, self.config)
        on_grids = divergences(ln_f, table, self.plain, self.on_grids, table)
        head = head_name(self.checkpoint, self.config)
        of_tables = {
            name: divergences(ln_f, table, self.plain, [x], self._rounded(head, name))[0]
            for name, x in self.tables.items()
        }
        return on_grids, of_tables

    def _embedded(self, quantized: str | None) -> Tensor:
        """The samples as the first block sees them, float32[R, T, C]."""
        names = {name.removeprefix(BASE_PREFIX): name for name in self.checkpoint.headers}
        name = names.get("wte.weight") or head_name(self.checkpoint, self.config)
        table = self.checkpoint.read(name).float() if quantized is None else self._rounded(name, quantized)
        positions = self.checkpoint.read(names["wpe.weight"])[: self.ids.shape[1]].float()
        return table[self.ids].add_(positions)

    def _rounded(self, name: str, quantized: str) -> Tensor:
        """A table as a recipe's `embeddings` has it, float32[V, C]."""
        table = self.checkpoint.read(name)
        q = Nearest().quantize(table.to(quantizable_type(table.dtype)), EMBEDDING_GRIDS[quantized])
        return q.dequantize(torch.float32)


def divergences(ln_f: nn.LayerNorm, table: Tensor, x: Tensor, others: list[Tensor], other_table: Tensor) -> list[float]:
    """Mean KL divergence of the predictions by each of `others`[R, T, C] and other_table[V, C] from those by x and
    table, nats a token."""
    pieces = (torch.split(each.flatten(0, -2), POSITIONS) for each in (x, *others))
    sums = [0.0] * len(others)
    for plain, *changed in zip(*pieces, strict=True):
        log_p = _log_probabilities(ln_f(plain), table)
        p = log_p.exp()
        for number, each in enumerate(changed):
            sums[number] += float((p * (log_p - _log_probabilities(ln_f(each), other_table))).sum())
    return [total / x[..., 0].numel() for total in sums]


def _log_probabilities(h: Tensor, table: Tensor) -> Tensor:
    return (h @ table.T).double().log_softmax(1)


@contextmanager
def _replaced(block: Block, weights: Mapping[str, QuantizedTensor]) -> Iterator[None]:
    """Have the block's linears hold these weights meanwhile."""
    linears = {name: block.get_submodule(name) for name in weights}
    before = {name: linear.weight for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.weight = nn.Parameter(weights[name].dequantize(torch.float32), requires_grad=False)
        yield
    finally:
        for name, linear in linears.items():
            linear.weight = before[name]
