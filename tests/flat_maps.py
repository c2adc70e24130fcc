"""Flat index tensors of random maps, made by sorting instead of by the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.kernels import merge, restore


class FlatMap(NamedTuple):
    """What the verbs of gen_turbo.kernels take, and the map it comes from."""

    slot_BN: Tensor
    num_slots: int
    order: Tensor
    offsets: Tensor
    share: Tensor
    slot: Tensor


def flat_map(slot_BN: Tensor, num_slots: int, dtype: torch.dtype = torch.float32) -> FlatMap:
    """The tensors of a map; slots may be empty."""
    flat = (slot_BN + num_slots * torch.arange(len(slot_BN))[:, None]).reshape(-1)
    sizes = flat.bincount(minlength=len(slot_BN) * num_slots)
    order = flat.argsort(stable=True)
    share = sizes.to(dtype).reciprocal()[flat[order]]
    return FlatMap(slot_BN, num_slots, order, F.pad(sizes.cumsum(0), (1, 0)), share, flat)


def random_map(batch: int, num_tokens: int, num_slots: int, seed: int, dtype: torch.dtype = torch.float32) -> FlatMap:
    """Every slot has a token; the low slots draw most of the others, so that sizes go from 1 to many."""
    generator = torch.Generator().manual_seed(seed)
    slot_BN = torch.empty(batch, num_tokens, dtype=torch.int64)
    for row in slot_BN:
        skewed = torch.rand(num_tokens, generator=generator).pow(3).mul(num_slots).long()
        skewed[:num_slots] = torch.arange(num_slots)
        row.copy_(skewed[torch.randperm(num_tokens, generator=generator)])
    return flat_map(slot_BN, num_slots, dtype)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unmerge(y: Tensor, slot: Tensor, detail: Tensor | None = None, **terms: Any) -> Tensor:
    """What `restore` makes of one output on slots."""
    restored = restore([y], slot, details=[detail], **terms)[0]
    assert restored is not None
    return restored


def merged(x: Tensor, flat: FlatMap) -> Tensor:
    """The verb on a map."""
    return merge(x, flat.order, flat.offsets, flat.share)


def terms(flat: FlatMap, channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every optional term."""
    batch, num_tokens = flat.slot_BN.shape
    made = {n: values(batch, m, channels, dtype=dtype) for n, m in (("base", num_tokens), ("minus", flat.num_slots))}
    return made | {"detail": values(2, batch, num_tokens, channels, dtype=dtype), "weights": torch.tensor([1.0, 3.0])}
