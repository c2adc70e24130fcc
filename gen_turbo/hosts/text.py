"""Text tokens merged once per prompt at the model's root; attention weighs them by their sizes afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gen_turbo.core.farthest import farthest_point_plan
from gen_turbo.core.plan import ReductionPlan


@dataclass(frozen=True)
class MergedText:
    """The text of one prompt on fewer tokens.

    Attributes:
        arguments: What the root is given in place of its own arguments.
        num_text: Text tokens that are left.
        sizes: How many tokens each of them stands for, (b, T).
    """

    arguments: dict[str, Any]
    num_text: int
    sizes: Tensor


def merge_text(arguments: Mapping[str, Any], names: tuple[str, ...], ratio: float) -> MergedText:
    """Merges the text tokens that are most alike; equal ones, such as padding, first.

    Args:
        arguments: Those of the root, by name.
        names: The embedding (B, T, C), then arguments of positions without a batch, (T, d), of which rows are taken.
        ratio: Fraction of text tokens that leaves.

    Returns:
        The merged text; where there are positions, one plan serves the whole batch.
    """
    text: Tensor = arguments[names[0]]
    plan = _plan(text, ratio, shares=len(names) > 1)
    merged: dict[str, Any] = {names[0]: plan.merge(text)}
    for name in names[1:]:
        rows = arguments[name]
        merged[name] = plan.select(rows[None])[0] if rows.ndim == 2 else plan.select(rows)
    return MergedText(merged, plan.num_slots, plan.sizes())


def _plan(text: Tensor, ratio: float, shares: bool) -> ReductionPlan:
    num_slots = text.shape[1] - int(text.shape[1] * ratio)
    rows = text.transpose(0, 1).reshape(1, text.shape[1], -1) if shares else text
    return farthest_point_plan(rows, num_slots)
