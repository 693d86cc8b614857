"""A reward of your own: 1 for a right answer, minus a small price for every search.

python examples/reward.py
rexrag train --set agent.reward=examples.reward:reward
"""

import rexrag

PRICE = 0.05


def reward(rollout: rexrag.Rollout) -> float:
    """1 for a correct answer, minus a price for each search."""
    searches = sum(turn.action == "search" for turn in rollout.turns)
    return float(rollout.correct) - PRICE * searches


if __name__ == "__main__":
    from sizes import SMALL

    run = rexrag.train("quickstart", overrides=[*SMALL, "name=example-reward"], reward=reward)
    print([row["reward/mean"] for row in run.metrics()])
