"""Keys and values of text in cross-attention, computed once per prompt instead of in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.clock import Clock, Projected
from gen_turbo.engine.forward import InForward


class TextProjection(InForward):
    """Takes the place of the `forward` of one projection of text; its results die with the run.

    Exact: a result serves only the same tensor object under the same weights, neither written to in between. It
    steps aside in compiled code and wherever gradients are recorded.
    """

    def __init__(self, name: str, module: nn.Module, clock: Clock, limit_mb: float | None) -> None:
        super().__init__(name, module)
        self._clock = clock
        self._limit_mb = limit_mb
        self._is_installed = False

    def install(self) -> None:
        """Replaces the module's forward by one of the same signature."""
        super().install()
        self._is_installed = True

    def remove(self) -> None:
        """Puts back what was there."""
        self._is_installed = False
        super().remove()

    def answer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the text's projection, from the run's memory where it is known."""
        if not self._is_installed or torch.compiler.is_compiling() or len(args) != 1 or kwargs:
            return inner(*args, **kwargs)
        return self._projected(inner, args[0])

    def _projected(self, inner: Any, text: Tensor) -> Any:
        stream, module = self._clock.current, self._module()
        if stream is None or module is None or torch.is_grad_enabled() or text.is_inference():
            return inner(text)
        weights: list[tuple[Tensor, int]] = [(weight, weight._version) for weight in module.parameters()]
        known = stream.projected.get(self.name)
        if known is not None and known.is_for(text, weights):
            return known.output
        output = inner(text)
        stream.projected.pop(self.name, None)
        made = Projected(text, weights, text._version, output)
        if self._limit_mb is None or stream.num_bytes + made.num_bytes <= self._limit_mb * 1e6:
            stream.projected[self.name] = made
            self._clock.note_bytes()
        return output
