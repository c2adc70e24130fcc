"""Weighted merging of every image of a batch at once, with all that its verbs need made in few operators.

Shape names: B images, N tokens, M slots, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.tables import counting, filled, stacked
from gen_turbo.tokens.token_map import TokenMap


@dataclass(frozen=True, eq=False)
class Merging:
    """Which slot each token of a batch goes to, and how many tokens of the image each slot stands for.

    Attributes:
        slot_BN: The slot of each token, int64.
        anchor_BM: The token that lends each slot its place, ascending, int64.
        sizes: Tokens of the image in each slot, (B, M), float32.
        sizes_before: The same of the N tokens.
    """

    slot_BN: Tensor
    anchor_BM: Tensor
    sizes: Tensor
    sizes_before: Tensor
    # Not cached properties: before Python 3.12 they take a lock, which breaks the graph of compiled code.
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: TokenMap, batch: int, leading: int = 0, sizes_BN: Tensor | None = None) -> Self:
        """Makes the merge of a plan for patches, behind `leading` tokens that stay as they are.

        Args:
            plan: Of as many rows as images, or of one that serves all.
            batch: B.
            leading: Class tokens in front.
            sizes_BN: How many tokens of the image each token stands for; None if one each.
        """
        slot, anchor = plan.slot_BN, plan.anchor_BM
        if len(slot) != batch:
            slot, anchor = slot.expand(batch, -1), anchor.expand(batch, -1)
        if leading:
            own = counting(batch, leading, slot.device)
            slot, anchor = torch.cat([own, slot + leading], 1), torch.cat([own, anchor + leading], 1)
        before = filled(*slot.shape, 1.0, slot.device) if sizes_BN is None else sizes_BN
        return cls(slot, anchor, filled(*anchor.shape, 0.0, slot.device).scatter_add(1, slot, before), before)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.slot_BN.shape[1]

    @property
    def num_slots(self) -> int:
        """M."""
        return self.anchor_BM.shape[1]

    @property
    def log_sizes(self) -> Tensor:
        """What proportional attention adds to the logits of each slot's key, (B, M)."""
        if "log_sizes" not in self._made:
            self._made["log_sizes"] = self.sizes.log()
        log_sizes: Tensor = self._made["log_sizes"]
        return log_sizes

    def logit_bias(self, dtype: torch.dtype) -> Tensor:
        """The same for a mask of attention, (B, 1, 1, M)."""
        if dtype not in self._made:
            self._made[dtype] = converted(self.log_sizes, dtype).view(len(self.sizes), 1, 1, -1)
        bias: Tensor = self._made[dtype]
        return bias

    @property
    def _slots(self) -> Tensor:
        """The slot of each token among all slots of the batch, (B, N)."""
        if "slots" not in self._made:
            self._made["slots"] = stacked(self.slot_BN, self.num_slots)
        slots: Tensor = self._made["slots"]
        return slots

    @property
    def _bags(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens sorted by slot, where each slot begins, and each sorted token's share of its slot."""
        if "bags" not in self._made:
            # A stable sort sums each slot in token order, the same in every process; rows are short and sort at once.
            sorted_slots, order = self._slots.sort(dim=1, stable=True)
            order = stacked(order, self.num_tokens).view(-1)
            begins = counting(1, self.sizes.numel() + 1, order.device)[0]
            offsets = torch.searchsorted(sorted_slots.view(-1), begins)
            shares = (self.sizes_before / self.sizes.gather(1, self.slot_BN)).take(order)
            self._made["bags"] = order, offsets, shares
        bags: tuple[Tensor, Tensor, Tensor] = self._made["bags"]
        return bags

    def merge(self, x_BNC: Tensor) -> Tensor:
        """Averages the tokens of each slot by their sizes, in at least float32: (B, M, C), in the dtype of `x_BNC`."""
        order, offsets, share = self._bags
        wide = torch.float64 if x_BNC.dtype == torch.float64 else torch.float32
        rows, weights = converted(x_BNC.reshape(-1, x_BNC.shape[-1]), wide), converted(share, wide)
        slots = F.embedding_bag(order, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
        return converted(slots.view(len(x_BNC), -1, x_BNC.shape[-1]), x_BNC.dtype)

    def unmerge(self, y_BMC: Tensor) -> Tensor:
        """Copies each slot back to all of its tokens: (B, N, C)."""
        copies = y_BMC.reshape(-1, y_BMC.shape[-1]).index_select(0, self._slots.view(-1))
        return copies.view(len(y_BMC), -1, y_BMC.shape[-1])

    def then(self, later: Merging) -> Merging:
        """Joins this merge and a later one of its slots into one."""
        anchor = self.anchor_BM.gather(1, later.anchor_BM)
        return Merging(later.slot_BN.gather(1, self.slot_BN), anchor, later.sizes, self.sizes_before)

    def plan(self, leading: int = 0) -> TokenMap:
        """The merge without its sizes and without `leading` tokens that stayed as they were."""
        return TokenMap(self.slot_BN[:, leading:] - leading, self.anchor_BM[:, leading:] - leading)


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype; no operator where it has it."""
    return x if x.dtype == dtype else x.to(dtype)
