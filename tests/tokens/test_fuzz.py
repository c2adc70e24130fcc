"""What plans, chooses and resizes, against plain loops; the cases are those of `tests/tokens/cases.py`."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import oracles
import torch
from hypothesis import given
from hypothesis import strategies as st

from gen_turbo.tokens.farthest import farthest_point_plan
from gen_turbo.tokens.group import cell_windows, group_tokens
from gen_turbo.tokens.match import bipartite_soft_matching, line_soft_matching, tile_soft_matching
from gen_turbo.tokens.partition import grid_destinations
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import (
    keep_diverse,
    keep_highest,
    keep_spaced,
    keep_tokens,
    pool_cells,
    shrink_cells,
    shrunk_grid,
)
from tests.tokens.cases import (
    BROKEN,
    CASES,
    DTYPES,
    GRID,
    RANDOM,
    destinations,
    laid_out,
    matched,
    tokens,
)


@CASES
@given(st.integers(1, 30), RANDOM)
def test_matching_over_all_pairs(num_tokens: int, rng: random.Random) -> None:
    """Catches a broken destination that takes all sources, NaN that receives, and ties by anything but place."""
    receivers = rng.sample(range(num_tokens), rng.randint(0, num_tokens))
    sources = {i: receivers for i in range(num_tokens) if i not in receivers}
    matched(
        rng,
        tokens(rng, num_tokens),
        sources,
        lambda x, count, penalty: bipartite_soft_matching(
            x, torch.tensor(receivers, dtype=torch.int64), count, penalty
        ),
    )


@CASES
@given(GRID, st.integers(1, 9), st.tuples(st.integers(1, 4), st.integers(1, 4)), RANDOM)
def test_matching_in_tiles_and_lines(grid, tile, stride, rng) -> None:
    """Catches broken tokens of a tile without destinations that leave to token 0, which need not stay."""
    shift, variant = rng.random() < 0.5, rng.choice(["corner", rng.randrange(10**6)])
    chosen = grid_destinations(grid, stride, variant).tolist()
    offset = tuple(tile // 2 if shift and side > tile else 0 for side in grid)
    given = tokens(rng, math.prod(grid))
    matched(
        rng,
        given,
        oracles.tile_candidates(grid, (tile, tile), offset, chosen),
        lambda x, count, penalty: tile_soft_matching(x, grid, count, tile, stride, shift, penalty, variant),
    )
    line = oracles.tile_candidates((1, math.prod(grid)), (1, tile), (0, 0), list(range(0, math.prod(grid), stride[0])))
    matched(rng, given, line, lambda x, count, penalty: line_soft_matching(x, count, stride[0], tile, penalty))


@CASES
@given(GRID, st.sampled_from([1, 3, 5, 7]), st.integers(0, 3), RANDOM)
def test_grouping(grid, window, num_refinements, rng) -> None:
    """Catches groups that follow the memory's layout or rounding, and broken tokens that spoil a centre."""
    num_tokens = math.prod(grid)
    num_groups = rng.randint(1, num_tokens)
    num_free = rng.randint(0, num_groups - 1)
    # Means of ties are rounded, and so is which of them is nearer.
    given = tokens(rng, num_tokens, is_tied=False if num_refinements else None)
    plan = group_tokens(given.x, grid, num_groups, window, num_refinements, num_free)
    cells = pool_cells(grid, num_groups - num_free)
    allowed = oracles.windows(grid, cells.slot_BN[0].tolist(), window)
    assert [sorted(set(near)) for near in cell_windows(cells, grid, window).tolist()] == allowed
    for row, own in zip(given.rows, destinations(plan), strict=True):
        if num_groups == num_tokens:
            assert own == list(range(num_tokens))
        else:
            seeds = cells.anchor_BM[0].tolist()
            assert own == oracles.group(row, seeds, allowed, num_groups, num_refinements)


@CASES
@given(st.integers(1, 24), RANDOM)
def test_what_differs_is_kept(num_tokens: int, rng: random.Random) -> None:
    """Catches one token kept twice, as NaN was, and choices that follow the memory's layout."""
    num_kept = rng.randint(1, num_tokens)
    tied = tokens(rng, num_tokens, is_tied=True)
    for row, own in zip(tied.rows, destinations(keep_diverse(tied.x, num_kept)), strict=True):
        assert own == oracles.keep_diverse(row, num_kept)
    any_tokens = tokens(rng, num_tokens)
    for row, own in zip(any_tokens.rows, destinations(farthest_point_plan(any_tokens.x, num_kept)), strict=True):
        assert own == oracles.farthest(row, num_kept)
    x = torch.randn(2, num_tokens, 48, generator=torch.Generator().manual_seed(rng.randrange(2**32)))
    for choose in (keep_diverse, farthest_point_plan):
        assert destinations(choose(laid_out(x, rng), num_kept)) == destinations(choose(x, num_kept))


