"""What a quantity will be at a step, from what it was at earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def forecast(values: Sequence[Tensor], steps: Sequence[int], step: int, slope: float = 1.0) -> Tensor:
    """Continues a quantity linearly in the step.

    Args:
        values: What it was, of one shape, the newest first; one value is held.
        steps: The steps of the values, falling.
        step: The step asked for.
        slope: Share of the last slope that is continued: 0 holds the newest value, 1 is the straight line.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("a forecast needs at least one earlier value; got none")
    if len(values) == 1 or slope == 0:
        return values[0].clone()
    reach = slope * (step - steps[0]) / (steps[0] - steps[1])
    return values[0].lerp(values[1], -reach)


def best_slope(newest: Tensor, older: Tensor, actual: Tensor, steps: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Gives numerator and denominator of the least-squares slope, to be summed over what is forecast together.

    Args:
        newest: The quantity at `steps[0]`.
        older: The same at `steps[1]`.
        actual: What it really is at `steps[2]`.
        steps: Falling for the first two; the third lies behind the first.
    """
    line = ((newest - older) * ((steps[2] - steps[0]) / (steps[0] - steps[1]))).float()
    return (line * (actual - newest).float()).sum(), line.square().sum()
