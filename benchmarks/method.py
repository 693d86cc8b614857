"""Cost of the method's arithmetic: densities and mixture of a full-size step against one log-softmax.

    python benchmarks/method.py [--json OUT.json]

A step of the paper: 512 questions × 5 rollouts plus 205 kept probes, 2,048 response tokens each. Compared
with `log_softmax` + gather over one [8, 2048, 32000] float32 block of logits (there are 346 such blocks in
the same step), and with the same densities worked out token by token in Python, as the official code does.
Ratios are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch

from rexrag.method import CueTrie
from rexrag.method.densities import mixture_densities, probe_log_densities
from rexrag.types import Origin

BASE, PROBES, LENGTH, VOCABULARY, POOL, CUE = 2560, 205, 2048, 32000, 30, 17
ALPHA, Z = PROBES / (BASE + PROBES), 0.6


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = BASE + PROBES
    cut = torch.randint(200, 1200, (PROBES,), generator=g)
    origin = torch.zeros(rows, LENGTH, dtype=torch.int64)
    origin[:, 300:800] = int(Origin.EVIDENCE)
    position = torch.arange(LENGTH)
    in_cue = (position >= cut[:, None]) & (position < cut[:, None] + CUE)
    origin[BASE:] = torch.where(in_cue, int(Origin.CUE), origin[BASE:])
    cues = torch.cat(
        [torch.zeros(POOL, 3, dtype=torch.int64), torch.randint(1, 50, (POOL, CUE - 3), generator=g)], dim=1
    )
    trie = CueTrie(cues.tolist())
    return {
        "policy_logp": -torch.rand(rows, LENGTH, generator=g) * 4,
        "origin": origin,
        "cut": cut,
        "cue_logp": trie.table()[torch.randint(POOL, (PROBES,), generator=g)],
        "logits": torch.randn(8, LENGTH, VOCABULARY, generator=g),
        "tokens": torch.randint(VOCABULARY, (8, LENGTH), generator=g),
    }


def vectorised(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    policy = batch["policy_logp"]
    density = probe_log_densities(
        policy[BASE:].double(),
        batch["origin"][BASE:],
        batch["cut"],
        batch["cue_logp"],
        torch.full((PROBES,), CUE),
        Z,
    )
    return mixture_densities(policy, torch.arange(BASE, BASE + PROBES), density, ALPHA)


def token_by_token(batch: dict[str, torch.Tensor], rows: range) -> list[list[float]]:
    """The same numbers in plain Python, for some rows of the batch."""
    out = []
    low, high = math.log(1 - ALPHA), math.log(ALPHA)
    for i in rows:
        logp, origin = batch["policy_logp"][i].tolist(), batch["origin"][i].tolist()
        row = []
        cut = int(batch["cut"][i - BASE]) if i >= BASE else -1
        count = sum(origin[t] == 0 for t in range(max(cut, 0)))
        for t in range(LENGTH):
            if i < BASE:
                row.append(low + logp[t])
                continue
            eps = logp[t]
            if t < cut and origin[t] == 0:
                eps -= math.log(Z) / count
            elif cut <= t < cut + CUE:
                eps = float(batch["cue_logp"][i - BASE, t - cut])
            top = max(low + logp[t], high + eps)
            row.append(top + math.log(math.exp(low + logp[t] - top) + math.exp(high + eps - top)))
        out.append(row)
    return out


def log_softmax_gather(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.log_softmax(batch["logits"], -1).gather(-1, batch["tokens"][..., None])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    batch = make_batch()
    few = (range(8), range(BASE, BASE + 8))
    fast = vectorised(batch).double()
    difference = max(
        float((torch.tensor(token_by_token(batch, r)).double() - fast[r]).abs().max()) for r in few
    )
    rounds = []
    for _ in range(args.rounds):
        rounds.append((seconds(lambda: vectorised(batch)), seconds(lambda: log_softmax_gather(batch))))
    # Base rollouts and probes cost differently token by token: each is scaled to its number in the step.
    base, probe = (seconds(lambda r=r: token_by_token(batch, r)) / len(r) for r in few)
    python = base * BASE + probe * PROBES
    figures = {
        "rollouts": BASE + PROBES,
        "tokens_each": LENGTH,
        "threads": torch.get_num_threads(),
        "vectorised_s": statistics.median(a for a, _ in rounds),
        "log_softmax_gather_s": statistics.median(b for _, b in rounds),
        "ratio": statistics.median(a / b for a, b in rounds),
        "python_s_estimated": python,
        "python_over_vectorised": python / statistics.median(a for a, _ in rounds),
        "largest_difference": difference,
    }
    print(f"{BASE} base rollouts + {PROBES} probes of {LENGTH} tokens, {torch.get_num_threads()} threads")
    print(f"densities + mixture                    {figures['vectorised_s'] * 1e3:9.1f} ms")
    print(f"log_softmax + gather [8, 2048, 32000]  {figures['log_softmax_gather_s'] * 1e3:9.1f} ms")
    print(f"ratio                                  {figures['ratio'] * 100:9.2f} %")
    print(f"token by token in Python (estimated)   {python * 1e3:9.0f} ms")
    print(f"  times slower                         {figures['python_over_vectorised']:9.0f}")
    print(f"largest difference between the two     {difference:9.1e}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
