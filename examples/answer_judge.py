"""A judge of answers of your own: an answer is correct if it contains a gold answer as whole words.

python examples/answer_judge.py
rexrag train --set agent.answer_judge=examples.answer_judge:holds_gold
"""

import rexrag


def holds_gold(answer: str, question: rexrag.Question) -> bool:
    """Does the answer contain a gold answer as whole words?"""
    words = f" {' '.join(answer.lower().split())} "
    return any(f" {' '.join(gold.lower().split())} " in words for gold in question.answers)


if __name__ == "__main__":
    from sizes import SMALL

    run = rexrag.train("quickstart", overrides=[*SMALL, "name=example-judge"], judge=holds_gold)
    first = run.evaluations()[0]
    print(f"exact match {first['em']['value']:.3f}, correct {first['correct']['value']:.3f}")