@CASES
@given(st.integers(1, 30), RANDOM)
def test_what_is_named_is_kept(num_tokens: int, rng: random.Random) -> None:
    """Catches NaN as the highest score, ties out of order, and tokens that join a farther one."""
    num_kept = rng.randint(1, num_tokens)
    scores = [rng.choice([0.0, 0.25, 1.0, 4.0, *BROKEN]) for _ in range(num_tokens)]
    worth = [-math.inf if math.isnan(score) else score for score in scores]
    highest = sorted(sorted(range(num_tokens), key=lambda n: (-worth[n], n))[:num_kept])
    spaced = [(2 * k + 1) * num_tokens // (2 * num_kept) for k in range(num_kept)]
    chosen = sorted(rng.sample(range(num_tokens), num_kept))
    for plan, kept in (
        (keep_highest(torch.tensor([scores], dtype=rng.choice(DTYPES)), num_kept), highest),
        (keep_spaced(num_tokens, num_kept), spaced),
        (keep_tokens(torch.tensor([chosen]), num_tokens), chosen),
    ):
        assert destinations(plan) == [[min(kept, key=lambda k, n=n: (abs(k - n), -k)) for n in range(num_tokens)]]


@CASES
@given(GRID, RANDOM)
def test_grids_are_covered_and_made_smaller(grid, rng) -> None:
    """Catches thin grids that keep more than asked, cells that are no rectangles, and a shape that is squeezed."""
    height, width = grid
    num_kept = rng.randint(1, height * width)
    plan = pool_cells(grid, num_kept)
    boxes = oracles.pool_cells(grid, plan.slot_BN[0].tolist())
    assert len(boxes) == num_kept
    middles = [(top + bottom - 1) // 2 * width + (left + right - 1) // 2 for top, bottom, left, right in boxes]
    assert plan.anchor_BM[0].tolist() == middles
    bands = sorted({box[:2] for box in boxes})
    assert [end for _, end in bands[:-1]] == [start for start, _ in bands[1:]]
    for sides in ([end - start for start, end in bands], [sum(box[:2] == band for box in boxes) for band in bands]):
        assert max(sides) - min(sides) <= 1
    for band in bands:
        sides = [right - left for top, bottom, left, right in boxes if (top, bottom) == band]
        assert max(sides) - min(sides) <= 1
    rows, columns = shrunk_grid(grid, num_kept)
    wanted = max([1, *(r for r in range(1, height + 1) if r * r * width <= num_kept * height)])
    assert rows == min(wanted, num_kept) and 1 <= rows * columns <= num_kept and columns <= width
    assert columns == max(1, min(width, num_kept // rows, round(rows * width / height)))
    smaller = shrink_cells(grid, (rows, columns))
    own = [
        (2 * row + 1) * rows // (2 * height) * columns + (2 * column + 1) * columns // (2 * width)
        for row in range(height)
        for column in range(width)
    ]
    assert smaller.slot_BN[0].tolist() == own
    for slot, (top, bottom, left, right) in enumerate(oracles.pool_cells(grid, own)):
        row, column = divmod(int(smaller.anchor_BM[0, slot]), width)
        assert abs(2 * row + 1 - top - bottom) <= 1 and abs(2 * column + 1 - left - right) <= 1


@CASES
@given(GRID, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(-(2**40), 2**40))
def test_cells_have_one_destination(grid, stride, seed) -> None:
    """Catches cells at an edge that draw a token they do not have, and a hash that depends on the platform."""
    cells = oracles.cells(grid, stride)
    corners = [cell[0] for cell in cells]
    assert grid_destinations(grid, stride).tolist() == sorted(corners)
    drawn = [cell[oracles.drawn(cell[0], seed, len(cell))] for cell in cells]
    assert grid_destinations(grid, stride, seed).tolist() == sorted(drawn)


@CASES
@given(st.integers(0, 5000), st.integers(0, 10**6), st.sampled_from([10, 100, 1000, 10**6]))
def test_a_ratio_is_the_number_that_was_written(num_tokens: int, numerator: int, denominator: int) -> None:
    """Catches one token less than the decimal number says, and a last token that leaves."""
    ratio = numerator % denominator / denominator
    written = Fraction(numerator % denominator, denominator)
    assert num_removed(num_tokens, ratio) == math.floor(num_tokens * written)
    left = 1 - ratio
    assert num_removed(num_tokens, left) == min(math.floor(num_tokens * (1 - written)), max(0, num_tokens - 1))
