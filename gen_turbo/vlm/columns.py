"""Which columns of a long sequence the rows of a shorter one hold: what masks, positions and caches are gathered by.

Shape names: B batch, N columns of the long sequence, M of the short one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.tables import counting


@dataclass(frozen=True, eq=False)
class Columns:
    """A shorter sequence whose rows may keep different numbers of columns; padding is on the left.

    Padding on the left keeps the last token last, which is where generation reads.

    Attributes:
        index_BM: The column of the long sequence that each place holds, int64, ascending behind the padding.
        valid_BM: False where a place is padding that stands for no column.
        num_columns: N, columns of the long sequence.
        is_ragged: Whether any place is padding. Known when made, so that the device need not be asked again.
        log_size_BM: Logarithm of how many columns each place stands for, where attention weighs by it; None elsewhere.
    """

    index_BM: Tensor
    valid_BM: Tensor
    num_columns: int
    is_ragged: bool
    log_size_BM: Tensor | None = None

    @classmethod
    def of_kept(cls, keep_BN: Tensor) -> Columns:
        """Makes the columns marked True, in order."""
        counts = keep_BN.sum(1)
        numbers = counts.tolist()
        length, least = max(numbers), min(numbers)
        # A stable sort lists the kept columns first, in order.
        order_BN = keep_BN.view(torch.uint8).argsort(dim=1, descending=True, stable=True)
        if length == least:
            index_BM = order_BN[:, :length].contiguous()
            return cls(index_BM, torch.ones_like(index_BM, dtype=torch.bool), keep_BN.shape[1], False)
        place_BM = torch.arange(length, device=keep_BN.device)[None] - (length - counts)[:, None]
        valid_BM = place_BM >= 0
        index_BM = order_BN.gather(1, place_BM.clamp(min=0)) * valid_BM
        return cls(index_BM, valid_BM, keep_BN.shape[1], True)

    @classmethod
    def all_of(cls, batch: int, num_columns: int, device: torch.device | str | None = None) -> Columns:
        """Makes the columns of a sequence that was not shortened."""
        index_BM = torch.arange(num_columns, device=device).repeat(batch, 1)
        return cls(index_BM, torch.ones_like(index_BM, dtype=torch.bool), num_columns, False)

    @property
    def num_kept(self) -> int:
        """M, places of the short sequence."""
        return self.index_BM.shape[1]

    def grown(self, num_columns: int) -> Columns:
        """Appends columns that were not shortened, until the long sequence has `num_columns`.

        Raises:
            ValueError: If the long sequence is longer already.
        """
        if num_columns < self.num_columns:
            raise ValueError(f"{self.num_columns} columns were shortened, but the sequence has only {num_columns} now")
        return self.beside(Columns.all_of(len(self.index_BM), num_columns - self.num_columns, self.index_BM.device))

    def beside(self, later: Columns) -> Columns:
        """Puts the columns of a following sequence behind these."""
        if 0 in (self.num_columns, later.num_columns):
            return later if self.num_columns == 0 else self
        return Columns(
            torch.cat([self.index_BM, later.index_BM + self.num_columns], 1),
            torch.cat([self.valid_BM, later.valid_BM], 1),
            self.num_columns + later.num_columns,
            self.is_ragged or later.is_ragged,
            self._log_sizes_beside(later),
        )

    def _log_sizes_beside(self, later: Columns) -> Tensor | None:
        parts = (self, later)
        known = next((part.log_size_BM for part in parts if part.log_size_BM is not None), None)
        if known is None:
            return None
        sizes = [known.new_zeros(p.index_BM.shape) if p.log_size_BM is None else p.log_size_BM for p in parts]
        return torch.cat(sizes, 1)

    def weighed(self, log_size_BN: Tensor) -> Columns:
        """The same columns, each standing for as many as the exponential of its log size."""
        return replace(self, log_size_BM=self.take(log_size_BN, 1))

    def then(self, later: Columns) -> Columns:
        """Joins these columns and those that stay of their places."""
        index = self.index_BM.gather(1, later.index_BM) * later.valid_BM
        log_size = None if self.log_size_BM is None else self.log_size_BM.gather(1, later.index_BM)
        return replace(later, index_BM=index, num_columns=self.num_columns, log_size_BM=log_size)

    def without_last(self, count: int) -> Columns:
        """Takes the last `count` columns off both sequences.

        Raises:
            ValueError: If any of them is missing in a row of the short sequence.
        """
        if not bool(
            (self.index_BM[:, -count:] == torch.arange(-count, 0, device=self.index_BM.device) + self.num_columns).all()
        ):
            raise ValueError(
                f"columns are missing among the last {count} of {self.num_columns}; begin with a new cache"
            )
        return replace(self._at((slice(None), slice(-count))), num_columns=self.num_columns - count)

    def take(self, x: Tensor, dim: int, batch_dim: int = 0) -> Tensor:
        """Takes the kept columns of `x` along `dim`; a batch axis of 1 serves every row. Padding takes column 0."""
        dim, batch_dim = dim % x.ndim, batch_dim % x.ndim
        batch, length = self.index_BM.shape
        if x.shape[batch_dim] != batch:
            x = x.expand(*[batch if axis == batch_dim else -1 for axis in range(x.ndim)])
        if x.ndim == 2:
            return x.gather(dim, self.index_BM)
        shape = [1] * x.ndim
        shape[batch_dim], shape[dim] = batch, length
        target = list(x.shape)
        target[dim] = length
        return x.gather(dim, self.index_BM.view(shape).expand(target))

    def spread(self, y: Tensor) -> Tensor:
        """Gives (B, M, *rest) back its N columns: one that is missing copies the nearest kept one before it."""
        column_BN = counting(len(self.index_BM), self.num_columns, y.device)
        # How many places hold this column or one before it; padding holds column 0 and is never meant.
        place_BN = torch.searchsorted(self.index_BM, column_BN, right=True) - 1
        if self.is_ragged:
            place_BN = torch.maximum(place_BN, (~self.valid_BM).sum(1, keepdim=True))
        else:
            place_BN = place_BN.clamp(min=0)
        return y.gather(1, place_BN.view(*place_BN.shape, *[1] * (y.ndim - 2)).expand(-1, -1, *y.shape[2:]))

    def mask(self, mask_BN: Tensor) -> Tensor:
        """Takes the kept columns of a mask (B, N) that is true, or 1, for real tokens; padding becomes 0."""
        taken = self.take(mask_BN, 1)
        return taken * self.valid_BM.to(mask_BN.dtype) if self.is_ragged else taken

    def keys(self, mask: Tensor) -> Tensor:
        """Takes the kept keys of an attention mask (b, heads, queries, N); padding is hidden from every query.

        Args:
            mask: Boolean, True where attention is allowed, or floating point, added to the logits.
        """
        taken = self.take(mask, 3)
        if not self.is_ragged:
            return taken
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return taken.masked_fill(~self.valid_BM[:, None, None, :], hidden)

    def queries(self, mask: Tensor) -> Tensor:
        """Takes the kept queries of an attention mask (b, heads, N, keys)."""
        return self.take(mask, 2)

    def rows(self, index: Tensor) -> Columns:
        """Takes rows of the batch, as beam search reorders them."""
        return self._at(index)

    def _at(self, where: Any) -> Columns:
        """The rows, or rows and places, that an index picks of each tensor."""
        log_size = None if self.log_size_BM is None else self.log_size_BM[where]
        return replace(self, index_BM=self.index_BM[where], valid_BM=self.valid_BM[where], log_size_BM=log_size)

    def repeated(self, times: int) -> Columns:
        """Repeats each row of the batch `times` times, copies side by side."""
        return self.rows(torch.arange(len(self.index_BM), device=self.index_BM.device).repeat_interleave(times))


def protect_leading(slot_BN: Tensor, count: int) -> Tensor:
    """Puts `count` tokens with a slot of their own in front of the slots (B, N) of the others: (B, count + N)."""
    own = torch.arange(count, device=slot_BN.device).expand(len(slot_BN), -1)
    return F.pad(slot_BN + count, (count, 0)).scatter(1, own, own)
