"""Who may be a destination."""

from __future__ import annotations

import pytest
import torch

from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.select import keep_diverse, keep_highest, keep_spaced, pool_cells, shrunk_grid


def test_hashed_destinations_are_the_same_everywhere() -> None:
    """Catches a hash that depends on the process or on the global generator: the numbers are fixed here."""
    before = torch.random.get_rng_state()
    assert grid_destinations((5, 7), (2, 3), 3).tolist() == [9, 10, 13, 23, 26, 27, 30, 33, 34]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_hashed_members_are_even_over_cells_and_over_seeds() -> None:
    """Catches a hash whose low bits are regular, which would draw the same member in every cell or every seed."""
    for seed in range(3):
        chosen = grid_destinations((64, 64), (2, 2), seed)
        shares = torch.bincount(chosen // 64 % 2 * 2 + chosen % 2, minlength=4) / len(chosen)
        assert shares.min() > 0.2 and shares.max() < 0.3
    over_seeds = torch.cat([grid_destinations((2, 2), (2, 2), seed) for seed in range(400)]).bincount(minlength=4)
    assert over_seeds.min() > 70 and over_seeds.max() < 130


def test_cells_are_nearly_square() -> None:
    """Catches a number of bands that does not follow the shape of the grid."""
    for grid, num_cells, size in (((8, 8), 16, [2, 2]), ((4, 16), 16, [2, 2]), ((12, 6), 8, [3, 3])):
        first = (pool_cells(grid, num_cells).slot_BN[0] == 0).view(grid)
        assert [int(first.any(1).sum()), int(first.any(0).sum())] == size


def test_no_band_has_more_cells_than_tokens() -> None:
    """Catches 31 cells in one band of 30 columns: as many bands as a nearly square cell wants are too few here."""
    plan = pool_cells((2, 30), 31)
    assert torch.equal(plan.slot_BN.gather(1, plan.anchor_BM)[0], torch.arange(31))


def test_wrong_arguments_raise() -> None:
    """Catches an empty result for a grid of no tokens, and unknown variants taken for the corner."""
    for grid, stride in [((4, 0), (2, 2)), ((0, 4), (2, 2)), ((4, 4), (0, 2)), ((4, 4), (2, 0))]:
        with pytest.raises(ValueError, match="must be positive"):
            grid_destinations(grid, stride)
    with pytest.raises(ValueError, match="unknown variant 'random'"):
        grid_destinations((4, 4), variant="random")


@pytest.mark.parametrize("num_kept", [0, -1, 13])
def test_impossible_numbers_of_kept_tokens_are_named(num_kept: int) -> None:
    """Catches an empty plan, and one of more tokens than there are."""
    for choose in (
        lambda: keep_highest(torch.zeros(1, 12), num_kept),
        lambda: keep_spaced(12, num_kept),
        lambda: keep_diverse(torch.zeros(1, 12, 2), num_kept),
        lambda: pool_cells((3, 4), num_kept),
        lambda: shrunk_grid((3, 4), num_kept),
    ):
        with pytest.raises(ValueError, match=f"cannot keep {num_kept} of 12 tokens"):
            choose()


def test_scores_that_are_no_numbers_are_the_lowest() -> None:
    """Catches NaN kept before numbers, and infinities that change places or are as low or high as others."""
    nan, inf = float("nan"), float("inf")
    score = torch.tensor([[0.0, nan, inf, -inf, 3e38, -3e38, inf, nan]])
    order = [2, 6, 4, 0, 5, 1, 3, 7]
    for num_kept in range(1, 9):
        assert keep_highest(score, num_kept).anchor_BM[0].tolist() == sorted(order[:num_kept])


def test_a_token_that_is_no_number_is_the_most_unlike() -> None:
    """Catches NaN that is nearer to a token than one that points the other way."""
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [float("nan"), 1.0], [1.0, 0.1]]])
    assert [keep_diverse(features, number).anchor_BM[0].tolist() for number in (1, 2)] == [[2], [0, 2]]
