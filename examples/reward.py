"""A reward of your own: right answers, and a small price for every search.

python examples/reward.py
rexrag train --set agent.reward=reward:frugal        (from this folder)
"""

from sizes import SMALL

import rexrag

PRICE = 0.05


def frugal(rollout: rexrag.Rollout) -> float:
    """1 for a correct answer, minus a price for each search."""
    searches = sum(turn.action == "search" for turn in rollout.turns)
    return float(rollout.correct) - PRICE * searches


if __name__ == "__main__":
    run = rexrag.train("quickstart", out="runs/example-reward", overrides=SMALL, reward=frugal)
    print([row["reward/mean"] for row in run.metrics()])
