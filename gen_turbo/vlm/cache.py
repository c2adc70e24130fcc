"""A cache that holds fewer columns than tokens were seen: it counts in tokens and masks in columns."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.routes import Route
from gen_turbo.vlm.static import ShortenedStaticCache, check_followed, shortened_static


class ShortenedCache(DynamicCache):  # type: ignore[misc]  # transformers has no types here
    """A dynamic cache whose first layer, and again its later layers, hold only some of the tokens or rows seen.

    Its length is that in tokens, as a conversation counts it when it goes on with this cache. Masks and attention
    work on the columns that are really there. A default cache becomes one when the first token is dropped; its
    keys and values stay where they are. Go on with such a cache only while the same reducer is attached.

    Attributes:
        columns: Which of the tokens seen the first layer holds; None while it holds all of them.
        cuts: By decoder layer, which of the first layer's columns that layer and the following ones hold.
        route: Which rows run which layers; a layer holds only the rows that run it. None while all run all.
    """

    columns: Columns | None = None
    route: Route | None = None
    is_followed: bool = False
    cuts: dict[int, Columns]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cuts = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keeps keys and values; raises ValueError in calls that know nothing of the dropped tokens."""
        check_followed(self)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def num_dropped(self) -> int:
        """Tokens seen that the first layer does not hold."""
        return self.columns.num_columns - self.columns.num_kept if self.columns is not None else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        held = self.num_held(layer_idx)
        return held + self.num_dropped if held else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns held, which is where a mask begins to count queries."""
        return self.num_held(layer_idx)

    def num_held(self, layer_idx: int = 0) -> int:
        """Columns that one layer holds."""
        held: int = super().get_seq_length(layer_idx)
        return held

    def cut_at(self, layer: int) -> Columns | None:
        """Which of the first layer's columns a layer holds; None where it holds them all."""
        before = [first for first in self.cuts if first <= layer]
        return self.cuts[max(before)] if before else None

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the latest tokens.

        Raises:
            ValueError: If dropped tokens are among them, for then the layers hold different numbers of them.
        """
        left = self.num_held() - abs(tokens_to_remove)
        columns = self.columns
        if columns is not None and left < columns.num_kept:
            columns = columns.without_last(columns.num_kept - left)
        cuts = {
            layer: cut.without_last(cut.num_columns - left) if left < cut.num_columns else cut
            for layer, cut in self.cuts.items()
        }
        super().crop(tokens_to_remove)
        self.columns, self.cuts = columns, cuts

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.columns, self.cuts, self.route = None, {}, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        held = self.layers[0].keys if self.layers else None
        if held is not None:
            self._take_rows(torch.arange(len(held), device=held.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows."""
        self._take_rows(indices)

    def _take_rows(self, index: torch.Tensor) -> None:
        for number, layer in enumerate(self.layers):
            # Selects what is quantized, or on another device, too.
            layer.reorder_cache(index if self.route is None else self.route.held(number, index))
        self.route = self.route.select(index) if self.route is not None else None
        self.columns = self.columns.rows(index) if self.columns is not None else None
        self.cuts = {number: cut.rows(index) for number, cut in self.cuts.items()}


class ShortenedQuantizedCache(ShortenedCache, QuantizedCache):  # type: ignore[misc]  # transformers has no types here
    """The same where keys and values are quantized."""


_SHORTER = {DynamicCache: ShortenedCache, QuantizedCache: ShortenedQuantizedCache}
SHORTENED = (ShortenedCache, ShortenedStaticCache)
"""Caches that may hold fewer columns than tokens were seen."""


def shortened(cache: Any) -> Any:
    """Makes a dynamic, quantized or static cache one that may hold fewer columns than tokens were seen, in place.

    Raises:
        ValueError: If the cache is of another kind, whose lengths are fixed or kept elsewhere.
    """
    if isinstance(cache, StaticCache):
        return shortened_static(cache)
    if type(cache) in _SHORTER:
        cache.__class__ = _SHORTER[type(cache)]
        cache.cuts = {}
    if not isinstance(cache, ShortenedCache):
        raise ValueError(
            f"a {type(cache).__name__} cannot hold a prompt with dropped image tokens; use the default DynamicCache "
            "(leave out cache_implementation and your own cache), or detach"
        )
    return cache
