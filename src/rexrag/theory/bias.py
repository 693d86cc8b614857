"""How biased is each estimator? A table of exact expectations in a world that can be enumerated.

    python -m rexrag.theory.bias

Every line changes one thing of the exact setting of METHOD §4.4, or everything the paper changes. `bias` is
|E[estimate] − ∇J| / |∇J|, `cosine` the angle to the true gradient, `norm` |E[estimate]| / |∇J|.
`docs/paper_map.md` says in words what each line means. N is 6, not the paper's 5: with 5 and one probe a base
ratio is 1/(1 − 1/6) = 1.2, exactly on the edge of the clip range, and rounding would decide its gradient.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from torch import Tensor

from rexrag.theory.exact_world import build_world
from rexrag.theory.expectation import Estimator, expected_gradient, true_gradient

_EXACT = Estimator()
_MIXTURE = replace(_EXACT, correction="mixture")
_DISTILLED = replace(_EXACT, correction="context-distillation")
_SHIPPED = replace(
    _MIXTURE,
    alpha="realised",
    failure_rate="realised",
    filter=True,
    baseline="std",
    clip_low=0.2,
    clip_high=0.2,
)

ESTIMATORS: dict[str, Estimator] = {
    "plain GRPO, no baseline": replace(_EXACT, probes=False),
    "multiple importance sampling, all exact": _EXACT,
    "  P(fail|o') taken as 1": replace(_EXACT, fail_known=False),
    "  base rollouts' own cues ignored": replace(_EXACT, explanations="own"),
    "  z = 1 - accuracy": replace(_EXACT, failure_rate="inaccuracy"),
    "  z of the batch": replace(_EXACT, failure_rate="realised"),
    "  alpha of the batch": replace(_EXACT, alpha="realised"),
    "  alpha of the batch, filter": replace(_EXACT, alpha="realised", filter=True),
    "mixture (fine)": _MIXTURE,
    "mixture (coarse)": replace(_MIXTURE, cue_density="coarse"),
    "mixture (fine), prefix not trained": replace(_MIXTURE, prefix_loss="none"),
    "none (probes uncorrected)": replace(_EXACT, correction="none"),
    "context distillation, clipped": _DISTILLED,
    "context distillation, truncated-is": replace(_DISTILLED, suffix_weight="truncated-is"),
    "plain GRPO, mean baseline": replace(_EXACT, probes=False, baseline="mean"),
    "multiple importance sampling, mean baseline": replace(_EXACT, baseline="mean"),
    "plain GRPO, std baseline": replace(_EXACT, probes=False, baseline="std"),
    "multiple importance sampling, std baseline": replace(_EXACT, baseline="std"),
    "mixture, as a run does it": _SHIPPED,
    "  prefix not trained": replace(_SHIPPED, prefix_loss="none"),
    "none, as a run does it": replace(_SHIPPED, correction="none"),
    "context distillation, as a run does it": replace(_SHIPPED, correction="context-distillation"),
}
"""Name → estimator; "as a run does it" is realised alpha and z, filter, std baseline and clip 0.2."""
INTRODUCTION = """\
Every rollout is enumerated; at horizon 7 that takes two to three minutes of processor time.

bias    |E[estimate] - g| / |g|: how far the expected gradient is from the true one, g; 0 is unbiased
cosine  of the angle between the two; 1 is the same direction
norm    |E[estimate]| / |g|: how long it is
An indented line changes one thing of the last line that is not indented.
"""


def compare(estimate: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative bias, cosine and relative norm of an expected estimate."""
    norm = float(truth.norm())
    size = float(estimate.norm())
    return {
        "bias": float((estimate - truth).norm()) / norm,
        "cosine": float(estimate @ truth) / (size * norm) if size else 0.0,
        "norm": size / norm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rexrag.theory.bias", description=__doc__.split("\n")[0])
    parser.add_argument("--horizon", type=int, default=7, help="most tokens of a rollout (>= 6)")
    parser.add_argument("--rollouts", type=int, default=6, help="N base rollouts of the question")
    parser.add_argument("--probability", type=float, default=0.2, help="p, chance that a dead end is probed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random policy")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    if args.horizon < 6:
        parser.error(f"--horizon {args.horizon}: expected at least 6")
    if not args.json:
        print(INTRODUCTION, flush=True)
    world = build_world(args.horizon, args.seed)
    truth = true_gradient(world)
    rows = {}
    if not args.json:
        print(f"{len(world.probability)} rollouts, {len(world.probes.path)} probes, seed {args.seed}")
        print(f"accuracy {world.accuracy:.3f}, dead ends {world.dead_rate:.3f}", end=", ")
        print(f"N = {args.rollouts}, p = {args.probability}")
        print(f"{'estimator':45}{'bias':>10}{'cosine':>10}{'norm':>8}")
    for name, estimator in ESTIMATORS.items():
        rows[name] = compare(expected_gradient(world, estimator, args.rollouts, args.probability), truth)
        if not args.json:
            print(
                f"{name:45}{rows[name]['bias']:10.1e}{rows[name]['cosine']:10.5f}{rows[name]['norm']:8.3f}",
                flush=True,
            )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
