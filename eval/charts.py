"""Draw the charts of the README and of docs/choosing.md from the committed results.

    python eval/charts.py            # draw docs/charts/*.svg anew
    python eval/charts.py --check    # exit 1 where a chart does not show what the results say

What a chart shows stands in it in words, and that is what is checked: another version of matplotlib may place a tick
elsewhere.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from choices import WAYS, Choice, choices

from neoquant.evaluation import Comparison
from neoquant.report import charts
from neoquant.report.chart_labels import name_points, plain_log
from neoquant.report.formatting import divergence
from neoquant.report.svg import ACCENT, INK, PAPER, drawing, standalone
from neoquant.report.verdict import DIVERGENCE, TOLERANCE, percent_change, percent_interval, recommended, short_names

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "eval" / "results" / "demo.json"
FOLDER = ROOT / "docs" / "charts"


class Drawn(NamedTuple):
    description: str
    svg: str


def drawn() -> dict[Path, Drawn]:
    """Every chart by its file."""
    result = Comparison.from_json(DEMO.read_text("utf-8"))
    short, best = short_names(result), recommended(result)
    points, rows, sizes, changes = [], [], [], []
    for candidate in result.candidates:
        model, change = candidate.evaluation.model, candidate.total
        name, chosen = short[model.name], candidate is best
        assert model.bytes_on_disk is not None and change.kl is not None
        megabytes = model.bytes_on_disk / 1e6
        points.append(charts.Point(name, megabytes, change.kl, change.kl_low, change.kl_high, chosen))
        rows.append(charts.Interval.of_change(name, change, chosen))
        sizes.append(f"{name} {megabytes:.1f} MB, KL {divergence(change.kl)}")
        changes.append(f"{name} {percent_change(change)} ({percent_interval(change)})")
    offered = choices()
    base = f"{result.reference.model.name} on suite {result.reference.suite.name}"
    made = {
        "demo-size": (
            "Size against KL divergence",
            sizes,
            charts.size_chart(points, "size", "Size against KL divergence", DIVERGENCE),
        ),
        "demo-change": (
            "Change of perplexity, 95 % intervals",
            changes,
            charts.interval_chart(rows, "change", "Change of perplexity", "change of perplexity, %", 100 * TOLERANCE),
        ),
        "demo-bits": (
            "Bits a weight against KL divergence",
            [f"{c.grid} {c.bits:.2f} bits: {_losses(c)}" for c in offered],
            bits_chart(offered),
        ),
    }
    return {
        FOLDER / f"{name}.svg": Drawn(
            f"{title}, {base}: {'; '.join(figures)}.", standalone(svg, f"{title}, {base}: {'; '.join(figures)}.")
        )
        for name, (title, figures, svg) in made.items()
    }


MARKS = dict(zip(WAYS, ("o", "s", "^", "D"), strict=True))


def bits_chart(offered: list[Choice]) -> str:
    """KL over the bits of a weight, both logarithmic: a mark for each way of rounding, grids named at the least."""
    with drawing(380, "bits", "Bits a weight against KL divergence") as (axes, done):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for way, mark in MARKS.items():
            points = [(choice.bits, choice.losses[way]) for choice in offered if way in choice.losses]
            ink = ACCENT if way == WAYS[-1] else INK
            axes.plot(*zip(*points, strict=True), mark, color=ink, markerfacecolor=ink if ink == ACCENT else PAPER,
                      markersize=6, label=way)  # fmt: skip
        axes.set_xlim(2, 10.5)
        axes.set_ylim(2e-4, 2 * max(kl for choice in offered for kl in choice.losses.values()))
        axes.set_xticks([2, 3, 4, 6, 8], ["2", "3", "4", "6", "8"])
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.set_xlabel("bits a weight, linear layers")
        axes.set_ylabel("KL divergence, nats a token")
        plain_log(axes, "y")
        axes.legend(frameon=False, fontsize=10.5, loc="lower left")
        least = [charts.Point(c.grid, c.bits, min(c.losses.values()), None, None, False) for c in offered]
        marks = [(c.bits, kl) for c in offered for kl in c.losses.values() if kl != min(c.losses.values())]
        name_points(axes, least, marks)
    return done.svg


def _losses(choice: Choice) -> str:
    return ", ".join(f"{way} {divergence(kl)}" for way, kl in choice.losses.items())


def is_current(path: Path, chart: Drawn) -> bool:
    """Whether the file shows what the results say."""
    if not path.is_file():
        return False
    found = re.search(r"<desc>(.*?)</desc>", path.read_text("utf-8"), re.DOTALL)
    return found is not None and found[1] == escape(chart.description)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something would change")
    check = parser.parse_args().check
    stale = {path: chart for path, chart in drawn().items() if not is_current(path, chart)}
    for path, chart in stale.items():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(chart.svg, "utf-8")
        print(f"{path.relative_to(ROOT)}: {'not what the results say' if check else 'drawn'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
