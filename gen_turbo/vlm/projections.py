"""Queries and keys of one self-attention as it runs, and the sizes of merged tokens on its way in.

Shape names: B images, N tokens, H heads, D channels of one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.tokens.score import attention_column_mean
from gen_turbo.vlm.family import TowerFacts
from gen_turbo.vlm.hooks import InstanceMethod, Keeper, Traced

_MOST_QUERIES = 256


class Projections:
    """Watches one attention layer of a vision tower.

    Proportional attention (Bolya et al., 2022, arXiv 2210.09461, Section 3.2) adds the logarithm of a token's size to
    the logits of its key. Layers that take a mask get it as one; for those that take none, the layer's `forward` is
    replaced on the instance by the same attention with that mask, from the layer's own projections.
    """

    def __init__(self, attn: Any, facts: TowerFacts) -> None:
        self._attn, self._has_qkv = attn, facts.has_qkv
        # What is projected is read by the thread that projects it, before it does so again.
        self._seen = threading.local()

    def watch(self) -> Iterator[Any]:
        """Keeps what is projected; gives what takes each hook off as it is placed."""
        modules = {"qkv": self._attn.qkv} if self._has_qkv else {kind: self._module(kind) for kind in ("q", "k")}
        for name, module in modules.items():
            yield module.register_forward_hook(Keeper(self._seen, name))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps what was projected while another call runs in this thread."""
        seen = dict(vars(self._seen))
        try:
            yield
        finally:
            vars(self._seen).update(seen)

    def bias(self, give: Callable[[torch.dtype], Tensor | None]) -> Any:
        """Adds to the logits of attention; gives back what takes the hook off.

        Args:
            give: Gives what is added, in a dtype and of a shape that (B, H, N, N) is made of by repeating; None if
                nothing is.
        """
        if self._has_qkv:
            return InstanceMethod(self._attn, "forward", self._biased(give))
        return self._attn.register_forward_pre_hook(Traced(_masked(give)), with_kwargs=True)

    def mean_key(self) -> Tensor:
        """The mean over heads of the keys, (B, N, D)."""
        return self._heads("k").mean(2)

    def class_attention(self, log_size_BN: Tensor | None) -> Tensor:
        """What the first token attends to, averaged over heads: (B, N), every row summing to one."""
        query, key = self._heads("q", 1), self._heads("k")
        wide = key.dtype if key.dtype == torch.float64 else torch.float32
        # One query has no use for a matrix product.
        logits_BNH = (key * (query * self._attn.head_dim**-0.5)).sum(-1, dtype=wide)
        if log_size_BN is not None:
            logits_BNH = logits_BNH + log_size_BN[..., None]
        attention_BN: Tensor = logits_BNH.softmax(1).mean(-1)
        return attention_BN

    def received(self, log_size_BN: Tensor | None) -> Tensor:
        """What each token receives from a few evenly spaced ones, (B, N), every row summing to one."""
        query, key = (self._heads(kind).transpose(1, 2) for kind in ("q", "k"))
        return attention_column_mean(query[:, :, :: max(1, query.shape[2] // _MOST_QUERIES)], key, log_size_BN)

    def _heads(self, kind: str, count: int | None = None) -> Tensor:
        """Queries or keys of every head of the first tokens, all by default: (B, N, H, D), with their norms."""
        x: Tensor = getattr(self._seen, kind if not self._has_qkv else "qkv")
        x = x if count is None else x[:, :count]
        if not self._has_qkv:
            return x.reshape(*x.shape[:2], self._attn.num_heads, -1)
        return x.reshape(*x.shape[:2], 3, self._attn.num_heads, -1)[:, :, "qkv".index(kind)]

    def _module(self, kind: str) -> nn.Module:
        norm = getattr(self._attn, f"{kind}_norm", None)
        found: nn.Module = getattr(self._attn, f"{kind}_proj")
        return found if norm is None else norm

    def _biased(self, give: Callable[[torch.dtype], Tensor | None]) -> Any:
        """The attention of a layer with fused projections, with something added to its logits."""

        def run(forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            attn, mask = self._attn, give(hidden_states.dtype)
            if mask is None:
                return forward(hidden_states, **kwargs)
            mixed = attn.qkv(hidden_states).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(mixed[0], mixed[1], mixed[2], attn_mask=mask, scale=attn.scale)
            return attn.projection(out.transpose(1, 2).flatten(2)), None

        return run


def _masked(give: Callable[[torch.dtype], Tensor | None]) -> Any:
    def before(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = give((args[0] if args else kwargs["hidden_states"]).dtype)
        if bias is None:
            return None
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if given is not None and not _allows_all(given):
            raise ValueError("tokens of padded images cannot be reduced in the vision tower; use place='pre_llm'")
        return args[:1], {**kwargs, "attention_mask": bias}

    return before


def _allows_all(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
