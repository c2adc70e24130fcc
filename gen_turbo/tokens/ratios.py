"""From a layer and a step to a ratio, and from a ratio to a number of tokens removed."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import prod


def max_ratio(stride: tuple[int, ...]) -> float:
    """Gives the largest fraction of tokens that can leave when each cell of `stride` tokens keeps one destination."""
    return 1 - 1 / prod(stride)


def num_removed(num_tokens: int, ratio: float, stride: tuple[int, ...] | None = None) -> int:
    """Gives the number of tokens that leave, `ratio * num_tokens` rounded down; one token stays at any ratio.

    Args:
        num_tokens: Tokens before the reduction.
        ratio: Fraction to remove.
        stride: Cell that keeps one destination, (height, width) or one length; None where there are no cells.

    Raises:
        ValueError: If the ratio is negative or above `max_ratio(stride)`, without cells above 1; it is never lowered
            in silence.
    """
    if stride is None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio {ratio} is not in [0, 1]; give the fraction of tokens to remove")
    elif not 0 <= ratio <= max_ratio(stride):
        raise ValueError(
            f"ratio {ratio} is not in [0, {max_ratio(stride):g}]: with stride {stride} one token in {prod(stride)} "
            "stays; lower `ratio` or use a larger `stride`"
        )
    # The factor gives back what floats round off: 100 * 0.29 is 28.999999999999996.
    return min(int(num_tokens * ratio * (1 + 1e-12)), max(num_tokens - 1, 0))


def ratio_of_layer(name: str, ratio: float, layer_ratios: Mapping[str, float]) -> float:
    """Gives the ratio of a layer: that of the last pattern (`up_blocks.*`) that its path fits, otherwise `ratio`."""
    fitting = [found for pattern, found in layer_ratios.items() if fnmatchcase(name, pattern)]
    return fitting[-1] if fitting else ratio


def ratio_at_step(ratio: float, step: int, step_scale: Mapping[int, float]) -> float:
    """Gives the ratio at a step: times the factor of the last step in `step_scale` that has begun, 1 before all."""
    begun = [first for first in step_scale if first <= step]
    return ratio * step_scale[max(begun)] if begun else ratio
