"""What a shortened call does to masks, caches and added features.

Shape names: B rows, L columns of the call, M of them that stay, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gen_turbo.vlm.cache import SHORTENED
from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.run import Reduction


def uses_cache(text: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call of a language model is to keep keys and values."""
    asked = kwargs.get("use_cache")
    return bool(text.config.use_cache if asked is None else asked)  # type: ignore[union-attr]


def check_mask(mask: Any) -> None:
    """Refuses masks whose columns cannot be taken apart; raises ValueError."""
    for one in mask.values() if isinstance(mask, dict) else (mask,):
        if one is not None and not isinstance(one, Tensor):
            raise ValueError(
                "the block masks of flex attention cannot follow dropped tokens; load with attn_implementation='sdpa'"
            )


def held(cache: Any) -> int:
    """Columns that a cache holds."""
    if isinstance(cache, SHORTENED):
        return int(cache.num_held())
    return int(cache.get_seq_length()) if cache is not None else 0


def mask_2d(columns: Columns, mask: Tensor | None, has_cache: bool) -> Tensor | None:
    """The mask of the columns that stay. Without a cache, gaps in the positions need one: they mean packing."""
    if mask is not None:
        if mask.shape[1] != columns.num_columns:
            raise ValueError(f"an attention mask of {mask.shape[1]} columns for {columns.num_columns} tokens; pad both")
        return columns.mask(mask)
    return columns.valid_BM.long() if columns.is_ragged or not has_cache else None


def deepstack(kwargs: dict[str, Any], reduction: Reduction, here: Columns, is_merged: bool) -> dict[str, Any]:
    """Reduces features that later layers add to the image tokens as the tokens themselves were reduced."""
    marks = kwargs["visual_pos_masks"]
    kept = here.mask(marks)
    reduced = []
    for features in kwargs["deepstack_visual_embeds"]:
        full = features.new_zeros(*marks.shape, features.shape[-1]).masked_scatter(marks[..., None], features)
        reduced.append(here.take(reduction.apply(full, is_merged), 1)[kept])
    return {"visual_pos_masks": kept, "deepstack_visual_embeds": reduced}
