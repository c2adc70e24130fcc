"""Caching of attention outputs between steps, the plain alternative to reducing tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gen_turbo.api import adapter_of


class OutputCacheProcessor:
    """Runs one attention layer every `interval`-th call and repeats its last output in between.

    The broadcasting of Pyramid Attention Broadcast (Zhao et al., 2024, arXiv 2408.12588) with one interval for
    the whole run. One object serves one layer for one run.
    """

    def __init__(self, inner: Callable[..., Any], interval: int) -> None:
        self.inner = inner
        self.interval = interval
        self.num_calls = 0
        self.output: Any = None

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Gives the layer's output, of image or of image and text, computed or remembered."""
        if self.output is None or self.num_calls % self.interval == 0:
            self.output = self.inner(attn, *args, **kwargs)
        self.num_calls += 1
        return self.output


@contextmanager
def cached_outputs(model: Any, interval: int) -> Iterator[None]:
    """Caches the attention among image tokens at a denoiser's own resolution; enter the `with` block anew for each run.

    Raises:
        ValueError: If there is none at that resolution.
    """
    host: Any = adapter_of(model)
    finest = [layer.name for layer in host.layers(model) if layer.downsample == 1 and not layer.left_alone]
    layers = [model.get_submodule(name) for name in finest]
    if not layers:
        raise ValueError("the finest level of this model has no self-attention to cache; use another model")
    inner = [layer.processor for layer in layers]
    for layer, processor in zip(layers, inner, strict=True):
        layer.set_processor(OutputCacheProcessor(processor, interval))
    try:
        yield
    finally:
        for layer, processor in zip(layers, inner, strict=True):
            layer.set_processor(processor)
