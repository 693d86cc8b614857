"""Context distillation on verl: it trains on the local engine's rows without cues, scored by the actor."""

from __future__ import annotations

import io
import json

import pytest
import torch
import zstandard
from safetensors.torch import load_file

from rexrag.config.files import load_config
from rexrag.engine.loading import load_policy
from rexrag.method.advantages import group_advantages
from rexrag.method.corrections.context_distillation import splice
from rexrag.types import Origin, Probe, Question, Rollout, StopReason, Turn
from rexrag.verl.export import export
from rexrag.verl.splicing import tag_of, token_fields
from tests.verl.conftest import needs_verl

P, C, E = int(Origin.POLICY), int(Origin.CUE), int(Origin.EVIDENCE)


def rollout(tokens, origins, turns):
    logps = tuple(-0.1 * i for i in range(len(tokens)))
    question = Question("q", "Who?", ("x",))
    return Rollout(
        question,
        (1, 2),
        tuple(tokens),
        tuple(origins),
        logps,
        tuple(turns),
        StopReason.ANSWER,
        "y",
        0.0,
    )


PARENT = rollout([10, 11, 12, 13, 14], [P] * 5, [Turn(0, 5, "answer", "y", action_start=4, thought_end=3)])
PROBED = rollout([10, 11, 12, 13, 20, 21, 30, 31, 32], [P] * 4 + [C, C, P, E, P], [Turn(0, 9)])
PROBE = Probe(PROBED, PARENT, cut=4, cue=0, cue_length=2)


def test_token_fields_of_a_spliced_row():
    row = splice(PROBE, 0)
    assert row.source is PROBED and row.cut == 3
    reward = torch.zeros(9)
    reward[-1] = 1.0
    old = {"rm_scores": [reward], "rollout_log_probs": [torch.arange(9.0)]}
    fields = {name: column[0].tolist() for name, column in token_fields([row], old).items()}
    assert fields == {
        "responses": [10, 11, 12, 30, 31, 32],
        "input_ids": [1, 2, 10, 11, 12, 30, 31, 32],
        "position_ids": list(range(8)),
        "response_mask": [1, 1, 1, 1, 0, 1],
        "loss_mask": [1, 1, 1, 1, 0, 1],
        "rm_scores": [0.0] * 5 + [1.0],
        "rollout_log_probs": [0.0, 1.0, 2.0, 6.0, 7.0, 8.0],
    }
    assert tag_of({"status": "success", "seq_len": 11}, row) == {
        "status": "success", "response_len": 6, "seq_len": 8,
    }  # fmt: skip


@pytest.mark.verl
@needs_verl
@pytest.mark.filterwarnings("ignore")
def test_a_step_on_verl_trains_spliced_rows(run, resumed, tmp_path):
    step = json.loads((resumed / "metrics.jsonl").read_text().splitlines()[2])
    kept = int(step["probes/kept"])
    assert kept > 0 and step["alpha"] == pytest.approx(kept / step["rows"])
    with zstandard.open(io.BytesIO((resumed / "rollouts.jsonl.zst").read_bytes()), "rt") as file:
        traces = [trace for trace in map(json.loads, file) if trace["step"] == 3]
    config = load_config(resumed / "config.toml")
    cues = {t["tokens"][i] for t in traces for i, o in enumerate(t["origins"]) if o == C}
    flat = load_file(resumed / "updates" / "step-3.safetensors")
    rows = [
        {name.split("/")[1]: v for name, v in flat.items() if name.startswith(f"{i}/")}
        for i in {name.split("/")[0] for name in flat}
    ]
    rows = [row for row in rows if row["response_mask"].any()]
    sampled = {tuple(t["tokens"]) for t in traces}
    spliced = [row for row in rows if tuple(row["responses"].tolist()) not in sampled]
    assert len(rows) == step["rows"] and 0 < len(spliced) <= kept and cues

    probes = {
        (tuple(t["tokens"][t["cut"] + t["origins"].count(C) :])) for t in traces if t["kind"] == "probe"
    }
    held = [row for row in rows if (row["rollout_is_weights"] < 0).any()]
    assert len(held) == kept, "the suffix of every kept probe is held"
    assert all(any(row is other for other in held) for row in spliced)
    for row in held:  # from its first token on, the suffix is a probe's own continuation
        first = int((row["rollout_is_weights"] < 0).nonzero()[0, 0])
        assert (row["rollout_is_weights"][first:] < 0).all()
        assert tuple(row["responses"][first:].tolist()) in probes
    export(run, tmp_path / "model")  # the weights that the third step began with
    policy = load_policy(config.policy.model_copy(update={"path": str(tmp_path / "model")}))
    pairs = [(row["prompts"].tolist(), row["responses"].tolist()) for row in spliced]
    for row, logp in zip(spliced, policy.score(pairs, config.agent.temperature), strict=True):
        mask = row["response_mask"].bool()
        assert len(mask) == len(logp) == len(row["advantages"]) == len(row["ref_log_prob"])
        # The prefix was scored in a longer row, the suffix in this one.
        torch.testing.assert_close(row["old_log_probs"][mask], logp[mask], rtol=1e-4, atol=1e-4)
    base = sorted((t for t in traces if t["kind"] == "base"), key=lambda t: t["index"])
    probes = [t for t in traces if t["kind"] == "probe" and t["kept"]]
    groups = {group: i for i, group in enumerate(dict.fromkeys(t["group"] for t in base))}
    everyone = [*base, *probes]
    expected = group_advantages(
        torch.tensor([t["reward"] for t in everyone], dtype=torch.float64),
        torch.tensor([groups[t["group"]] for t in everyone]),
        config.algorithm.advantage_scale,
        config.algorithm.advantage_baseline,
    )
    found = sorted(float(row["advantages"][row["response_mask"].bool()][0]) for row in rows)
    assert found == pytest.approx(sorted(expected.tolist()), abs=1e-5)
