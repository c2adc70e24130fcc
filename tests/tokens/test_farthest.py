"""Farthest points: what differs stays, what is equal leaves."""

from __future__ import annotations

import pytest
import torch

from gen_turbo.tokens.farthest import farthest_point_plan


def test_it_keeps_what_a_slow_loop_keeps():
    """Catches a distance to the last point kept instead of to the nearest, and rows that share a choice."""
    x = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    plan = farthest_point_plan(x, 7)
    for row in range(3):
        kept = [0]
        while len(kept) < 7:
            distance = [min((x[row, i] - x[row, k]).norm().item() for k in kept) for i in range(20)]
            kept.append(max(range(20), key=distance.__getitem__))
        assert plan.anchor_BM[row].tolist() == sorted(kept)
        for token in range(20):
            nearest = min(kept, key=lambda k: (x[row, token] - x[row, k]).norm().item())
            assert plan.anchor_BM[row, plan.slot_BN[row, token]] == nearest


def test_equal_tokens_leave_first():
    """Catches distinct words that merge while padding stays."""
    x = torch.cat([torch.randn(2, 5, 4), torch.zeros(2, 11, 4)], 1)
    plan = farthest_point_plan(x, 8)
    assert torch.equal(plan.unmerge(plan.merge(x)), x)
    assert plan.sizes().sum(1).tolist() == [16, 16]


@pytest.mark.parametrize("num_slots", [0, 5])
def test_impossible_numbers_are_named(num_slots):
    """Catches an empty plan."""
    with pytest.raises(ValueError, match=f"cannot keep {num_slots} of 4 tokens"):
        farthest_point_plan(torch.zeros(1, 4, 2), num_slots)


def test_between_two_kept_tokens_it_joins_the_one_kept_first():
    """Catches ties that follow the order in which distances are computed last."""
    line = torch.tensor([0.0, 1.0, 2.0])[None, :, None]
    plan = farthest_point_plan(line, 2)
    assert plan.anchor_BM.tolist() == [[0, 2]] and plan.slot_BN.tolist() == [[0, 0, 1]]
