"""Grouping against the slow loop, inside windows, at any size."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gen_turbo.tokens.group import group_tokens
from gen_turbo.tokens.select import pool_cells
from gen_turbo.tokens.token_map import TokenMap


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers of a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(side: int = 16) -> torch.Tensor:
    """A smooth field, (1, side * side, 8), with noise."""
    y, x = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 3, side), indexing="ij")
    field = torch.stack([torch.sin(x * k + y) for k in range(1, 9)], -1).flatten(0, 1)[None]
    return field + 0.1 * values(*field.shape)


def error(plan: TokenMap, x: torch.Tensor) -> float:
    """Distance of tokens to the mean of their slot, by the size of the tokens."""
    return ((plan.unmerge(plan.merge(x)) - x).norm() / x.norm()).item()


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (1, 40), (40, 1), (3, 70), (16, 12)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9, 0.99])
def test_the_number_of_groups_is_exact_and_anchors_are_members(grid, ratio):
    """Catches groups that lose their members, also on tokens that are all equal, all zero or not numbers."""
    num_tokens = math.prod(grid)
    num_groups = num_tokens - int(num_tokens * ratio)
    x = values(5, num_tokens, 4)
    x[1], x[2], x[3, :3] = 1.0, 0.0, torch.nan
    x[4] = x[4].sign()
    plan = group_tokens(x, grid, num_groups, 3, 2, num_groups // 4)
    assert plan.slot_BN.shape == (5, num_tokens) and plan.anchor_BM.shape == (5, num_groups)
    assert torch.equal(plan.slot_BN.gather(1, plan.anchor_BM), torch.arange(num_groups).expand(5, -1))
    assert (plan.anchor_BM.diff(dim=1) > 0).all() and plan.sizes().min() >= 1


def test_no_group_reaches_beyond_the_window():
    """Catches equal tokens at opposite corners in one group, refined ones included."""
    x = values(1, 6, 8)[:, torch.arange(256) * 7 % 6]
    cells = pool_cells((16, 16), 64)
    plan = group_tokens(x, (16, 16), 64, window=3, num_refinements=3)
    allowed = [set(near) for near in oracles.windows((16, 16), cells.slot_BN[0].tolist(), 3)]
    for slot in range(64):
        members = (plan.slot_BN[0] == slot).nonzero()[:, 0].tolist()
        assert set.intersection(*(allowed[token] for token in members))


def test_refinement_brings_members_closer_together():
    """Catches a refinement that recomputes centres and then does not use them, or uses them wrongly."""
    noisy = smooth() + 0.5 * values(1, 256, 8, seed=3)
    errors = [error(group_tokens(noisy, (16, 16), 64, 5, count), noisy) for count in (0, 1, 4)]
    assert errors[2] < errors[1] < errors[0]


def test_free_groups_spare_the_odd_tokens():
    """Catches free groups that are given to tokens at random, or to those that are most like their group."""
    x = smooth()
    odd = torch.tensor([5, 77, 130, 254])
    x[:, odd] *= -3
    plan = group_tokens(x, (16, 16), 64, num_free=8)
    assert plan.sizes().gather(1, plan.slot_BN[:, odd]).tolist() == [[1, 1, 1, 1]]


def test_rows_of_a_batch_are_grouped_by_their_own_image():
    """Catches one plan for the whole batch, and rows that leak into each other."""
    x = values(3, 60, 8)
    together = group_tokens(x, (6, 10), 20, num_free=3)
    alone = [group_tokens(row[None], (6, 10), 20, num_free=3) for row in x]
    assert torch.equal(together.slot_BN, torch.cat([plan.slot_BN for plan in alone]))
    assert not torch.equal(together.slot_BN[0], together.slot_BN[1])


def test_half_types_are_grouped_in_float32():
    """Catches similarities in bfloat16, where most candidates tie."""
    x = values(1, 64, 8).bfloat16()
    assert torch.equal(group_tokens(x, (8, 8), 20).slot_BN, group_tokens(x.float(), (8, 8), 20).slot_BN)


class Largest(TorchDispatchMode):
    """Keeps the largest number of elements of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


def test_no_buffer_grows_faster_than_the_tokens():
    """Catches a similarity of all tokens with all groups, which is 67 million numbers at 128 x 128 tokens."""
    largest = {}
    for side in (32, 64):
        with Largest() as mode:
            group_tokens(values(1, side * side, 32), (side, side), side * side // 4, window=5)
        largest[side] = mode.num_elements / side**2
    assert largest[64] <= 1.1 * largest[32] <= 1.1 * 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"grid": (8, 9)}, "a grid of 8 x 9 does not hold 64 tokens"),
        ({"num_groups": 0}, "cannot make 0 groups"),
        ({"num_groups": 65}, "cannot make 65 groups"),
        ({"num_free": 16}, "16 of them free"),
        ({"num_free": -1}, "-1 of them free"),
        ({"window": 2}, "window must be odd"),
        ({"num_refinements": -1}, "refinements not negative"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    """Catches numbers that are clipped in silence."""
    with pytest.raises(ValueError, match=words):
        group_tokens(values(1, 64, 8), **({"grid": (8, 8), "num_groups": 16} | arguments))


def test_a_centre_whose_members_cancel_stays():
    """Catches a mean of no length taken for a direction, to which no member is more alike than another."""
    metric = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    assert group_tokens(metric, (1, 4), 1).anchor_BM.tolist() == [[1]]


def test_defaults_are_a_window_of_three_and_one_refinement():
    """Catches another window, more refinements or free groups where a caller names none."""
    metric = values(2, 96, 4)
    plain, told = group_tokens(metric, (8, 12), 30), group_tokens(metric, (8, 12), 30, 3, 1, 0)
    assert torch.equal(plain.slot_BN, told.slot_BN) and torch.equal(plain.anchor_BM, told.anchor_BM)


def test_a_token_that_is_no_number_is_alone_first():
    """Catches NaN that is nearer to a centre than a token that points the other way."""
    metric = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [math.nan, 0.0]]])
    assert group_tokens(metric, (1, 4), 2, num_refinements=0, num_free=1).anchor_BM.tolist() == [[1, 3]]
