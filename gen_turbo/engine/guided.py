"""Guidance branches side by side in one batch: weights for each of them, and calls that run the last ones alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from gen_turbo.engine.context import Context
from gen_turbo.engine.values import mapped
from gen_turbo.training.schedule import Weights, by_branch


def num_branches(context: Context) -> int:
    """Guidance branches in the batch of a context; 1 where there are none, or where each is called for itself."""
    batch, num_images = context.layout.shape[0], context.geometry.num_images
    return batch // num_images if num_images and batch % num_images == 0 else 1


def num_results(weights: Weights) -> int:
    """How many results weights are for."""
    return max(map(len, by_branch(weights)))


def by_result(branches: Sequence[Sequence[float]]) -> list[Any]:
    """By result, what it weighs: a number for each of some branches, or one for all."""
    return [row if len(row) > 1 else row[0] for row in zip_longest(*branches, fillvalue=0.0)]


def combined(parts: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    """The weighted sum of tensors, in single precision at least.

    Args:
        parts: Tensors of one shape, batch first.
        weights: For each a number, a 0-dim tensor, or a number for each of equal parts of the batch.
    """
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        if isinstance(weight, tuple):
            pieces = part.to(wide).chunk(len(weight))
            term = torch.cat([piece * own for piece, own in zip(pieces, weight, strict=True)])
        elif total is None or isinstance(weight, Tensor) or weight:
            term = part.to(wide) * weight
        else:
            continue
        total = term if total is None else total + term
    assert total is not None
    return total.to(parts[0].dtype)


def rows_of(value: Any, rows: slice, batch: int) -> Any:
    """Arguments of a call for some rows of its batch alone: of all tensors with as many rows."""
    return mapped(value, lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == batch else tensor)


def with_first(rest: Sequence[Tensor], known: Sequence[Sequence[Tensor]], weights: Weights) -> list[Tensor]:
    """Results of a whole batch, of which the first branch is made of earlier ones.

    Args:
        rest: What the call gave for the others.
        known: Earlier results of the whole batch, the newest first.
        weights: For each branch, with a first one for the call's own result, which the first branch does not have.
    """
    branches = by_branch(weights)
    made = []
    for tensor, older in zip(rest, zip(*known, strict=True), strict=True):
        first = [whole.chunk(len(branches))[0] for whole in older]
        own = branches[0][1:]
        made.append(torch.cat([combined(first[: len(own)], own), tensor]))
    return made
