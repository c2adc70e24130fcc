"""Matching against the slow loop, by index."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from gen_turbo.tokens.match import bipartite_soft_matching, line_soft_matching, tile_soft_matching
from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.token_map import TokenMap


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers of a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def destinations_of(plan: TokenMap) -> list[list[int]]:
    """The token whose place each token takes."""
    return plan.anchor_BM.gather(1, plan.slot_BN).tolist()


def test_one_tile_over_everything_is_global_matching() -> None:
    """Catches tiles that compare something else than the global matching compares."""
    metric = values(2, 48, 6)
    whole = bipartite_soft_matching(metric, grid_destinations((6, 8)), 20)
    tiled = tile_soft_matching(metric, (6, 8), 20, tile=8)
    assert torch.equal(whole.slot_BN, tiled.slot_BN)


@pytest.mark.parametrize("shift", [False, True])
def test_ties_leave_in_token_order_to_the_first_destination(shift: bool) -> None:
    """Catches an unstable top-k: every similarity here is exactly 1."""
    metric = torch.tensor([3.0, 0.0, 4.0]).expand(1, 64, 3)
    plan = tile_soft_matching(metric, (8, 8), 11, tile=4, shift=shift)
    offset = 2 if shift else 0
    candidates = oracles.tile_candidates((8, 8), (4, 4), (offset, offset), grid_destinations((8, 8)).tolist())
    assert destinations_of(plan)[0] == oracles.match(metric[0].tolist(), candidates, 11, [0.0] * 64)


def test_a_plan_is_the_same_in_every_process() -> None:
    """Catches anything drawn from the global generator or from a salted hash: the answer is written down here."""
    metric = torch.stack([torch.arange(35) * 7 % 11, torch.arange(35) * 5 % 13], 1)[None].float()
    before = torch.random.get_rng_state()
    plan = tile_soft_matching(metric, (5, 7), 20, tile=4, shift=True, variant=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert destinations_of(plan)[0] == [
        # fmt: off
        0,
        8,
        2,
        3,
        2,
        2,
        6,
        8,
        8,
        2,
        2,
        11,
        2,
        6,
        28,
        15,
        24,
        24,
        19,
        19,
        20,
        28,
        15,
        24,
        24,
        24,
        26,
        20,
        28,
        28,
        30,
        24,
        32,
        30,
        34,
        # fmt: on
    ]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Catches a budget or a destination shared between the rows of a batch."""
    metric = values(3, 64, 8)
    together = tile_soft_matching(metric, (8, 8), 30, tile=4).slot_BN
    for b in range(3):
        assert torch.equal(together[b : b + 1], tile_soft_matching(metric[b : b + 1], (8, 8), 30, tile=4).slot_BN)


