"""From a ratio to a count."""

from __future__ import annotations

import pytest

from gen_turbo.tokens.ratios import max_ratio, num_removed, ratio_at_step, ratio_of_layer


def test_max_ratio_leaves_one_token_per_cell() -> None:
    """Catches a bound of 1 / cell."""
    assert max_ratio((2, 2)) == 0.75 and max_ratio((4,)) == 0.75 and max_ratio((1, 1)) == 0


def test_count_is_rounded_down() -> None:
    """Catches rounding to nearest, which removes one token too many, and a last token that leaves."""
    assert num_removed(4096, 0.4) == 1638 and num_removed(9, 0.75) == 6 and num_removed(9, 0) == 0
    assert num_removed(9, 0, (2, 2)) == 0 and num_removed(8, 0.75, (2, 2)) == 6
    assert num_removed(5, 1) == num_removed(5, 1 - 1e-16) == 4 and num_removed(0, 0.5) == num_removed(1, 0.99) == 0


def test_a_product_that_floats_put_below_a_whole_number_is_that_number() -> None:
    """Catches 28 of 100 tokens at a ratio of 0.29, which as a float is 28.999999999999996."""
    assert num_removed(100, 0.29) == 29 and num_removed(100, 1 - 0.9) == 10 and num_removed(1000, 0.57) == 570
    assert num_removed(100, 0.2899) == 28 and num_removed(10**6, 0.28999999) == 289999


@pytest.mark.parametrize("ratio", [0.76, -0.1, float("nan")])
def test_a_ratio_out_of_reach_raises_and_is_not_capped(ratio: float) -> None:
    """Catches min(ratio, bound)."""
    message = (
        r"is not in \[0, 0.75\]: with stride \(2, 2\) one token in 4 stays; lower `ratio` or use a larger `stride`"
    )
    with pytest.raises(ValueError, match=message):
        num_removed(64, ratio, (2, 2))


@pytest.mark.parametrize("ratio", [1.01, -0.1, float("nan")])
def test_without_cells_a_ratio_is_at_most_one(ratio: float) -> None:
    """Catches the bound of cells where there are none, and no bound at all."""
    assert num_removed(64, 0.9) == 57
    with pytest.raises(ValueError, match=r"is not in \[0, 1\]; give the fraction of tokens to remove"):
        num_removed(64, ratio)


def test_the_last_pattern_that_fits_names_a_layers_ratio() -> None:
    """Catches the first match, and a substring taken for a pattern."""
    ratios = {"up.*": 0.5, "up.1.*": 0.2, "down": 0.4}
    assert [ratio_of_layer(name, 0.3, ratios) for name in ("up.0.a", "up.1.a", "down.0.a")] == [0.5, 0.2, 0.3]


def test_a_factor_holds_from_its_step_on() -> None:
    """Catches a factor for its own step alone, and steps taken in the order they were written in."""
    scale = {10: 1.0, 2: 0.5}
    assert [ratio_at_step(0.4, step, scale) for step in (0, 1, 2, 9, 10, 99)] == [0.4, 0.4, 0.2, 0.2, 0.4, 0.4]
