"""Draw the README's charts from the committed results.

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

from neoquant.evaluation import Comparison
from neoquant.report import charts
from neoquant.report.formatting import divergence
from neoquant.report.svg import standalone
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
    }
    return {
        FOLDER / f"{name}.svg": Drawn(
            f"{title}, {base}: {'; '.join(figures)}.", standalone(svg, f"{title}, {base}: {'; '.join(figures)}.")
        )
        for name, (title, figures, svg) in made.items()
    }


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
