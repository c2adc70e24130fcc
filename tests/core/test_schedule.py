"""From a ratio to a count."""

from __future__ import annotations

import pytest

from gen_turbo.core.schedule import max_ratio, num_removed


def test_max_ratio_leaves_one_token_per_cell() -> None:
    """Catches a bound of 1 / cell."""
    assert max_ratio((2, 2)) == 0.75 and max_ratio((4,)) == 0.75 and max_ratio((1, 1)) == 0


def test_count_is_rounded_down() -> None:
    """Catches rounding to nearest, which removes one token too many."""
    assert num_removed(4096, 0.4) == 1638 and num_removed(9, 0.75) == 6 and num_removed(9, 0) == 0


@pytest.mark.parametrize("ratio", [0.76, -0.1, float("nan")])
def test_a_ratio_out_of_reach_raises_and_is_not_capped(ratio: float) -> None:
    """Catches min(ratio, bound)."""
    with pytest.raises(ValueError, match=r"is not in \[0, 0.75\].*lower `ratio` or use a larger `stride`"):
        num_removed(64, ratio)
