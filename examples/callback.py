"""A callback: a function that is called at every event of a run. Here it prints the reward of each step.

python examples/callback.py
rexrag train --set 'train.callbacks=["examples.callback:print_reward"]'
"""

from collections.abc import Mapping
from typing import Any

import rexrag


def print_reward(event: str, facts: Mapping[str, Any]) -> None:
    """Print the mean reward of every step; events are start, evaluate, step and end."""
    if event == "step":
        print(f"step {facts['step']}: reward {facts['reward/mean']:.2f}")


if __name__ == "__main__":
    from sizes import SMALL

    rexrag.train("quickstart", overrides=[*SMALL, "name=example-callback"], callbacks=[print_reward])
