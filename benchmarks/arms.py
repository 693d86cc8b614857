"""The runs behind docs/results.md and experiments/LOG.md: collect them, print the tables.

    cd experiments/results
    python ../../benchmarks/arms.py hard.jsonl                            figures and diagnostics of every arm
    python ../../benchmarks/arms.py hard.jsonl --control rex-rag          against another control
    python ../../benchmarks/arms.py hard.jsonl --collect OUT --batch X   add the runs of a finished comparison
    python ../../benchmarks/arms.py hard.jsonl hard-new-seeds.jsonl --along 15000,30000
                                                        several files; differences at points of the budget

A row is one run: arm, seed, and the figures that `rexrag compare` worked out. `batch` names the machine and
day. An arm is compared, in pairs, with the control's run of the same seed in the same batch. The files hold
the names that arms had when they ran; `NAMES` gives today's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rexrag.config.schema import SPENT
from rexrag.experiments.analysis import COMPARED, differences
from rexrag.io import write_text
from rexrag.stats import differs, interval, paired_p
from rexrag.types import Segment

Rows = list[dict[str, Any]]
NAMES = {
    "grpo-matched": "grpo-more-rollouts",
    "resample": "probe-without-cue",
    "probe-uncorrected": "probe-no-correction",
    "rex-rag-rescue": "rex-rag-distill",
    "rex-rag-rescue-paper": "rex-rag-distill-probes",
    "rex-rag-internalize": "rex-rag-context-distillation",
    "rex-rag-internalize-truncated": "rex-rag-context-distillation-is",
    "rex-rag-trajectory": "multiple-importance-sampling",
}
"""The name of an arm in the result files -> its name today."""
KEPT = ("em_before", *COMPARED, "steps", *SPENT.values(), "curve", "diagnostics")
SHOWN = {
    "em_at_budget": "at the budget",
    "em_half": "half way",
    "area": "curve",
    "em": "end",
    "em_fresh": "fresh world",
    "em_1_hop": "1 hop",
    "em_2_hop": "2 hops",
    "em_3_hop": "3 hops",
}


def collect(out: Path, batch: str) -> Rows:
    """The runs of OUT/compare.json."""
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    return [
        {
            "batch": batch,
            "arm": arm,
            "seed": seed,
            # Not rounded: the test by signs counts ties, and rounding would break them.
            **{name: run[name] for name in KEPT if name in run},
        }
        for arm, row in found["arms"].items()
        for seed, run in zip(found["seeds"], row["runs"], strict=True)
    ]


def read(files: Sequence[Path]) -> Rows:
    """The runs of result files, under the names that they hold."""
    lines = [line for f in files if f.is_file() for line in f.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def in_points(difference: dict[str, float]) -> str:
    """Mean, interval and p of a paired difference; bold where `stats.differs`."""
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    p = f"p {difference['p']:.3f}" if difference["p"] >= 0.001 else "p < .001"
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}] {p}".replace("-", "−")
    return f"**{text}**" if differs(difference) else text


def table(rows: Rows, control: str) -> str:
    """Markdown: an arm a line; each cell its mean and its difference to the control, in points."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = [f"| arm | seeds | {' | '.join(SHOWN.values())} |", "|---" * (2 + len(SHOWN)) + "|"]
    base = {(row["batch"], row["seed"]): row for row in rows if row["arm"] == control}
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm and (row["batch"], row["seed"]) in base]
        found = differences(own, [base[row["batch"], row["seed"]] for row in own]) if own else {}
        cells = [f"`{arm}`", str(len(own))]
        for name in SHOWN:
            mean = f"{sum(row[name] for row in own) / max(1, len(own)):.3f}".removeprefix("0")
            pair = found.get(f"{name}_difference")
            cells.append(mean if arm == control or pair is None else f"{mean}, {in_points(pair)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def along(rows: Rows, control: str, spent: list[float]) -> str:
    """Markdown: the paired difference to the control at points of the budget, between evaluations linear."""
    base = {(row["batch"], row["seed"]): row for row in rows if row["arm"] == control}
    lines = [f"| arm | pairs | {' | '.join(f'{x:,.0f}' for x in spent)} |", "|---" * (2 + len(spent)) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != control):
        own = [row for row in rows if row["arm"] == arm and (row["batch"], row["seed"]) in base]
        cells = []
        for x in spent:
            pairs = [score_at(row, x) - score_at(base[row["batch"], row["seed"]], x) for row in own]
            cells.append(in_points(interval(pairs) | {"p": paired_p(pairs)}) if pairs else "–")
        lines.append(f"| `{arm}` | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def score_at(row: dict[str, Any], spent: float) -> float:
    """EM of a run at so many spent units, between evaluations linear."""
    points = np.array(row["curve"])
    return float(np.interp(spent, points[:, 0], points[:, 1]))


def on_the_way(rows: Rows) -> str:
    """Markdown: what happened while the arms trained, means over runs."""
    head = ("arm", "dead ends", "all-wrong groups, before → after probes", "probes right", "kept", "ESS",
            "searches", "KL to start", "steps", "rollouts", "tokens of any kind",
            "ratio of cue tokens (clipped)", "gradient share base / prefix / cue / suffix")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]

        def mean(name: str, form: str = ".2f", runs: Rows = own) -> str:
            values = [v for r in runs if (v := {**r, **r["diagnostics"]}.get(name)) is not None]
            return f"{sum(values) / len(values):{form}}".removeprefix("0") if values else "–"

        wrong = mean("groups/all_wrong_before"), mean("groups/all_wrong_after")
        cue = mean("ratio/cue")
        cells = [
            f"`{arm}`", mean("dead_ends/rate"),
            wrong[0] if mean("probes/success") == "–" else " → ".join(wrong),
            *map(mean, ("probes/success", "probes/kept_share", "ess", "searches/mean")),
            mean("kl_to_start", ".3f"), mean("steps", ".1f"), mean("rollouts", ",.0f"),
            mean("spent_tokens", ",.0f"), cue if cue == "–" else f"{cue} ({mean('clip/cue', '.0%')})",
            " / ".join(mean(f"gradient/{segment.name.lower()}") for segment in Segment),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="+")
    parser.add_argument("--collect", type=Path, help="a folder that `rexrag compare` wrote")
    parser.add_argument("--batch", default="", help="machine and day of these runs")
    parser.add_argument("--control", default="grpo")
    parser.add_argument("--arms", default="", help="only these beside the control, with commas")
    parser.add_argument("--along", default="", help="points of the budget, with commas")
    args = parser.parse_args()
    if args.collect and len(args.file) > 1:
        parser.error("--collect adds to one file")
    rows = read(args.file)
    if args.collect:
        known = {(row["batch"], row["arm"], row["seed"]) for row in rows}
        rows += [
            row
            for row in collect(args.collect, args.batch)
            if (row["batch"], row["arm"], row["seed"]) not in known
        ]
        args.file[0].parent.mkdir(parents=True, exist_ok=True)
        write_text(args.file[0], "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    for row in rows:
        row["arm"] = NAMES.get(row["arm"], row["arm"])
    if args.arms:
        rows = [row for row in rows if row["arm"] in (args.control, *args.arms.split(","))]
    rows.sort(key=lambda row: row["arm"] != args.control)
    if args.along:
        print(along(rows, args.control, [float(x) for x in args.along.split(",")]))
    else:
        print(table(rows, args.control), on_the_way(rows), sep="\n\n")


if __name__ == "__main__":
    main()
