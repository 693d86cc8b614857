"""Dr. GRPO (arXiv 2503.20783): every token of a rollout gets r − mean, divided by the number of rollouts."""

import torch

from rexrag.config.algorithms import DrGrpo, Grpo
from rexrag.method import clipped_surrogate, group_advantages

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
LENGTHS = [2, 7, 3, 5, 4]


def gradient(algorithm):
    """d loss / d log π of each token, on policy."""
    mask = torch.arange(7)[None, :] < torch.tensor(LENGTHS)[:, None]
    logp = torch.full((5, 7), -1.0, dtype=torch.float64, requires_grad=True)
    groups = torch.zeros(5, dtype=torch.int64)
    advantages = group_advantages(REWARDS, groups, algorithm.advantage_scale, algorithm.advantage_baseline)
    loss, _ = clipped_surrogate(
        logp, logp.detach(), advantages.double(), mask, aggregation=algorithm.aggregation
    )
    return torch.autograd.grad(loss, logp)[0], mask


def test_no_length_and_no_deviation_scale_the_gradient():
    found, mask = gradient(DrGrpo())
    expected = torch.where(mask, -(REWARDS - REWARDS.mean()).double()[:, None] / 5, 0.0)
    assert torch.allclose(found, expected)


def test_grpo_differs_from_it_by_one_factor_for_each_group_and_the_token_mean():
    ours, _ = gradient(DrGrpo())
    grpo, mask = gradient(Grpo())
    ratio = (grpo / ours)[mask]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio))
    assert not torch.allclose(ratio[0], torch.ones((), dtype=ratio.dtype))
