"""Attention of packed vision towers: all images in one row of tokens, cut into segments that see only themselves.

Shape names: S tokens of all images, H heads, D channels of one, G segments of one length, L tokens of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.tokens.score import attention_column_mean
from gen_turbo.vlm.hooks import InstanceMethod

Seen = dict[str, Any]
"""What one attention layer was given and projected in one call."""
_MOST_QUERIES = 256


class PackedAttention:
    """Watches one attention layer and, once tokens are merged, weighs its keys by their sizes.

    Proportional attention (Bolya et al., 2022, arXiv 2210.09461, Section 3.2) adds the logarithm of a token's size to
    the logits of its key. The layer takes no mask, so its `forward` is then replaced on the instance by the same
    attention with one, from the layer's own projections and rotary positions.
    """

    def __init__(self, attn: Any) -> None:
        self._attn = attn
        self._rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision

    def watch(self, seen: Callable[[], Seen]) -> Iterator[Any]:
        """Keeps what is given and projected; gives what takes each hook off as it is placed."""

        def before(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen()["given"] = kwargs

        def after(qkv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen()["mixed"] = self._split(output)

        yield self._attn.register_forward_pre_hook(before, with_kwargs=True)
        yield self._attn.qkv.register_forward_hook(after)

    def weigh(self, log_size: Callable[[], Tensor | None]) -> Any:
        """Weighs keys by the logarithm of their sizes, (S,), which is None if all are one; gives what takes it off."""

        def run(forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            """The layer's attention with keys weighed by their sizes."""
            log_size_S = log_size()
            if log_size_S is None:
                return forward(hidden_states, **kwargs)
            mixed = self._split(self._attn.qkv(hidden_states))
            query, key = self._rotated(mixed, kwargs["position_embeddings"])
            value, weight = mixed[2].transpose(0, 1), log_size_S.to(mixed.dtype)
            parts = []
            for place in segments(kwargs["cu_seqlens"]):
                q, k, v = (x[:, place].transpose(0, 1) for x in (query, key, value))
                mask, scale = weight[place][:, None, None], self._attn.scaling
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
                parts.append((place, out.transpose(1, 2).flatten(2)))
            return self._attn.proj(_in_one_row(parts))

        return InstanceMethod(self._attn, "forward", run)

    def keys(self, seen: Seen) -> Tensor:
        """The keys of the call without their positions: (S, H, D)."""
        key: Tensor = seen["mixed"][1]
        return key

    def received(self, seen: Seen, log_size_S: Tensor | None) -> Tensor:
        """The attention that each token received, (S,): its segment's mean query gives one token's."""
        query, key = self._rotated(seen["mixed"], seen["given"]["position_embeddings"])
        parts = []
        for place in segments(seen["given"]["cu_seqlens"]):
            length = place.shape[1]
            asking = query[:, place[:, :: max(1, length // _MOST_QUERIES)]].transpose(0, 1)
            weight = None if log_size_S is None else log_size_S[place]
            parts.append(
                (place, attention_column_mean(asking, key[:, place].transpose(0, 1), weight)[..., None] * length)
            )
        return _in_one_row(parts)[:, 0]

    def _split(self, mixed: Tensor) -> Tensor:
        """Queries, keys and values, (3, S, H, D)."""
        return mixed.reshape(len(mixed), 3, self._attn.num_heads, -1).transpose(0, 1)

    def _rotated(self, mixed: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions, each (H, S, D)."""
        query, key = self._rotate(mixed[0], mixed[1], *rotary)
        return query.transpose(0, 1), key.transpose(0, 1)


def segments(bounds: Tensor) -> list[Tensor]:
    """The places of segments of one length, (G, L), for each length that there is."""
    lengths: list[int] = bounds.diff().tolist()
    starts = bounds[:-1].long()
    offset = torch.arange(max(lengths), device=bounds.device)
    if min(lengths) == max(lengths):
        return [starts[:, None] + offset]
    found: dict[int, list[int]] = {}
    for segment, length in enumerate(lengths):
        found.setdefault(length, []).append(segment)
    return [starts[which][:, None] + offset[:length] for length, which in found.items()]


def _in_one_row(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What stands at places (G, L) of segments, (G, L, C), in one row (S, C)."""
    if len(parts) == 1:
        return parts[0][1].flatten(0, 1)
    place = torch.cat([place.flatten() for place, _ in parts])
    rows = torch.cat([part.flatten(0, 1) for _, part in parts])
    return torch.empty_like(rows).index_copy(0, place, rows)
