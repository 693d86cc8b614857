"""A dead-end judge of your own: it takes answers with a low probability for wrong, without the gold answer.

    python examples/dead_end_judge.py
    rexrag train --set algorithm.dead_ends=judge \
        --set algorithm.dead_end_judge=examples.dead_end_judge:unsure
"""

import math
from collections.abc import Sequence

import rexrag


def unsure(rollouts: Sequence[rexrag.BlindRollout], context: rexrag.JudgeContext) -> list[float]:
    """P(dead end): one minus the geometric mean of the answer tokens' probabilities."""
    chances = []
    for rollout in rollouts:
        last = rollout.turns[-1] if rollout.turns else None
        start = last.action_start if last is not None and last.action == "answer" else None
        logps = rollout.logps[start:] if start is not None else ()
        chances.append(1.0 - math.exp(sum(logps) / len(logps)) if logps else 1.0)
    return chances


if __name__ == "__main__":
    from sizes import SMALL

    run = rexrag.train(
        "quickstart",
        algorithm="rex-rag",
        overrides=[*SMALL, "name=example-dead-ends", "algorithm.probe_probability=1.0"],
        dead_end_judge=unsure,
    )
    print([row["probes/drawn"] for row in run.metrics()])
