"""What a shortened call does to masks, caches and added features.

Shape names: B rows, L columns of the call, M of them that stay, H columns held before, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.vlm.cache import SHORTENED
from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.run import Reduction


def uses_cache(text: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call of a language model is to keep keys and values."""
    asked = kwargs.get("use_cache")
    return bool(text.config.use_cache if asked is None else asked)  # type: ignore[union-attr]


def per_token(kwargs: dict[str, Any], left: Columns) -> dict[str, Tensor]:
    """What some language models read of each token beside it, (B, L, ...), of the columns that are left.

    These are inputs of later layers in Gemma 4, which experts a token goes to in ERNIE 4.5, and ids of which Qwen4
    embeds sequences in later layers.
    """
    names = ("per_layer_inputs", "moe_mm_token_type_ids", "ple_input_ids")
    return {name: left.take(kwargs[name], 1) for name in names if kwargs.get(name) is not None}


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


def widest(mask: Any) -> Any:
    """Of masks by kind of layer the one that hides least: a sliding window hides columns that are no padding."""
    return mask.get("full_attention", next(iter(mask.values()))) if isinstance(mask, dict) else mask


def real_columns(mask: Any, embeds_BLC: Tensor) -> Tensor:
    """Which columns of a call are no padding, (B, L), from its 2D mask or from what the last query may see."""
    batch, length = embeds_BLC.shape[:2]
    mask = widest(mask)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=embeds_BLC.device)
    if mask.ndim == 4:
        seen: Tensor = mask[:, 0, -1, -length:]
        seen = seen > torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() else seen.bool()
    else:
        seen = (mask if mask.shape[1] == length else mask[:, -length:]).bool()
    return seen if len(seen) == batch else seen.expand(batch, -1)


def mask_2d(columns: Columns, mask: Tensor | None, has_cache: bool) -> Tensor | None:
    """The mask of the columns that stay. Without a cache, gaps in the positions need one: they mean packing."""
    if mask is not None:
        if mask.shape[1] != columns.num_columns:
            raise ValueError(f"an attention mask of {mask.shape[1]} columns for {columns.num_columns} tokens; pad both")
        return columns.mask(mask)
    return columns.valid_BM.long() if columns.is_ragged or not has_cache else None


def short_mask(
    mask: Tensor | None, here: Columns | None, total: Columns, num_held: int, has_cache: bool
) -> Tensor | None:
    """What stays of the mask of a call.

    Args:
        mask: (B, H + L), (B, 1, L, H + L), or None for a causal one.
        here: The columns of the call that stay; None if all do, and the mask is one of columns already.
        total: The columns held, and those that stay.
        num_held: H.
        has_cache: Whether there is a cache.
    """
    if mask is None or mask.ndim == 2:
        return mask_2d(total, mask, has_cache)
    if here is None:
        return mask
    keys = Columns.all_of(len(here.index_BM), num_held, mask.device).beside(here)
    return here.queries(keys.keys(mask))


def masks_by_kind(
    masks: dict[str, Any], here: Columns | None, total: Columns, num_held: int, embeds: Tensor, config: Any
) -> dict[str, Any]:
    """What stays of the masks of a call whose layers are of several kinds; windows slide over the columns that stay.

    Args:
        masks: By kind of layer, as `short_mask` takes them.
        here: The columns of the call that stay; None if all do, and the masks are those of columns already.
        total: The columns held, and those that stay.
        num_held: H.
        embeds: The call's embeddings, (B, L, C).
        config: The language model's configuration.
    """
    if here is None:
        return masks
    attention = config._attn_implementation or ""
    if "flash" in attention:
        # Such kernels slide the windows themselves.
        return {kind: mask_2d(total, mask, False) for kind, mask in masks.items()}
    full, sliding = masks["full_attention"], masks.get("sliding_attention")
    full = _causal(num_held, embeds, attention == "eager") if full is None else full
    shorter = short_mask(full, here, total, num_held, True)
    assert shorter is not None
    wide = shorter
    if sliding is not None:
        # In Gemma 4 tokens of an image see each other in the layers with windows alone.
        own = here.queries(here.keys(sliding[..., -embeds.shape[1] :]))
        own = F.pad(own, (shorter.shape[-1] - own.shape[-1], 0), value=_hidden(own))
        wide = shorter | own if own.dtype == torch.bool else torch.maximum(shorter, own)
    made = {"full_attention": shorter, "sliding_attention": _windowed(wide, config.sliding_window)}
    return {kind: made[kind] for kind in masks}


def weighed(mask: Tensor | None, total: Columns, entering: Tensor) -> Tensor:
    """A mask with the logarithm of the sizes of keys added, so that a key of size s weighs as s equal keys would.

    Proportional attention (Bolya et al., 2022, arXiv 2210.09461, Section 3).

    Args:
        mask: (B, K), (B, 1, Q, K), or None for a causal one.
        total: The columns held once the call has run. Places of a cache behind them have one token each, and windows
            the last ones.
        entering: What enters the first layer, (B, Q, C).

    Returns:
        (B, 1, Q, K), floating point.

    Raises:
        ValueError: If the kernel has a mask of its own.
    """
    assert total.log_size_BM is not None
    dtype, length = entering.dtype, entering.shape[1]
    if mask is None or mask.ndim == 2:
        num_keys = total.num_kept if mask is None else mask.shape[1]
        causal = torch.ones(length, num_keys, dtype=torch.bool, device=entering.device).tril(num_keys - length)
        mask = causal[None, None] if mask is None else causal & mask[:, None, None].bool()
    missing = mask.shape[-1] - total.num_kept
    added = F.pad(total.log_size_BM, (0, missing)) if missing > 0 else total.log_size_BM[:, -mask.shape[-1] :]
    added = added[:, None, None].to(dtype)
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, added, least)
    return (mask + added).clamp(min=least)


def _hidden(mask: Tensor) -> float:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def _causal(num_held: int, embeds: Tensor, is_added: bool) -> Tensor:
    length = embeds.shape[1]
    later = torch.ones(length, num_held + length, dtype=torch.bool, device=embeds.device).triu(num_held + 1)[None, None]
    return torch.zeros_like(later, dtype=embeds.dtype).masked_fill(later, _hidden(embeds)) if is_added else ~later


def _windowed(mask: Tensor, window: int) -> Tensor:
    """A mask (B, 1, M, H + M) for layers that see, and whose cache holds, only the last columns."""
    length, num_keys = mask.shape[2:]
    column = torch.arange(num_keys, device=mask.device)
    is_past = column[num_keys - length :, None] - column >= window
    return mask.masked_fill(is_past, _hidden(mask))[..., max(num_keys - length - window + 1, 0) :]


def deepstack(kwargs: dict[str, Any], reduction: Reduction, here: Columns, is_merged: bool) -> dict[str, Any]:
    """Reduces features that later layers add to the image tokens as the tokens themselves were reduced."""
    marks = kwargs["visual_pos_masks"]
    kept = here.mask(marks)
    reduced = []
    for features in kwargs["deepstack_visual_embeds"]:
        full = features.new_zeros(*marks.shape, features.shape[-1]).masked_scatter(marks[..., None], features)
        reduced.append(here.take(reduction.apply(full, is_merged), 1)[kept])
    return {"visual_pos_masks": kept, "deepstack_visual_embeds": reduced}
