"""Static caches that hold fewer columns than tokens were seen, as compiled decoding wants them.

Shape names: B rows, N columns of the long sequence, P places of the cache, Q queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from gen_turbo.vlm.columns import Columns


class ShortenedStaticCache(StaticCache):  # type: ignore[misc]  # transformers has no types here
    """A static cache whose layers hold only some of the tokens seen, all layers the same.

    It counts in tokens, as a conversation does; what was dropped frees its places for later tokens.

    Attributes:
        columns: Which of the tokens of the prompts its first places hold; later tokens follow one by one.
        is_followed: Whether a call is running that knows of the dropped tokens.
    """

    columns: Columns | None = None
    is_followed: bool = False

    @property
    def num_dropped(self) -> int:
        """Tokens seen that are not held."""
        return self.columns.num_columns - self.columns.num_kept if self.columns is not None else 0

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen."""
        return self.num_held(layer_idx) + self.num_dropped

    def num_held(self, layer_idx: int = 0) -> Any:
        """Places in use."""
        return super().get_seq_length(layer_idx)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keeps keys and values; raises ValueError in calls that know nothing of the dropped tokens."""
        check_followed(self)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forgets everything, and is the cache again that it was, for which compiled code may be there."""
        super().reset()
        for name in ("columns", "is_followed"):
            self.__dict__.pop(name, None)
        self.__class__ = StaticCache

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        super().reorder_cache(beam_idx)
        self.columns = self.columns.rows(beam_idx) if self.columns is not None else None

    def mask(self, mask: Tensor | None, total: Columns, here: Columns | None, like: Tensor, is_added: bool) -> Tensor:
        """The mask (B, 1, Q, P) of a call.

        Args:
            mask: What the call was given for the tokens seen, (B, N) or (B, 1, queries, P); None if all are real.
            total: Which tokens the first places hold once the call has run.
            here: Which columns of this call stay; None if all do.
            like: What enters the first layer, (B, Q, C).
            is_added: Whether the mask is added to logits instead of saying what is allowed.
        """
        batch, length = like.shape[:2]
        places, kept = self.get_max_length(), min(total.num_kept, self.get_max_length())
        dropped = total.num_columns - total.num_kept
        later = torch.arange(kept, places, device=like.device) + dropped
        logical = torch.cat([total.index_BM[:, :kept], later.clamp(max=places - 1).expand(batch, -1)], 1)
        real = torch.cat([total.valid_BM[:, :kept], (later < places).expand(batch, -1)], 1)
        if mask is not None and mask.ndim == 4:
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            allowed = allowed.expand(batch, -1, -1, -1)
            allowed = allowed if here is None else here.queries(allowed)
            allowed = allowed.gather(3, logical[:, None, None].expand(-1, *allowed.shape[1:3], -1))
        else:
            query = torch.arange(length, device=like.device) + self.num_held()
            allowed = (torch.arange(places, device=like.device) <= query[:, None])[None, None]
            if mask is not None:
                padded = torch.ones(batch, max(places, mask.shape[1]), dtype=torch.bool, device=like.device)
                padded[:, : mask.shape[1]] = mask.bool()
                real = real & padded.gather(1, logical)
        allowed = allowed & real[:, None, None]
        if not is_added:
            return allowed
        return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(
            ~allowed, torch.finfo(like.dtype).min
        )


def shortened_static(cache: StaticCache) -> ShortenedStaticCache:
    """Makes a static cache one that may hold fewer columns than tokens were seen, in place.

    Raises:
        ValueError: If it has layers with sliding windows, whose places go round, or recurrent ones.
    """
    for kind, has in (("sliding windows", cache.is_sliding), ("recurrent layers", cache.is_linear)):
        if any(has):
            raise ValueError(
                f"a StaticCache with {kind} cannot hold a prompt with dropped image tokens; use the default "
                "DynamicCache (leave out cache_implementation and your own cache), or detach"
            )
    if type(cache) is StaticCache:
        cache.__class__ = ShortenedStaticCache
    shorter: ShortenedStaticCache = cache
    return shorter


def refuse_static(cache: Any) -> None:
    """Refuses a static cache where layers would hold different tokens or rows; raises ValueError."""
    if isinstance(cache, StaticCache):
        raise ValueError(
            "a StaticCache cannot hold a prompt with dropped image tokens or rows in some of its layers only; use "
            "place='pre_llm', the default DynamicCache (leave out cache_implementation and your own cache), or detach"
        )


def check_kernel(attention: str | None) -> None:
    """Refuses attention kernels that take no mask of places in a static cache; raises ValueError."""
    if "flash" in (attention or ""):
        raise ValueError(
            f"{attention} takes no mask of the places that dropped image tokens leave free in a StaticCache; load with "
            "attn_implementation='sdpa', or use the default DynamicCache (leave out cache_implementation)"
        )


def check_followed(cache: Any) -> None:
    """Refuses calls that go on with a cache and know nothing of what it lacks; raises ValueError."""
    is_short = cache.num_dropped or getattr(cache, "cuts", None) or getattr(cache, "route", None) is not None
    if is_short and not cache.is_followed:
        raise ValueError(
            "this cache holds a prompt without the image tokens that a gen_turbo reducer dropped; go on with it while "
            "a reducer that removes tokens is attached (gen_turbo.attach), or begin with a new cache"
        )
