"""Attention of packed vision towers: all pictures in one row of tokens, cut into segments that see only themselves.

Shape names: S tokens of all pictures, H heads, D channels of one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.tokens.score import attention_column_mean
from gen_turbo.vlm.projections import InstanceForward

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
        self.forget()

    def forget(self) -> None:
        """Drops what was seen of the last call."""
        self._mixed: Tensor | None = None
        self._given: dict[str, Any] = {}
        self._log_size: Tensor | None = None

    def install(self, is_weighed: bool) -> list[Any]:
        """Puts the hooks in place and gives back what takes them off."""
        handles: list[Any] = [
            self._attn.register_forward_pre_hook(self._before, with_kwargs=True),
            self._attn.qkv.register_forward_hook(self._after_projection),
        ]
        return [*handles, InstanceForward(self._attn, self._proportional)] if is_weighed else handles

    def weigh(self, log_size_S: Tensor | None) -> None:
        """Weighs the keys of the coming call by the sizes of their tokens; None if all are of size one."""
        self._log_size = log_size_S

    def keys(self) -> Tensor:
        """The keys of the last call without their positions: (S, H, D)."""
        return self._split()[1]

    def received(self) -> Tensor:
        """The attention that each token of the last call received, (S,): its segment's mean query gives one token's."""
        query, key = self._rotated(self._split(), self._given["position_embeddings"])
        parts, at = [], 0
        for length in _lengths(self._given["cu_seqlens"]):
            place = slice(at, at + length)
            weight = self._log_size[None, place] if self._log_size is not None else None
            asking = query[None, :, place][:, :, :: max(1, length // _MOST_QUERIES)]
            parts.append(attention_column_mean(asking, key[None, :, place], weight)[0] * length)
            at += length
        return torch.cat(parts)

    def _before(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = kwargs

    def _after_projection(self, qkv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._mixed = output

    def _split(self) -> Tensor:
        """Queries, keys and values, (3, S, H, D)."""
        assert self._mixed is not None
        return self._mixed.reshape(len(self._mixed), 3, self._attn.num_heads, -1).transpose(0, 1)

    def _rotated(self, mixed: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions, each (H, S, D)."""
        query, key = self._rotate(mixed[0], mixed[1], *rotary)
        return query.transpose(0, 1), key.transpose(0, 1)

    def _proportional(self, forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        """The layer's attention with keys weighed by their sizes."""
        if self._log_size is None:
            return forward(hidden_states, **kwargs)
        self._attn.qkv(hidden_states)
        mixed = self._split()
        query, key = self._rotated(mixed, kwargs["position_embeddings"])
        lengths = _lengths(kwargs["cu_seqlens"])
        segments = [x[None].split_with_sizes(lengths, dim=2) for x in (query, key, mixed[2].transpose(0, 1))]
        masks = self._log_size.to(mixed.dtype)[None, None, None].split_with_sizes(lengths, dim=3)
        scale = self._attn.scaling
        mixtures = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            for q, k, v, mask in zip(*segments, masks, strict=True)
        ]
        return self._attn.proj(torch.cat(mixtures, 2)[0].transpose(0, 1).flatten(1))


def _lengths(cu_seqlens: Tensor) -> list[int]:
    lengths: list[int] = cu_seqlens.diff().tolist()
    return lengths
