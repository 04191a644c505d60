"""The Viterbi algorithm on a trellis in torch: slow, and the same codes as native/trellis.c bit for bit.

Costs are whole numbers up to `UNREACHED`, as which what is larger counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neoquant.grids.decoding import Trellis, tensor_of

AROUND = 32  # rows on either side of a span's beginning that are searched for the state there
UNREACHED = 0xFFFF
TOGETHER = 64  # sequences searched at once


def best_codes(wanted: Tensor, importance: Tensor, trellis: Trellis, table: tuple[float, ...]) -> Tensor:
    """For each of wanted[N, n], float32, in units of its scale, the codes of a span, uint8[N, n].

    A squared error of one unit costs importance[N, n], float32.
    """
    search = _Search(trellis, table, wanted.device)
    found = [
        search.codes(*pair)
        for pair in zip(torch.split(wanted, TOGETHER), torch.split(importance, TOGETHER), strict=True)
    ]
    return torch.cat(found)


class _Search:
    def __init__(self, trellis: Trellis, table: tuple[float, ...], device: torch.device) -> None:
        self.trellis, self.values = trellis, tensor_of(table, device)
        self.fan = 1 << trellis.code_bits
        self.kept = 1 << (trellis.state_bits - trellis.code_bits)
        self.levels = trellis.levels(device).long()

    def codes(self, wanted: Tensor, importance: Tensor) -> Tensor:
        """As `best_codes`, of a few sequences."""
        n = wanted.shape[1]
        costs = self._costs(wanted, importance)
        if n <= self.trellis.memory:
            return self._try_all(costs)
        rows = [(i - AROUND) % n for i in range(2 * AROUND)]  # short spans are walked around several times
        last, back = self._walk(costs, rows, costs.new_zeros(len(costs), self.fan * self.kept))
        state = last.argmin(1)  # of equals the first
        for row in range(2 * AROUND - 1, AROUND - 1, -1):
            state = self._came_from(back[row], state)
        return self._from_beginning(costs, state % self.kept)

    def _costs(self, wanted: Tensor, importance: Tensor) -> Tensor:
        """What each value costs above the cheapest, int32[N, n, values]."""
        square = (wanted[..., None] - self.values).square_()
        square = square.sub_(square.amin(2, keepdim=True)).mul_(importance[..., None])
        return square.clamp_(max=UNREACHED).int()

    def _walk(self, costs: Tensor, rows: list[int], cost: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The least cost of each state after `rows`, int32[N, S], from `cost` on; and of each row, which of the states
        that come to what is kept was the best, uint8[N, S / fan]."""
        least, back = cost.new_zeros(len(cost), 1), []
        for row in rows:
            before = cost.view(len(cost), self.fan, self.kept)
            kept = before[:, 0]
            choice = torch.zeros_like(kept, dtype=torch.uint8)
            for state in range(1, self.fan):
                better = before[:, state] < kept
                kept = torch.where(better, before[:, state], kept)
                choice[better] = state
            kept = kept - least
            least = kept.amin(1, keepdim=True)
            added = costs[:, row].index_select(1, self.levels)
            cost = added.add_(kept.repeat_interleave(self.fan, 1)).clamp_(max=UNREACHED)
            back.append(choice)
        return cost, back

    def _came_from(self, choice: Tensor, state: Tensor) -> Tensor:
        kept = state // self.fan
        return choice.gather(1, kept[:, None])[:, 0].long() * self.kept + kept

    def _from_beginning(self, costs: Tensor, kept: Tensor) -> Tensor:
        """The best codes of those that begin from a state that keeps kept[N], and end in one."""
        count, n = costs.shape[:2]
        ends = kept[:, None] + torch.arange(self.fan, device=kept.device) * self.kept
        start = costs.new_full((count, self.fan * self.kept), UNREACHED).scatter_(1, ends, 0)
        last, back = self._walk(costs, list(range(n)), start)
        state = ends.gather(1, last.gather(1, ends).argmin(1, keepdim=True))[:, 0]
        codes = torch.empty(count, n, dtype=torch.uint8, device=costs.device)
        for row in range(n - 1, -1, -1):
            codes[:, row] = (state % self.fan).to(torch.uint8)
            state = self._came_from(back[row], state)
        return codes

    def _try_all(self, costs: Tensor) -> Tensor:
        """Spans no longer than a state: every path is tried."""
        n = costs.shape[1]
        paths = torch.arange(self.fan**n, device=costs.device)
        shifts = torch.arange(n, device=costs.device) * self.trellis.code_bits
        codes = ((paths[:, None] >> shifts) & (self.fan - 1)).to(torch.uint8)  # [paths, n]
        levels = self.trellis.numbers(codes.T).T.long()
        sums = costs.new_zeros(len(costs), len(paths))
        for row in range(n):
            sums += costs[:, row].index_select(1, levels[:, row])
        return codes[sums.argmin(1)]
