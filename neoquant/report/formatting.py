"""How figures are written: the same in a terminal, on a page and in a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neoquant.data.suite import Suite
    from neoquant.evaluation.result import Change, Score
    from neoquant.grids import Grid

NONE = "-"


def divergence(kl: float | None) -> str:
    """Two digits at least, however small; a dash for what was not measured."""
    if kl is None:
        return NONE
    return f"{kl:.5f}" if kl >= 1e-4 or kl <= 0 else f"{kl:.1e}"


def share(ratio: float) -> str:
    """A ratio in per cent, two digits at least: `0.86`, `0.0012`, `12.3`."""
    percent = 100 * ratio
    if percent >= 10 or percent <= 0:
        return f"{percent:.1f}"
    return f"{percent:.2f}" if percent >= 0.1 else f"{percent:.2g}" if percent >= 1e-3 else f"{percent:.0e}"


def signed(value: float, digits: int) -> str:
    """`+0.12`, `−1,234.50`; what rounds to nothing has no sign."""
    text = f"{value:+,.{digits}f}"
    return text[1:] if not float(text.replace(",", "")) else text.replace("-", "−")


def nats_interval(value: float, low: float | None, high: float | None) -> str:
    """`+0.0123 [+0.0100, +0.0145]`, the interval `[-]` where there is none."""
    if low is None or high is None:
        return f"{value:+.4f} [{NONE}]"
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def change_interval(change: Change) -> str:
    """The change in nats a token and its 95 % interval."""
    return nats_interval(change.nats_per_token, change.low, change.high)


def agreement(change: Change) -> str:
    """`96.80 ± 0.12 %`, or a dash where it was not measured."""
    if change.agreement is None:
        return NONE
    error = NONE if change.agreement_error is None else f"{100 * change.agreement_error:.2f}"
    return f"{100 * change.agreement:.2f} ± {error} %"


def perplexity(score: Score) -> str:
    """Five digits or so."""
    value = score.perplexity
    return f"{value:.4g}" if value >= 1e5 else f"{value:,.1f}" if value >= 1000 else f"{value:.3f}"


def number(value: float | None) -> str:
    """Three decimals, or a dash for what is not known."""
    return NONE if value is None else f"{value:.3f}"


def suite_words(suite: Suite) -> str:
    """`suite demo (rolling, context 1024)`"""
    stride = f", stride {suite.stride}" if suite.stride else ""
    return f"suite {suite.name} ({suite.protocol}, context {suite.context}{stride})"


def grid_label(grid: Grid) -> str:
    """`nf4, block size 64, double quant`: a grid in words."""
    fields = grid.describe()
    words = [str(fields.pop("name"))]
    for key, value in fields.items():
        name = key.replace("_", " ")
        words.append(f"{name} {value}" if not isinstance(value, bool) else name if value else f"no {name}")
    return ", ".join(words)
