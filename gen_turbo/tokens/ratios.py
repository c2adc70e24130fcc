"""From a layer and a step to a ratio, and from a ratio to a number of tokens removed."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import prod


def max_ratio(stride: tuple[int, ...] = (2, 2)) -> float:
    """Gives the largest fraction of tokens that can leave when each cell of `stride` tokens keeps one destination."""
    return 1 - 1 / prod(stride)


def num_removed(num_tokens: int, ratio: float, stride: tuple[int, ...] = (2, 2)) -> int:
    """Gives the number of tokens that leave, `ratio * num_tokens` rounded down.

    Args:
        num_tokens: Visual tokens before the reduction.
        ratio: Fraction to remove.
        stride: Cell that keeps one destination, (height, width) or one length.

    Raises:
        ValueError: If the ratio is negative or above `max_ratio(stride)`; it is never lowered in silence.
    """
    bound = max_ratio(stride)
    if not 0 <= ratio <= bound:
        raise ValueError(
            f"ratio {ratio} is not in [0, {bound:g}]: with stride {stride} one token in {prod(stride)} stays; "
            "lower `ratio` or use a larger `stride`"
        )
    return int(num_tokens * ratio)


def ratio_of_layer(name: str, ratio: float, layer_ratios: Mapping[str, float]) -> float:
    """Gives the ratio of a layer: that of the last pattern (`up_blocks.*`) that its path fits, otherwise `ratio`."""
    fitting = [found for pattern, found in layer_ratios.items() if fnmatchcase(name, pattern)]
    return fitting[-1] if fitting else ratio


def ratio_at_step(ratio: float, step: int, step_scale: Mapping[int, float]) -> float:
    """Gives the ratio at a step: times the factor of the last step in `step_scale` that has begun, 1 before all."""
    begun = [first for first in step_scale if first <= step]
    return ratio * step_scale[max(begun)] if begun else ratio
