"""Caching of attention outputs between steps, the plain alternative to reducing tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class OutputCacheProcessor:
    """Runs one attention layer every `interval`-th call and repeats its last output in between.

    The broadcasting of Pyramid Attention Broadcast (Zhao et al., 2024, arXiv 2408.12588) with one interval for
    the whole run. One object serves one layer for one run.
    """

    def __init__(self, inner: Callable[..., Tensor], interval: int) -> None:
        self.inner = inner
        self.interval = interval
        self.num_calls = 0
        self.output: Tensor | None = None

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gives the layer's output, computed or remembered."""
        if self.output is None or self.num_calls % self.interval == 0:
            self.output = self.inner(attn, hidden_states, *args, **kwargs)
        self.num_calls += 1
        return self.output


@contextmanager
def cached_outputs(unet: Any, interval: int) -> Iterator[None]:
    """Caches the self-attention of the UNet's finest level inside the `with` block; enter it anew for each run.

    Raises:
        ValueError: If the finest level has no self-attention.
    """
    prefixes = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    layers = [module for name, module in unet.named_modules() if name.startswith(prefixes) and name.endswith(".attn1")]
    if not layers:
        raise ValueError("the finest level of this UNet has no self-attention to cache; use another model")
    inner = [layer.processor for layer in layers]
    for layer, processor in zip(layers, inner, strict=True):
        layer.set_processor(OutputCacheProcessor(processor, interval))
    try:
        yield
    finally:
        for layer, processor in zip(layers, inner, strict=True):
            layer.set_processor(processor)
