"""Context distillation on verl: a probe's row without its cue takes its place in verl's queue.

Only the token fields change. verl then scores, balances and trains the shorter row as any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rexrag.method.rows import Row
from rexrag.types import Origin


def token_fields(rows: Sequence[Row], old: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """verl's token fields of rows. old: `rm_scores` and, where there are, `rollout_log_probs` as sampled.

    The reward stays on the last token. `rollout_log_probs` keep the sampler's values of the tokens that stay.
    """
    fields: dict[str, list[Tensor]] = defaultdict(list)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.tokens, dtype=torch.int64)
        whole = torch.cat([torch.tensor(row.prompt, dtype=torch.int64), tokens])
        mask = (torch.tensor(row.origins) == int(Origin.POLICY)).long()
        reward = torch.zeros(len(tokens))
        reward[-1] = old["rm_scores"][i].sum()
        fields["responses"].append(tokens)
        fields["input_ids"].append(whole)
        fields["position_ids"].append(torch.arange(len(whole)))
        fields["response_mask"].append(mask)
        fields["loss_mask"].append(mask.clone())
        fields["rm_scores"].append(reward)
        if "rollout_log_probs" in old:
            sampled = old["rollout_log_probs"][i]
            tail = len(sampled) - (len(tokens) - row.cut)
            fields["rollout_log_probs"].append(torch.cat([sampled[: row.cut], sampled[tail:]]))
    return dict(fields)


def tag_of(tag: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """The queue's tag of a spliced row."""
    return {
        **tag,
        "response_len": len(row.tokens),
        "seq_len": len(row.prompt) + len(row.tokens),
    }
