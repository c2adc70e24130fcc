"""Who may be a destination."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_turbo.tokens.partition import grid_destinations, without_protected

SIDE, CELL = st.integers(1, 11), st.integers(1, 4)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.tuples(SIDE, SIDE), st.tuples(CELL, CELL), st.one_of(st.just("corner"), st.integers(-5, 2**40)))
def test_every_cell_has_one_destination(grid: tuple[int, int], stride: tuple[int, int], variant: str | int) -> None:
    """Catches cells lost at odd edges, and a hashed member that lies outside of a partial cell."""
    destinations = grid_destinations(grid, stride, variant).tolist()
    members = oracles.cells(grid, stride)
    assert destinations == sorted(destinations) and len(destinations) == len(members)
    assert all(len(set(cell) & set(destinations)) == 1 for cell in members)
    if variant == "corner":
        assert set(destinations) == {cell[0] for cell in members}


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


def test_protected_tokens_are_no_destinations() -> None:
    """Catches a comparison that lets the last protected token receive."""
    assert without_protected(torch.tensor([0, 2, 4, 6]), 4).tolist() == [4, 6]


def test_wrong_arguments_raise() -> None:
    """Catches an empty result for a grid of no tokens, and unknown variants taken for the corner."""
    with pytest.raises(ValueError, match="must be positive"):
        grid_destinations((4, 0))
    with pytest.raises(ValueError, match="unknown variant 'random'"):
        grid_destinations((4, 4), variant="random")
