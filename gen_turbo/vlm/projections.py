"""Queries and keys of one self-attention as it runs, and the sizes of merged tokens on its way in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.vlm.family import TowerFacts


class Projections:
    """Watches one attention layer of a vision tower.

    Proportional attention (Bolya et al., 2022, arXiv 2210.09461, Section 3.2) adds the logarithm of a token's size to
    the logits of its key. Layers that take a mask get it as one; for those that take none, the layer's `forward` is
    replaced on the instance by the same attention with that mask, from the layer's own projections.
    """

    def __init__(self, attn: Any, facts: TowerFacts) -> None:
        self._attn, self._facts = attn, facts
        self._seen: dict[str, Tensor] = {}
        self._log_size: Tensor | None = None

    def install(self) -> list[Any]:
        """Puts the hooks in place and gives back what takes them off."""
        if not self._facts.has_qkv:
            hook = self._attn.register_forward_pre_hook(self._with_mask, with_kwargs=True)
            return [hook, self._watch("query", self._module("q")), self._watch("key", self._module("k"))]
        return [self._watch("qkv", self._attn.qkv), InstanceForward(self._attn, self._proportional)]

    def query_key(self) -> tuple[Tensor, Tensor]:
        """The queries and keys of the last call, each (B, H, N, D), with their norms."""
        if "qkv" in self._seen:
            mixed = self._seen["qkv"]
            heads = self._split(mixed)
            return heads[0], heads[1]
        shape = (*self._seen["key"].shape[:2], self._attn.num_heads, -1)
        query, key = (self._seen[name].reshape(shape).transpose(1, 2) for name in ("query", "key"))
        return query, key

    def weigh(self, log_size_BN: Tensor | None) -> None:
        """Weighs the keys of the coming call by the sizes of their tokens; None if all are of size one."""
        self._log_size = log_size_BN

    def _with_mask(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._log_size is None:
            return None
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if given is not None and not _allows_all(given):
            raise ValueError("padded pictures cannot be merged in the vision tower; use place='pre_llm'")
        dtype = (args[0] if args else kwargs["hidden_states"]).dtype
        return args[:1], {**kwargs, "attention_mask": self._log_size.to(dtype)[:, None, None, :]}

    def _module(self, kind: str) -> nn.Module:
        norm = getattr(self._attn, f"{kind}_norm", None)
        found: nn.Module = getattr(self._attn, f"{kind}_proj")
        return found if norm is None else norm

    def _watch(self, name: str, module: nn.Module) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._seen[name] = output

        return module.register_forward_hook(after)

    def _split(self, mixed: Tensor) -> Tensor:
        """Queries, keys and values (3, B, H, N, D) from one projection of all."""
        return mixed.reshape(*mixed.shape[:2], 3, self._attn.num_heads, -1).permute(2, 0, 3, 1, 4)

    def _proportional(self, forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        """The attention of a layer with fused projections, keys weighed by their sizes."""
        if self._log_size is None:
            return forward(hidden_states, **kwargs)
        attn = self._attn
        mixed = self._split(attn.qkv(hidden_states))
        mask = self._log_size.to(mixed.dtype)[:, None, None, :]
        out = F.scaled_dot_product_attention(mixed[0], mixed[1], mixed[2], attn_mask=mask, scale=attn.scale)
        return attn.projection(out.transpose(1, 2).flatten(2)), None


def _allows_all(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


class InstanceForward:
    """A `forward` of one instance, in front of the one it had, until `remove`."""

    def __init__(self, module: nn.Module, replacement: Any) -> None:
        self._module, self._had = module, vars(module).get("forward")
        forward = module.forward
        module.forward = lambda *args, **kwargs: replacement(forward, *args, **kwargs)

    def remove(self) -> None:
        """Puts back what was there."""
        if self._had is None:
            vars(self._module).pop("forward", None)
        else:
            self._module.forward = self._had
