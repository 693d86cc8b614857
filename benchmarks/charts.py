"""The charts and the table of docs/results.md, from the runs in experiments/results.

    pip install -e '.[bench]'
    python benchmarks/charts.py            writes docs/images/em-tiny-*.svg, prints the table as Markdown

Held-out exact match against generated tokens, mean and 95 % bootstrap interval over seeds, between the
evaluations of a run by interpolation. The runs are those of all seeds that had the shared learning rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from arms import NAMES, Rows, in_points, read, score_at
from rexrag.stats import interval, paired_p

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
CHECKPOINTS = ("hard", "middle", "easy")
FILES = ("{}.jsonl", "{}-new-seeds.jsonl", "{}-rates-new-seeds.jsonl")
ALGORITHMS = {"grpo": "#7a7a7a", "rex-rag": "#d9822b", "rex-rag-distill": "#2f7ed8"}
POINTS = (30_000, 60_000)
INK = "#808080"
"""A grey that reads on a white page and on a black one."""


def runs(checkpoint: str) -> Rows:
    """Every run of the three algorithms on this checkpoint, under today's names."""
    found = read([RESULTS / name.format(checkpoint) for name in FILES])
    named = [{**row, "arm": NAMES.get(row["arm"], row["arm"])} for row in found]
    return [row for row in named if row["arm"] in ALGORITHMS]


def draw(checkpoint: str, rows: Rows, out: Path) -> None:
    """One chart: a line and a band for each algorithm."""
    grid = np.linspace(0, 60_000, 41)
    plt.rcParams.update({"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": checkpoint})
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    for name, colour in ALGORITHMS.items():
        scores = [[score_at(row, x) for x in grid] for row in rows if row["arm"] == name]
        bands = [interval(list(at)) for at in zip(*scores, strict=True)]
        axes.plot(grid / 1000, [band["value"] for band in bands], color=colour, label=name, linewidth=2)
        low, high = ([band[end] for band in bands] for end in ("low", "high"))
        axes.fill_between(grid / 1000, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="generated tokens, thousands", ylabel="held-out exact match", ylim=(0.4, 0.85))
    axes.set_title(f"tiny-{checkpoint}", color=INK, fontsize=11)
    axes.grid(color=INK, alpha=0.25)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.legend(loc="lower right", frameon=False, labelcolor=INK)
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"em-tiny-{checkpoint}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def table_row(checkpoint: str, rows: Rows, name: str) -> str:
    """Markdown: means at the two points of the budget, and the paired difference to GRPO in points."""
    control = {(row["batch"], row["seed"]): row for row in rows if row["arm"] == "grpo"}
    own = [row for row in rows if row["arm"] == name]
    cells = [f"`tiny-{checkpoint}`", f"`{name}`", str(len(own))]
    for point in POINTS:
        cells.append(f"{np.mean([score_at(row, point) for row in own]):.3f}".removeprefix("0"))
        pairs = [score_at(row, point) - score_at(control[row["batch"], row["seed"]], point) for row in own]
        cells.append("" if name == "grpo" else in_points(interval(pairs) | {"p": paired_p(pairs)}))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    out: Path = parser.parse_args().out
    head = ["initial checkpoint", "algorithm", "seeds"]
    head += [cell for point in POINTS for cell in (f"EM at {point // 1000} k", "difference")]
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    for checkpoint in CHECKPOINTS:
        rows = runs(checkpoint)
        draw(checkpoint, rows, out)
        print(*(table_row(checkpoint, rows, name) for name in ALGORITHMS), sep="\n")


if __name__ == "__main__":
    main()
