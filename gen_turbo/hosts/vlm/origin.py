"""Which of the pictures that the tower saw each picture of a call is."""

from __future__ import annotations

import torch
from torch import Tensor


def match_pictures(features: list[Tensor], seen: list[Tensor]) -> list[int]:
    """Finds each picture's features among those that the tower's side made; `generate` repeats them for its beams.

    Args:
        features: Features of each picture of a call, (n, C).
        seen: Features of each picture that the tower saw last.

    Returns:
        For each picture the place of its features in `seen`.

    Raises:
        ValueError: If features are not among those seen: they came from elsewhere.
    """
    return [_place(one, seen, index) for index, one in enumerate(features)]


def _place(one: Tensor, seen: list[Tensor], guess: int) -> int:
    order = [guess % len(seen), *range(len(seen))] if seen else []
    for index in order:
        other = seen[index]
        if other is one or (other.shape == one.shape and torch.equal(other, one)):
            return int(index)
    raise ValueError(
        "the image features of this call were not made by this model's tower while the reducer was attached; pass "
        "pixel_values instead of features made before"
    )
