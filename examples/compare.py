"""Compare algorithms at equal generated tokens, in pairs by seed.

python examples/compare.py
"""

import rexrag

if __name__ == "__main__":
    from sizes import SMALL

    comparison = rexrag.compare(
        ["grpo", "rex-rag-distill"],
        seeds=2,
        budget=("generated", 600),
        out="runs/example-compare",
        overrides=[s for s in SMALL if not s.startswith(("train.steps", "train.max"))],
    )
    print(comparison.difference("rex-rag-distill"))
    print(comparison.report())
