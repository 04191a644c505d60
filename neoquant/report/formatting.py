"""How figures are written: the same in a terminal, on a page and in a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neoquant.data.suite import Suite
    from neoquant.evaluation.inspection_result import Loss
    from neoquant.evaluation.result import Change, Score
    from neoquant.grids import Grid

NONE = "-"

_DURATIONS = ((86400 * 365, "year"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def duration(seconds: float) -> str:
    """`0.4 seconds`, `1 second`, `3 minutes`, `2.5 hours`, `50 days`: one unit, two digits or so."""
    for unit, name in _DURATIONS:
        if seconds >= 2 * unit or name == "second":
            value = seconds / unit
            digits = 0 if value >= 10 or abs(value - round(value)) < 0.05 else 1
            text = f"{value:,.{digits}f}"
            return f"{text} {name}{'' if text == '1' else 's'}"
    raise AssertionError


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
    """`96.80 %`, the share of tokens with the same top token, or a dash where it was not measured."""
    return NONE if change.agreement is None else f"{100 * change.agreement:.2f} %"


def agreement_interval(change: Change) -> str:
    """`96.80 [96.56, 97.04] %`: with its 95 % interval."""
    if change.agreement is None:
        return NONE
    if change.agreement_low is None or change.agreement_high is None:
        return f"{100 * change.agreement:.2f} [{NONE}] %"
    low, high = 100 * change.agreement_low, 100 * change.agreement_high
    return f"{100 * change.agreement:.2f} [{low:.2f}, {high:.2f}] %"


def divergence_interval(change: Change | Loss) -> str:
    """`0.00065 [0.00060, 0.00071]`: the mean KL divergence and its 95 % interval."""
    if change.kl is None:
        return NONE
    if change.kl_low is None or change.kl_high is None:
        return f"{divergence(change.kl)} [{NONE}]"
    return f"{divergence(change.kl)} [{divergence(change.kl_low)}, {divergence(change.kl_high)}]"


def perplexity(score: Score) -> str:
    """Five digits or so."""
    value = score.perplexity
    return f"{value:.4g}" if value >= 1e5 else f"{value:,.1f}" if value >= 1000 else f"{value:.3f}"


def number(value: float | None) -> str:
    """Three decimals, or a dash for what is not known."""
    return NONE if value is None else f"{value:.3f}"


def suite_label(suite: Suite) -> str:
    """`suite demo (rolling, context 1024)`"""
    stride = f", stride {suite.stride}" if suite.stride else ""
    return f"suite {suite.name} ({suite.protocol}, context {suite.context}{stride})"


_OFF = {"symmetric": "asymmetric"}


def grid_label(grid: Grid) -> str:
    """`nf4, block size 64, double quant`: a grid and its options."""
    options = grid.describe()
    labels = [str(options.pop("name"))]
    for key, value in options.items():
        name = key.replace("_", " ")
        labels.append(
            f"{name} {value}" if not isinstance(value, bool) else name if value else _OFF.get(name, f"no {name}")
        )
    return ", ".join(labels)
