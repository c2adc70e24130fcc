"""A token map laid out for one run: index tensors of fixed size and address, into which a new map is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen_turbo.engine.values import num_bytes
from gen_turbo.models.adapter import TokenArg
from gen_turbo.tokens.bags import flat_rows, sorted_bags
from gen_turbo.tokens.token_map import TokenMap

_INDEX = ("order", "offsets", "share", "slot", "size")


class RunMap:
    """What layers merge and restore by during one run.

    Shape names: b batch, N tokens, M merged tokens, of the whole sequence.

    Attributes:
        order: (b * N,) rows of the flattened tokens, sorted by the merged token that they join.
        offsets: (b * M + 1,) where each merged token begins in `order`, and the end.
        share: (b * N,) one over the size of the merged token, for each entry of `order`.
        slot: (b * N,) the row among the flattened merged tokens that each token joins.
        size: (b, M) how many tokens each merged token stands for.
        slot_BN: The map of the image tokens alone: what each joins, as the method made it.
        anchor_BM: The token that each merged token takes its place from.
        made_at: The step that made it.
        num_maps: How many were made before it.
        owner: Name of the layer that made the first.
        num_bytes: Bytes of all index tensors, those of wider sequences and of positions included.
        seen: Arguments of positions as they were given, and the rows of the merged tokens; beyond the running step
            those alone that are given again.
    """

    order: Tensor
    offsets: Tensor
    share: Tensor
    slot: Tensor
    size: Tensor

    def __init__(
        self, value: TokenMap, batch: int, dtype: torch.dtype, leading: int = 0, trailing: int = 0, owner: str = ""
    ) -> None:
        self.batch, self.dtype, self.leading, self.trailing = batch, dtype, leading, trailing
        self.slot_BN, self.anchor_BM, self.owner = value.slot_BN.clone(), value.anchor_BM.clone(), owner
        self.made_at = self.num_maps = 0
        self.wide: dict[tuple[int, int, int], RunMap] = {}
        self.taken: dict[tuple[int, int, int], Tensor] = {}
        self.seen: dict[str, tuple[Any, Any]] = {}
        for name, tensor in zip(_INDEX, self._laid_out(value), strict=True):
            setattr(self, name, tensor)
        self.num_bytes = num_bytes(self.slot_BN, self.anchor_BM, *(getattr(self, name) for name in _INDEX))

    @property
    def num_tokens(self) -> int:
        """Image tokens before merging."""
        return self.slot_BN.shape[1]

    @property
    def num_slots(self) -> int:
        """Image tokens after it."""
        return self.anchor_BM.shape[1]

    def write(self, value: TokenMap) -> None:
        """Makes this the layout of another map with as many merged tokens.

        No tensor changes its address, but where gradients are recorded.
        """
        self.seen.clear()
        self.slot_BN.copy_(value.slot_BN)
        self.anchor_BM.copy_(value.anchor_BM)
        for name, tensor in zip(_INDEX, self._laid_out(value), strict=True):
            if torch.is_grad_enabled():
                # A backward pass may still read the old one.
                setattr(self, name, tensor)
            else:
                getattr(self, name).copy_(tensor)
        for wide in self.wide.values():
            wide.write(value)
        for place, rows in self.taken.items():
            rows.copy_(_rows(value, *place))

    def widened(self, leading: int, trailing: int, batch: int = 0) -> RunMap:
        """The same map on a sequence with other tokens around, which keep a place of their own, or on fewer rows."""
        batch = batch or self.batch
        if leading == trailing == 0 and batch == self.batch:
            return self
        place = leading, trailing, batch
        if place not in self.wide:
            wide = self.wide[place] = RunMap(self._value, batch, self.dtype, leading, trailing)
            self.num_bytes += wide.num_bytes
        return self.wide[place]

    def rows_of(self, value: Tensor, arg: TokenArg, num_text: int) -> Tensor:
        """Which rows of an argument of positions the merged tokens keep, flattened over the batch if it has one."""
        before = num_text if arg.has_text_before else 0
        after = value.shape[arg.axis] - before - self.num_tokens
        return self.rows_at(before, after, value.shape[0] if arg.has_batch else 0)

    def rows_at(self, before: int, after: int, batch: int) -> Tensor:
        """The same by the tokens around those of the image, and by the samples; 0 for an argument without a batch."""
        place = before, after, batch
        if place not in self.taken:
            rows = self.taken[place] = _rows(self._value, *place)
            self.num_bytes += num_bytes(rows)
        return self.taken[place]

    def part(self, rows: slice) -> TokenMap:
        """The map of some of the samples, which is that of all where these share one."""
        num = len(self.slot_BN)
        own = slice(rows.start % num, rows.start % num + min(num, rows.stop - rows.start))
        return TokenMap(self.slot_BN[own], self.anchor_BM[own])

    @property
    def _value(self) -> TokenMap:
        return TokenMap(self.slot_BN, self.anchor_BM)

    def _laid_out(self, value: TokenMap) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        wide = value.between(self.leading, self.trailing)
        slot = wide.slot_BN.repeat(self.batch // len(wide.slot_BN), 1)
        num_slots = wide.num_slots
        size = torch.zeros(self.batch, num_slots, dtype=slot.dtype, device=slot.device)
        size = size.scatter_add(1, slot, torch.ones_like(slot))
        flat = flat_rows(slot, num_slots)
        return *sorted_bags(flat, size.reshape(-1), self.dtype), flat, size


def taken(value: Tensor, rows: Tensor, axis: int) -> Tensor:
    """The rows of an argument with a row per sample that merged tokens keep, as `RunMap.rows_of` gives them."""
    by_row = value.movedim(axis, 1)
    short = by_row.reshape(by_row.shape[0] * by_row.shape[1], *by_row.shape[2:]).index_select(0, rows)
    return short.reshape(by_row.shape[0], -1, *by_row.shape[2:]).movedim(1, axis)


def _rows(value: TokenMap, before: int, after: int, batch: int) -> Tensor:
    anchor = value.between(before, after).anchor_BM
    if batch == 0:
        return anchor[0].clone()
    return flat_rows(anchor.repeat(batch // len(anchor), 1), before + value.num_tokens + after)
