"""Matching of what is no number, and of grids in which nothing can leave."""

from __future__ import annotations

import math

import pytest
import torch

from gen_turbo.tokens.match import bipartite_soft_matching, tile_soft_matching
from gen_turbo.tokens.partition import grid_destinations
from tests.tokens.test_matching import destinations_of, values


def test_broken_numbers_still_give_a_valid_plan() -> None:
    """Catches a threshold compared with NaN, which leaves fewer tokens than the plan has room for."""
    metric = values(1, 64, 4)
    metric[0, 9:20] = math.nan
    metric[0, 30] = math.inf
    metric[0, 31] = 0
    plan = tile_soft_matching(metric, (8, 8), 40, tile=4)
    assert torch.equal(plan.slot_BN.gather(1, plan.anchor_BM)[0], torch.arange(24))
    assert plan.sizes().sum() == 64


def test_a_broken_token_of_a_tile_without_destinations_stays() -> None:
    """Catches NaN that turns "no destination" into a score, and leaves to token 0, which need not stay."""
    metric = values(1, 9, 4)
    metric[0, 8] = math.nan
    # One destination is drawn, token 7; the tile of token 8 has none.
    assert grid_destinations((3, 3), (3, 3), 6).tolist() == [7]
    penalty = torch.zeros(1, 9).index_fill(1, torch.tensor([6]), 9.0)
    plan = tile_soft_matching(metric, (3, 3), 1, tile=2, stride=(3, 3), variant=6, penalty_BN=penalty)
    assert destinations_of(plan)[0] == [0, 1, 2, 3, 4, 5, 7, 7, 8]


def test_a_broken_destination_spoils_nobody_else() -> None:
    """Catches a NaN in one similarity that decides the highest of them all."""
    metric = values(1, 64, 4)
    metric[0, 5::2] = metric[0, 4::2]
    metric[0, 0] = math.nan
    plan = bipartite_soft_matching(metric, torch.arange(0, 64, 2), 30)
    assert destinations_of(plan)[0][5::2] == list(range(4, 64, 2))


def test_a_penalty_that_is_no_number_counts_as_the_least_alike() -> None:
    """Catches what is no number kept for ever, leaving first, or weighed as another than a cosine of -2."""
    metric = torch.ones(1, 4, 2)
    for penalty, leaves in [(2.5, 1), (3.5, 3), (math.inf, 3), (-math.inf, 1)]:
        weights = torch.tensor([[0.0, penalty, 0.0, math.nan]])
        assert leaves not in bipartite_soft_matching(metric, torch.tensor([0, 2]), 1, weights).anchor_BM[0].tolist()


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_less_alike_than_what_points_away(odd) -> None:
    """Catches an infinite token that is nearer than any, as source or as destination."""
    metric = torch.tensor([[[1.0, 0.0], [-1.0, 0.1], [odd, 0.0], [odd, 1.0]]])
    first = bipartite_soft_matching(metric, torch.tensor([0, 2]), 1)
    assert first.anchor_BM.gather(1, first.slot_BN)[0].tolist() == [0, 0, 2, 3]
    both = bipartite_soft_matching(metric, torch.tensor([0, 2]), 2)
    assert both.anchor_BM.gather(1, both.slot_BN)[0].tolist()[:3] == [0, 0, 2]


def test_where_nobody_receives_nobody_leaves() -> None:
    """Catches a source that is promised to leave although no token is a destination."""
    metric, nobody = torch.ones(1, 4, 2), torch.zeros(0, dtype=torch.int64)
    assert bipartite_soft_matching(metric, nobody, 0).is_identity
    with pytest.raises(ValueError, match="cannot remove 1 of 4 tokens: 0 are sources"):
        bipartite_soft_matching(metric, nobody, 1)
