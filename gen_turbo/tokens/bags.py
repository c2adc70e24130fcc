"""The tokens of a batch sorted by the slot that they join, from which each slot is one sum.

Shape names: B batch, N tokens, M slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.tables import stacked


class Bags(NamedTuple):
    """Tokens sorted by slot.

    Attributes:
        order: Rows of the flattened tokens, (B * N,) int64.
        offsets: Where each slot begins in `order`, and the end, (B * M + 1,) int64.
        share: One over the size of the slot of each entry of `order`, (B * N,).
    """

    order: Tensor
    offsets: Tensor
    share: Tensor


def flat_rows(index: Tensor, length: int) -> Tensor:
    """Indices into rows of a length, (B, n), as indices into all rows behind each other, (B * n,)."""
    return stacked(index, length).reshape(-1)


def sorted_bags(flat: Tensor, sizes: Tensor, dtype: torch.dtype) -> Bags:
    """Sorts tokens by slot.

    Args:
        flat: The slot of each token among all slots of the batch, (B * N,) int64.
        sizes: Tokens of each slot, (B * M,) int64.
        dtype: Of the shares.
    """
    # A stable sort sums each slot in token order, the same in every process.
    joined, order = flat.sort(stable=True)
    share = sizes.to(dtype).reciprocal().index_select(0, joined)
    return Bags(order, F.pad(sizes.cumsum(0), (1, 0)), share)
