"""Keys and values of text in cross-attention, computed once per prompt instead of in every step."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.hosts.clock import Clock, Projected


class TextProjection:
    """Takes the place of the `forward` of one projection of text; its results die with the run.

    Exact: a result serves only the same tensor object under the same weights, neither written to in between. It
    steps aside in compiled code and wherever gradients are recorded.
    """

    def __init__(self, name: str, module: nn.Module, clock: Clock, limit_mb: float | None) -> None:
        self.name = name
        self._module = weakref.ref(module)
        self._clock = clock
        self._limit_mb = limit_mb
        self._is_installed = False
        self._before: Any = None
        self._placed: Any = None

    def install(self) -> None:
        """Replaces the module's forward by one of the same signature."""
        module: Any = self._module()
        self._before = vars(module).get("forward")
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._is_installed or torch.compiler.is_compiling() or len(args) != 1 or kwargs:
                return inner(*args, **kwargs)
            return self._projected(inner, args[0])

        self._placed = module.forward = forward
        self._is_installed = True

    def remove(self) -> None:
        """Puts back what was there; a forward that was placed over ours stays, and ours lets everything through."""
        module: Any = self._module()
        self._is_installed = False
        if module is None or vars(module).get("forward") is not self._placed:
            return
        if self._before is None:
            del module.forward
        else:
            module.forward = self._before

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
