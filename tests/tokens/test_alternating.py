"""Every other token receives: the matching in few operators against the one for any destinations."""

from __future__ import annotations

import pytest
import torch

from gen_turbo.tokens.alternating import alternating_soft_matching
from gen_turbo.tokens.match import bipartite_soft_matching


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_weighed", [False, True])
def test_it_is_the_matching_with_even_tokens_as_destinations(num_tokens, dtype, is_weighed):
    """Catches odd tokens that receive, places that are counted from one, penalties of others, and half precision."""
    generator = torch.Generator().manual_seed(num_tokens)
    metric = torch.randn(2, num_tokens, 5, generator=generator).to(dtype)
    penalty = torch.rand(1, num_tokens, generator=generator) if is_weighed else None
    for num_removed in range(num_tokens // 2 + 1):
        plan = alternating_soft_matching(metric, num_removed, penalty)
        expected = bipartite_soft_matching(metric, torch.arange(0, num_tokens, 2), num_removed, penalty)
        assert plan.num_slots == num_tokens - num_removed
        assert torch.equal(plan.slot_BN, expected.slot_BN) and torch.equal(plan.anchor_BM, expected.anchor_BM)
        assert plan.is_identity == (num_removed == 0)


@pytest.mark.parametrize("num_leading", [1, 3])
def test_leading_tokens_neither_leave_nor_receive(num_leading):
    """Catches a split that begins with the class token, slots that it shares, and penalties of other tokens."""
    generator = torch.Generator().manual_seed(0)
    metric, penalty = torch.randn(2, 9 + num_leading, 5, generator=generator), torch.rand(2, 9, generator=generator)
    plan = alternating_soft_matching(metric, 3, penalty, num_leading)
    behind = alternating_soft_matching(metric[:, num_leading:], 3, penalty).between(num_leading, 0)
    assert torch.equal(plan.slot_BN, behind.slot_BN) and torch.equal(plan.anchor_BM, behind.anchor_BM)


@pytest.mark.parametrize("num_removed", [-1, 4])
def test_more_than_the_odd_tokens_cannot_leave(num_removed):
    """Catches a plan with fewer tokens removed than asked for."""
    with pytest.raises(ValueError, match=f"cannot remove {num_removed} of 7 tokens: 3 are sources"):
        alternating_soft_matching(torch.randn(1, 7, 2), num_removed)


def test_doubles_are_compared_in_double():
    """Catches tokens of float64 compared in float32, in which near ones are equal, and halves compared in halves."""
    metric = torch.tensor([[[1.0, 1e-6], [1.0, 0.0], [1.0, 1e-9], [0.0, 1.0]]], dtype=torch.float64)
    plan = alternating_soft_matching(metric, 1)
    assert plan.anchor_BM.gather(1, plan.slot_BN)[0].tolist() == [0, 2, 2, 3]
    half = torch.tensor([[[1.0, 0.02], [1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]], dtype=torch.bfloat16)
    plan = alternating_soft_matching(half, 1)
    assert plan.anchor_BM.gather(1, plan.slot_BN)[0].tolist() == [0, 2, 2, 3]
