"""What is checked on every family of denoisers, and how the keys that attention sees are counted."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests import tiny_hosts, tiny_transformers

UNETS = tuple(tiny_hosts.UNETS)
NAMES = (*UNETS, *tiny_transformers.FAMILIES)
VARIANTS: dict[str, dict[str, object]] = {
    "corrected": {},
    "copied": {"restore": "copy"},
    "full queries": {"restore": "copy", "keep_queries": True},
    "size-weighted": {"restore": "copy", "size_weighted": True},
    "kernel by name": {"attention_backend": "native"},
    "block corrected": {"scope": "block"},
    "block copied": {"scope": "block", "restore": "copy"},
}
NO_BLOCKS = ("kandinsky",)
"""Attention on maps between convolutions: there is no block of tokens to merge."""


class Keys(TorchFunctionMode):
    """Records (queries, keys) of each attention call that really runs, and lets the call through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
        if func is F.scaled_dot_product_attention:
            self.seen.append((given["query"].shape[-2], given["key"].shape[-2]))
        return func(*args, **(kwargs or {}))


def family(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The model of a family and what runs it."""
    if name in UNETS:
        model = tiny_hosts.UNETS[name]()

        def run(batch: int = 2, grid: tuple[int, int] = (16, 16), **kwargs: object) -> Tensor:
            return tiny_hosts.run_unet(model, **tiny_hosts.unet_inputs(batch, grid), **kwargs)

        return model, run
    built = tiny_transformers.build(name)
    return built, lambda **kwargs: tiny_transformers.run(name, built, **kwargs)


def is_refused(name: str, settings: dict[str, object]) -> bool:
    """Whether a variant is refused by name on a family."""
    return settings.get("scope") == "block" and name in NO_BLOCKS


def relative(a: Tensor, b: Tensor) -> float:
    """Distance of a to b, by the size of b."""
    return ((a - b).norm() / b.norm()).item()
