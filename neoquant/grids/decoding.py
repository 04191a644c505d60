"""How values follow from codes and parameters, as plain data.

    value = (number of the code - zero) * scale

Every grid states its `Decoding`. The reference, the native library's kernels and JAX compute with a weight by what
stands there, so none of them knows a grid by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CHUNK = 7 * 4096  # weights handled at once: whole blocks of every size, in cache, and below what torch gives to threads
LAUNCHED = 1 << 26  # on a GPU, where each piece costs launches
NESTED_GROUP = 256  # scales that share a scale under double quantization


@dataclass(frozen=True)
class Scale:
    """Where the float32 scale of each group is found: in the parameter `param`, times `factor`.

    With a `table` of 256 values, `param` holds bytes that are looked up in it. With `nested` = (coarse, offset), two
    more float32 parameters, the value looked up is then multiplied by that of `coarse` which its run of 256 scales
    shares, and `offset` is added (double quantization; arXiv:2305.14314, section 3).
    """

    param: str
    factor: float = 1.0
    table: tuple[float, ...] | None = None
    nested: tuple[str, str] | None = None

    def of(self, params: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        """The scale of every group, float32 in the parameter's shape; or of some, by their numbers int64[...]."""
        stored = params[self.param] if groups is None else params[self.param][groups]
        if self.table is None:
            return stored.float() if self.factor == 1 else stored.float() * self.factor
        values = tensor_of(self.table, stored.device).index_select(0, stored.reshape(-1).int()).view(stored.shape)
        if self.nested is None:
            return values
        coarse, offset = (params[name] for name in self.nested)
        if groups is None:
            return values.mul_(coarse.repeat_interleave(NESTED_GROUP)[: values.numel()]).add_(offset)
        return values.mul_(coarse[groups // NESTED_GROUP]).add_(offset)


@dataclass(frozen=True)
class Trellis:
    """Codes that are read down the rows of a column: the last `memory` of them, the newest lowest, are the state.

    The number of a weight is that of the table at (state * multiplier mod 2**state_bits) >> (state_bits - level_bits).
    `span` rows, or what is left, are a ring: before its first codes come its last ones.
    """

    code_bits: int
    state_bits: int
    level_bits: int
    multiplier: int
    span: int

    @property
    def memory(self) -> int:
        """Codes in a state."""
        return self.state_bits // self.code_bits

    def levels(self, device: torch.device) -> Tensor:
        """The place in the table of each state, uint8[states]."""
        return _levels_of_states(self, device)

    def sources(self, rows: Tensor, count: int) -> Tensor:
        """Whose codes the values of rows int64[N] of `count` are read from, the row's own first: int64[N, memory]."""
        first = rows // self.span * self.span
        length = (count - first).clamp(max=self.span)
        back = torch.arange(self.memory, device=rows.device)
        return first[:, None] + ((rows - first)[:, None] - back).remainder(length[:, None])

    def numbers(self, codes: Tensor) -> Tensor:
        """Codes uint8[O, I] to places in the table, uint8[O, I]."""
        found = torch.empty_like(codes)
        for span, to in zip(torch.split(codes, self.span), torch.split(found, self.span), strict=True):
            back = [span.roll(rows, 0) for rows in range(self.memory)]
            to.copy_(self._numbers(back))
        return found

    def numbers_of(self, codes: Tensor) -> Tensor:
        """The same of some rows: codes uint8[N, memory, I] of their `sources` to uint8[N, I]."""
        return self._numbers(list(codes.unbind(1)))

    def _numbers(self, back: list[Tensor]) -> Tensor:
        state = back[-1].int()
        for newer in back[-2::-1]:
            state = state.bitwise_left_shift_(self.code_bits).bitwise_or_(newer)
        table = self.levels(state.device)
        return table.index_select(0, state.view(-1)).view(state.shape)


@dataclass(frozen=True)
class Decoding:
    """What a weight [O, I] on a grid means.

    bits        of a code
    scale       where a group's scale is found
    group       inputs that share a scale and a zero; None: a whole row
    flat        groups run through the flattened weight and may cross rows, and their parameters are [groups]; else
                every row starts anew and may end in a shorter group, and their parameters are [O, groups of a row]
    table       the number of each code, float32; None: codes are integers
    step        what all numbers of `table` are multiples of, if they are; products in integers are exact then
    zero_code   the code of zero in `table`, for padding
    signed      integer codes are two's complement, without a zero
    zero        the parameter with the zero of each group, uint8 or float16; None: all are `middle`
    trellis     how places in `table` follow from codes; None: they are the codes
    """

    bits: int
    scale: Scale
    group: int | None = None
    flat: bool = False
    table: tuple[float, ...] | None = None
    step: float | None = None
    zero_code: int = 0
    signed: bool = False
    zero: str | None = None
    middle: int = 0
    trellis: Trellis | None = None

    def width(self, columns: int) -> int:
        """Inputs of a whole group in a row of `columns`."""
        return columns if self.group is None else self.group if self.flat else min(self.group, columns)

    def levels(self) -> tuple[Tensor, float]:
        """The table in whole steps, for products in integers: int8[codes], and the step; nearest in squared error."""
        assert self.table is not None
        return _levels(self.table, self.step)

    def decode(
        self, codes: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, whole_steps: bool = False
    ) -> Tensor:
        """The values of `codes`, uint8[O, I]: computed in float32, given as dtype[O, I].

        `whole_steps` takes the numbers of a table as `levels` has them.
        """
        places = codes if self.trellis is None else self.trellis.numbers(codes)
        return self._decode(places, params, dtype, whole_steps)

    def _decode(self, codes: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype, whole_steps: bool) -> Tensor:
        laid = codes.reshape(1, -1) if self.flat else codes  # flattened, a weight is one long row
        out = torch.empty(laid.shape, dtype=dtype, device=codes.device)
        width = self.width(laid.shape[1])
        scale = self.scale.of(params).view(laid.shape[0], -1)
        zero = None if self.zero is None else params[self.zero].float().view(laid.shape[0], -1)
        for rows, columns in _pieces(laid.shape, width, CHUNK if codes.device.type == "cpu" else LAUNCHED):
            numbers, to = self._numbers(laid[rows, columns], whole_steps), out[rows, columns]
            first, whole = columns.start // width, numbers.shape[1] // width
            body = whole * width
            for part, size in ((slice(0, body), (whole, width)), (slice(body, None), (1, numbers.shape[1] - body))):
                if 0 not in size:
                    at = (rows, slice(first + part.start // width, first + part.start // width + size[0]), None)
                    values = numbers[:, part].view(-1, *size)
                    values = values if zero is None else values.sub_(zero[at])
                    torch.mul(values, scale[at], out=to[:, part].view(-1, *size))
        return out.view(codes.shape)

    def sources(self, rows: Tensor, count: int) -> Tensor:
        """Whose codes the values of rows int64[N] of `count` are read from: their own; on a trellis int64[N * n]."""
        return rows if self.trellis is None else self.trellis.sources(rows, count).view(-1)

    def decode_rows(
        self, codes: Tensor, params: Mapping[str, Tensor], rows: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """As `decode`, of the rows int64[N] alone; `codes` uint8[N, I] are those of `sources`."""
        if self.trellis is not None:
            codes = self.trellis.numbers_of(codes.view(len(rows), -1, codes.shape[1]))
        if not self.flat:
            return self._decode(codes, {name: param[rows] for name, param in params.items()}, dtype, False)
        columns = torch.arange(codes.shape[1], device=codes.device)
        groups = (rows[:, None] * codes.shape[1] + columns) // self.width(codes.shape[1])
        values = self._numbers(codes, False).float()
        if self.zero is not None:
            values.sub_(params[self.zero][groups].float())
        return values.mul_(self.scale.of(params, groups)).to(dtype)

    def by_groups(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """What the scales multiply: the number of each of `codes`, uint8[O, I], less its group's zero, by groups,
        float32[R, G, width].

        R is O, or 1 where groups run through the flattened weight. What the last group of a row is short of is 0.
        """
        places = codes if self.trellis is None else self.trellis.numbers(codes)
        laid = places.reshape(1, -1) if self.flat else places
        rows, columns = laid.shape
        width = self.width(columns)
        groups = -(columns // -width)
        numbers = torch.zeros(rows, groups * width, device=codes.device)
        numbers[:, :columns] = self._numbers(laid, False)
        if self.zero is not None:
            zero = params[self.zero].float().view(rows, groups)
            numbers[:, :columns] -= zero.repeat_interleave(width, 1)[:, :columns]
        return numbers.view(rows, groups, width)

    def _numbers(self, codes: Tensor, whole_steps: bool) -> Tensor:
        """The numbers of codes uint8[R, C], less the zero that all of them share: float32[R, C], or int8[R, C]."""
        if self.table is not None:
            table = tensor_of(self.table, codes.device)
            if whole_steps:
                table = _whole_steps(self.table, self.step, codes.device)
            return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        if self.signed:
            return codes.view(torch.int8)
        return codes.float() if self.zero is not None or not self.middle else codes.float().sub_(self.middle)


@cache
def _levels_of_states(trellis: Trellis, device: torch.device) -> Tensor:
    states = torch.arange(1 << trellis.state_bits) * trellis.multiplier % (1 << trellis.state_bits)
    return (states >> (trellis.state_bits - trellis.level_bits)).to(device, torch.uint8)


@cache
def tensor_of(table: tuple[float, ...], device: torch.device) -> Tensor:
    """A table as float32[n]."""
    return torch.tensor(table, dtype=torch.float32, device=device)


@cache
def _whole_steps(table: tuple[float, ...], step: float | None, device: torch.device) -> Tensor:
    """A table in whole steps, as float32[n]."""
    levels, size = _levels(table, step)
    return (levels.float() * size).to(device)


@cache
def _levels(table: tuple[float, ...], step: float | None) -> tuple[Tensor, float]:
    values = torch.tensor(table, dtype=torch.float32).double()
    top = float(values.abs().max())
    counts = torch.linspace(64, 127, 64 * 63 + 1, dtype=torch.float64)  # of levels on either side, by 64ths
    steps = top / counts if step is None else torch.tensor([step], dtype=torch.float64)
    levels = (values / steps[:, None]).round()
    best = (levels * steps[:, None] - values).square().sum(1).argmin()
    return levels[best].to(torch.int8), float(steps[best])


def _pieces(shape: tuple[int, ...], width: int, size: int) -> Iterator[tuple[slice, slice]]:
    """A matrix in pieces of about `size`: rows, and columns that are whole groups but for the last."""
    height = max(1, size // shape[1])
    length = max(1, size // width) * width
    for row in range(0, shape[0], height):
        for column in range(0, shape[1], length):
            yield slice(row, min(row + height, shape[0])), slice(column, min(column + length, shape[1]))