def test_equals_tomesd_with_the_same_destinations() -> None:
    """Catches another score, another destination or another mean than the published baseline has."""
    tomesd_merge = pytest.importorskip("tomesd.merge")
    x = values(2, 96, 16)
    merge, unmerge = tomesd_merge.bipartite_soft_matching_random2d(x, 12, 8, 2, 2, 40, no_rand=True)
    plan = bipartite_soft_matching(x, grid_destinations((8, 12)), 40)
    # tomesd orders its slots [sources kept, destinations]; what comes back to the tokens is comparable.
    positions = unmerge(torch.arange(56.0)[None, :, None].repeat(2, 1, 1))[..., 0].long()
    theirs = merge(x)
    assert torch.equal(plan.unmerge(plan.select(unmerge(theirs))), unmerge(theirs))
    assert torch.equal(plan.select(positions).gather(1, plan.slot_BN), positions)
    # The published bar: the two differ only in the order of a sum.
    torch.testing.assert_close(plan.unmerge(plan.merge(x)), unmerge(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [False, True])
def test_planted_duplicates_leave_first(shift: bool) -> None:
    """Catches an ascending sort, and similarity by length instead of direction."""
    metric = values(1, 144, 32)
    copies = [13, 38, 64, 90, 115]
    corners = grid_destinations((12, 12)).tolist()
    for source in copies:
        corner = next(j for j in corners if j // 24 == source // 24 and j % 12 // 2 == source % 12 // 2)
        metric[0, source] = 3 * metric[0, corner]
    plan = tile_soft_matching(metric, (12, 12), len(copies), tile=4, shift=shift)
    assert sorted(set(range(144)) - set(plan.anchor_BM[0].tolist())) == copies


def test_penalised_tokens_never_leave() -> None:
    """Catches a penalty added instead of taken off, and infinite penalties that turn into NaN."""
    metric = torch.ones(2, 64, 4)
    penalty = torch.zeros(1, 64)
    penalty[0, [1, 9, 35]] = math.inf
    penalty[0, [3, 11]] = 5.0
    for shift in (False, True):
        plan = tile_soft_matching(metric, (8, 8), 43, tile=4, shift=shift, penalty_BN=penalty)
        kept = set(plan.anchor_BM[0].tolist())
        assert {1, 3, 9, 11, 35} <= kept


def test_a_penalty_row_for_each_sample_widens_a_shared_metric() -> None:
    """Catches a plan of one row that ignores the second sample's penalty."""
    penalty = torch.zeros(2, 16)
    penalty[1, 1] = 9.0
    plan = tile_soft_matching(torch.ones(1, 16, 2), (4, 4), 1, penalty_BN=penalty)
    assert destinations_of(plan)[0][1] == 0 and destinations_of(plan)[1][1] == 1


@pytest.mark.parametrize("penalty", [math.nan, -math.inf])
def test_no_penalty_makes_a_destination_leave(penalty: float) -> None:
    """Catches minus infinity minus a broken penalty, which is a number again and would leave to token 0."""
    penalty_BN = torch.full((1, 64), 9.0).index_fill(1, grid_destinations((8, 8)), penalty)
    plan = tile_soft_matching(values(1, 64, 4), (8, 8), 48, tile=4, penalty_BN=penalty_BN)
    assert torch.equal(plan.anchor_BM[0], grid_destinations((8, 8)))


def test_half_metric_is_compared_in_float32() -> None:
    """Catches norms in half precision: these are beyond 65504, so every cosine would be 0."""
    metric = values(1, 64, 256).mul(6000).half()
    plan = tile_soft_matching(metric, (8, 8), 30, tile=4)
    assert torch.equal(plan.slot_BN, tile_soft_matching(metric.float(), (8, 8), 30, tile=4).slot_BN)


def test_matching_leaves_the_graph_alone() -> None:
    """Catches a plan that keeps the activations of the step alive."""
    metric = values(1, 16, 4).requires_grad_()
    with torch.inference_mode():
        tile_soft_matching(metric.detach(), (4, 4), 5)
    plan = tile_soft_matching(metric, (4, 4), 5)
    plan.merge(metric).sum().backward()
    assert metric.grad is not None and torch.equal(metric.grad[0, :, 0], 1 / plan.unmerge(plan.sizes())[0].float())


def test_too_many_removed_raises_with_the_numbers_and_the_fix() -> None:
    """Catches a silent cap at the number of sources."""
    metric = values(1, 16, 4)
    message = "cannot remove 13 of 16 tokens: 12 are sources that can leave; lower `ratio` or use a larger `stride`"
    with pytest.raises(ValueError, match=message):
        bipartite_soft_matching(metric, grid_destinations((4, 4)), 13)
    with pytest.raises(ValueError, match=message):
        tile_soft_matching(metric, (4, 4), 13)
    with pytest.raises(ValueError, match="0 are sources"):
        tile_soft_matching(metric, (4, 4), 1, tile=1)
    with pytest.raises(RuntimeError, match="cannot remove 12 tokens: fewer sources have a finite penalty"):
        tile_soft_matching(metric, (4, 4), 12, penalty_BN=torch.zeros(1, 16).index_fill(1, torch.tensor([1]), math.inf))


def test_wrong_grids_and_tiles_raise() -> None:
    """Catches a grid guessed from the square root, and a penalty of another size that broadcasts."""
    metric = values(1, 16, 4)
    with pytest.raises(ValueError, match="grid of 4 x 5 does not hold 16 tokens"):
        tile_soft_matching(metric, (4, 5), 3)
    with pytest.raises(ValueError, match="tile must be at least 1"):
        tile_soft_matching(metric, (4, 4), 3, tile=0)
    with pytest.raises(ValueError, match="tile must be at least 1"):
        line_soft_matching(metric, 3, tile=0)
    with pytest.raises(ValueError, match="penalty_BN"):
        tile_soft_matching(metric, (4, 4), 3, penalty_BN=torch.zeros(1, 1))


def smooth_map(side: int, channels: int, seed: int) -> torch.Tensor:
    """An image-like map: coarse noise magnified bilinearly, with a little fine noise on top."""
    coarse = values(1, channels, side // 4, side // 4, seed=seed)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth + 0.05 * values(1, channels, side, side, seed=seed + 1)).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("shift", [False, True])
def test_tile_matching_reconstructs_smooth_maps_better_than_chance(shift: bool) -> None:
    """Catches a matching that picks pairs no better than a random choice in the same cells or in the whole map."""
    x = smooth_map(32, 16, seed=3)
    count = 512

    def error(plan: TokenMap) -> float:
        return float((plan.unmerge(plan.merge(x)) - x).norm() / x.norm())

    chance = tile_soft_matching(values(*x.shape, seed=9), (32, 32), count, tile=2)
    matched = tile_soft_matching(x, (32, 32), count, shift=shift)
    assert error(matched) < 0.8 * error(chance)


@pytest.mark.parametrize("grid", [(8, 16), (16, 8), (6, 20), (16, 24)])
def test_tiles_shift_along_each_side_of_its_own(grid):
    """Catches a side that fits into one tile and is cut because the other one is longer."""
    metric = torch.randn(1, math.prod(grid), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    offset = tuple(4 if length > 8 else 0 for length in grid)
    candidates = oracles.tile_candidates(grid, (8, 8), offset, grid_destinations(grid).tolist())
    plan = tile_soft_matching(metric, grid, 40, shift=True)
    expected = oracles.match(metric[0].tolist(), candidates, 40, [0.0] * math.prod(grid))
    assert plan.anchor_BM.gather(1, plan.slot_BN)[0].tolist() == expected


def test_defaults_are_cells_of_four_in_tiles_of_64() -> None:
    """Catches other tiles or cells where a caller names none."""
    metric = torch.randn(1, 320, 4, generator=torch.Generator().manual_seed(6))
    cases = [
        (line_soft_matching(metric, 99), line_soft_matching(metric, 99, 4, 64, None)),
        (
            tile_soft_matching(metric, (16, 20), 99),
            tile_soft_matching(metric, (16, 20), 99, 8, (2, 2), False, None, "corner"),
        ),
    ]
    for plain, told in cases:
        assert torch.equal(plain.slot_BN, told.slot_BN)


def test_tiles_of_one_token_hold_nothing_to_merge() -> None:
    """Catches a smallest tile that is refused, or that merges over its edge."""
    metric = torch.randn(1, 16, 4)
    assert line_soft_matching(metric, 0, tile=1).is_identity
    assert tile_soft_matching(metric, (4, 4), 0, tile=1).is_identity
    for plan in (lambda: line_soft_matching(metric, 1, tile=1), lambda: tile_soft_matching(metric, (4, 4), 1, tile=1)):
        with pytest.raises(ValueError, match="cannot remove 1 of 16 tokens: 0 are sources"):
            plan()
