"""The token plan: which slot every token goes to, as data, and what merges and restores tokens by it.

Shape names: B batch, N tokens, M slots. Lower case b is a multiple of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.bags import Bags, flat_rows, sorted_bags


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Says which of M slots each of N tokens goes to, and which token lends each slot its place.

    Batches: the tensors given to the verbs may have b = r * B rows. The plan is then tiled r times along the
    batch (row i follows plan row i % B), the layout [unconditional; conditional] of classifier-free guidance; a
    plan of one row serves any batch. What the verbs need beyond the two index tensors is made on first use and
    kept, so both index tensors must not be written to afterwards.

    Attributes:
        slot_BN: The slot of each token, int64.
        anchor_BM: The token that lends each slot its place, int64. Anchors ascend in each row, so raster order
            and causality survive, and `slot[anchor[m]] == m`.

    Raises:
        ValueError: If the two are not int64 matrices with the same number of rows on one device, or M > N.
    """

    slot_BN: Tensor
    anchor_BM: Tensor
    _flat_cache: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _bag_cache: dict[tuple[int, torch.dtype], Bags] = field(default_factory=dict, init=False, repr=False)
    _wide_cache: dict[tuple[int, int], TokenMap] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks shapes, types and devices, never values, which would make the device wait."""
        slot, anchor = self.slot_BN, self.anchor_BM
        if slot.ndim != 2 or anchor.ndim != 2 or slot.shape[0] != anchor.shape[0]:
            raise ValueError(
                f"slot_BN {tuple(slot.shape)} and anchor_BM {tuple(anchor.shape)} must be matrices with the same "
                "number of rows; add the batch axis"
            )
        if slot.dtype != torch.int64 or anchor.dtype != torch.int64 or slot.device != anchor.device:
            raise ValueError(
                f"slot_BN ({slot.dtype}, {slot.device}) and anchor_BM ({anchor.dtype}, {anchor.device}) must be "
                "int64 on one device; convert them first"
            )
        if anchor.shape[1] > slot.shape[1]:
            raise ValueError(f"{anchor.shape[1]} slots for {slot.shape[1]} tokens; a plan has at most one per token")

    @property
    def num_tokens(self) -> int:
        """Number of tokens N before the reduction."""
        return self.slot_BN.shape[1]

    @property
    def num_slots(self) -> int:
        """Number of slots M after the reduction."""
        return self.anchor_BM.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether every token keeps its own slot (N == M), so that each verb returns its argument itself."""
        return self.num_slots == self.num_tokens

    @classmethod
    def identity(cls, batch: int, num_tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """Makes the plan that changes nothing."""
        index_BN = torch.arange(num_tokens, device=device).repeat(batch, 1)
        return cls(index_BN, index_BN)

    @classmethod
    def from_destinations(cls, destination_BN: Tensor, num_slots: int | None = None) -> TokenMap:
        """Makes a plan from the token that each token merges into.

        Args:
            destination_BN: The destination of each token, int64; a token that stays names itself.
            num_slots: How many tokens stay in every row, where the caller knows it. Nothing is then checked and
                the device need not wait for the answer.

        Returns:
            The plan whose anchors are the tokens that stay, in token order.

        Raises:
            ValueError: If a token merges into one that does not stay, or rows keep different numbers of tokens.
        """
        token_N = torch.arange(destination_BN.shape[1], device=destination_BN.device)
        stays_BN = destination_BN == token_N
        if num_slots is None:
            num_slots = _checked_num_slots(destination_BN, stays_BN)
        rank_BN = stays_BN.cumsum(1) - 1
        # Tokens that leave all write to one spare column behind the anchors.
        place_BN = rank_BN.masked_fill(~stays_BN, num_slots)
        anchor_BM = token_N.new_zeros(len(place_BN), num_slots + 1).scatter_(1, place_BN, token_N.expand_as(place_BN))
        return cls(rank_BN.gather(1, destination_BN), anchor_BM[:, :num_slots].contiguous())

    def merge(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Averages the tokens of each slot.

        Args:
            x: Tokens, (b, N, *rest), floating point. Half types are summed in float32.
            weight: Weight of each token, (b, N) or (B, N), such as the sizes of an earlier plan; must not sum to
                zero in a slot. None weighs all alike.

        Returns:
            Slots, (b, M, *rest), in the dtype of `x`; `x` itself where the plan is the identity.

        Raises:
            ValueError: If `x` does not have N tokens or its batch is no multiple of B.
            TypeError: If `x` is not floating point.
        """
        repeats = self._repeats(x.shape, self.num_tokens, "tokens")
        if not x.is_floating_point():
            raise TypeError(f"cannot average {x.dtype}; use `select` for positions and masks, or convert to float")
        if self.is_identity:
            return x
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        rows = wide.reshape(x.shape[0] * self.num_tokens, -1)
        bags = self._bags(repeats, rows.dtype)
        if weight is None:
            slots = _bag_sum(rows, bags, bags.share)
        else:
            column = _matching_weight(weight, x).to(rows.dtype).reshape(-1, 1)
            scale = column.reshape(-1).index_select(0, bags.order) * bags.share
            slots = _bag_sum(rows, bags, scale) / _bag_sum(column, bags, bags.share)
        return slots.to(x.dtype).reshape(x.shape[0], self.num_slots, *x.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """Copies each slot back to all of its tokens: (b, M, *rest) to (b, N, *rest), any dtype.

        Raises:
            ValueError: If `y` does not have M slots or its batch is no multiple of B.
        """
        repeats = self._repeats(y.shape, self.num_slots, "slots")
        return y if self.is_identity else _take_rows(y, self._flat("slot", repeats), self.num_tokens)

    def select(self, x: Tensor) -> Tensor:
        """Takes the rows of the anchors: (b, N, *rest) to (b, M, *rest), any dtype; nothing is averaged.

        Raises:
            ValueError: If `x` does not have N tokens or its batch is no multiple of B.
        """
        repeats = self._repeats(x.shape, self.num_tokens, "tokens")
        return x if self.is_identity else _take_rows(x, self._flat("anchor", repeats), self.num_slots)

    def sizes(self) -> Tensor:
        """Counts the tokens of each slot: (B, M) int64, every row summing to N."""
        ones_BN = torch.ones_like(self.slot_BN)
        return torch.zeros_like(self.anchor_BM).scatter_add(1, self.slot_BN, ones_BN)

    def then(self, later: TokenMap) -> TokenMap:
        """Joins this plan and a later one, made on this one's slots, into one plan.

        Merging by the result equals `later.merge(self.merge(x), weight=self.sizes())`: the sizes make the mean of
        means a mean of tokens. Unmerging equals `self.unmerge(later.unmerge(y))`.

        Raises:
            ValueError: If the later plan's tokens are not this one's slots, or no batch is a multiple of the other.
        """
        if later.num_tokens != self.num_slots:
            raise ValueError(
                f"the later plan reads {later.num_tokens} tokens but this one has {self.num_slots} slots; "
                "make the later plan on merged tokens"
            )
        batch = max(self.slot_BN.shape[0], later.slot_BN.shape[0])
        slot, anchor = self._tiled(batch)
        later_slot, later_anchor = later._tiled(batch)
        return TokenMap(later_slot.gather(1, slot), anchor.gather(1, later_anchor))

    def by_row(self) -> list[TokenMap]:
        """Gives each row as a plan of its own."""
        rows = zip(self.slot_BN[:, None], self.anchor_BM[:, None], strict=True)
        return [TokenMap(slot, anchor) for slot, anchor in rows]

    def between(self, leading: int, trailing: int) -> TokenMap:
        """Widens the plan to a longer sequence whose first `leading` and last `trailing` tokens keep their own slot.

        How text tokens before or after the visual ones go through the verbs unchanged, `merge` included.
        """
        if leading == trailing == 0:
            return self
        if (leading, trailing) not in self._wide_cache:
            slot = _between(self.slot_BN, leading, trailing, self.num_slots)
            anchor = _between(self.anchor_BM, leading, trailing, self.num_tokens)
            self._wide_cache[leading, trailing] = TokenMap(slot, anchor)
        return self._wide_cache[leading, trailing]

    def warm(self, batch: int, dtype: torch.dtype = torch.float32) -> TokenMap:
        """Makes now what the verbs need for `batch` rows and returns the plan, so that compiled code finds it made.

        Args:
            batch: Rows of the tensors to come.
            dtype: What `merge` sums in: float32 for all half types, else the dtype of the tokens.

        Raises:
            ValueError: If the batch is no multiple of B.
        """
        repeats = self._repeats((batch, self.num_tokens), self.num_tokens, "tokens")
        if not self.is_identity:
            self._bags(repeats, dtype)
            self._flat("anchor", repeats)
        return self

    def _repeats(self, shape: Sequence[int], expected: int, unit: str) -> int:
        batch = self.slot_BN.shape[0]
        if len(shape) < 2 or shape[1] != expected:
            raise ValueError(f"expected (batch, {expected} {unit}, ...), got {tuple(shape)}; make a plan for this size")
        if shape[0] % batch:
            raise ValueError(f"a batch of {shape[0]} is no multiple of the plan's {batch}; plan one row per sample")
        return shape[0] // batch

    def _tiled(self, batch: int) -> tuple[Tensor, Tensor]:
        repeats = self._repeats((batch, self.num_tokens), self.num_tokens, "tokens")
        if repeats == 1:
            return self.slot_BN, self.anchor_BM
        return self.slot_BN.repeat(repeats, 1), self.anchor_BM.repeat(repeats, 1)

    def _flat(self, name: str, repeats: int) -> Tensor:
        """Gives slot or anchor as rows of the flattened (b * M) or (b * N) matrix."""
        if (name, repeats) not in self._flat_cache:
            index, stride = (self.slot_BN, self.num_slots) if name == "slot" else (self.anchor_BM, self.num_tokens)
            self._flat_cache[name, repeats] = flat_rows(index if repeats == 1 else index.repeat(repeats, 1), stride)
        return self._flat_cache[name, repeats]

    def _bags(self, repeats: int, dtype: torch.dtype) -> Bags:
        if (repeats, dtype) not in self._bag_cache:
            sizes = (self.sizes() if repeats == 1 else self.sizes().repeat(repeats, 1)).reshape(-1)
            self._bag_cache[repeats, dtype] = sorted_bags(self._flat("slot", repeats), sizes, dtype)
        return self._bag_cache[repeats, dtype]


def _bag_sum(rows: Tensor, bags: Bags, scale: Tensor) -> Tensor:
    # One kernel that gathers, scales and sums, without atomics: measurably faster than mode "mean" and index_add_.
    return F.embedding_bag(
        bags.order, rows, bags.offsets, mode="sum", per_sample_weights=scale, include_last_offset=True
    )


def _between(index: Tensor, leading: int, trailing: int, length: int) -> Tensor:
    """Puts counted-up numbers around an index matrix whose own numbers are below `length`."""
    around = [torch.arange(leading, device=index.device).expand(len(index), -1), index + leading]
    if trailing:
        around.append(torch.arange(trailing, device=index.device).expand(len(index), -1) + (leading + length))
    return torch.cat(around, 1)


def _take_rows(x: Tensor, index: Tensor, length: int) -> Tensor:
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return flat.index_select(0, index).reshape(x.shape[0], length, *x.shape[2:])


def _matching_weight(weight: Tensor, x: Tensor) -> Tensor:
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or x.shape[0] % weight.shape[0]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit tokens {tuple(x.shape)}; give (batch, tokens)")
    return weight.repeat(x.shape[0] // weight.shape[0], 1)


def _checked_num_slots(destination_BN: Tensor, stays_BN: Tensor) -> int:
    if not bool(stays_BN.gather(1, destination_BN).all()):
        raise ValueError("a token merges into one that does not stay; name the final destination of every token")
    counts = stays_BN.sum(1)
    if not bool((counts == counts[0]).all()):
        raise ValueError(f"rows keep {counts.tolist()} tokens; every row of a batch must keep the same number")
    return int(counts[0])
