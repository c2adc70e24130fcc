"""Blocks of a vision tower that a model runs for nobody."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.family import TowerFacts
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.stage import Handle, Stage


class Unread(Stage):
    """Skips the blocks behind the last one whose output is projected, as the last of CLIP's in LLaVA-1.5.

    In a call of the model, or of its `generate`, nothing but that output is read, so that the answer stays the same to
    the bit. Where features are asked for alone, or a call names another block, all blocks run.

    Args:
        model: The model.
        facts: What is known of its tower.
        calls: The calls of the base model.
    """

    def __init__(self, model: nn.Module, facts: TowerFacts, calls: Calls[Running]) -> None:
        self._config: Any = model.config
        self._calls = calls
        self._answering: Calls[None] = Calls(lambda: None)
        blocks, last = facts.stack(model)
        self._blocks = blocks[last + 1 :]

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Takes the place of `generate` and of the blocks' own methods."""
        if self.is_idle or not self._blocks:
            return
        yield _Weakly(InstanceMethod(model, "generate", self._answer))
        for block in self._blocks:
            yield InstanceMethod(block, "forward", self._run)

    def _answer(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_usual(kwargs):
            return generate(*args, **kwargs)
        self._answering.begin()
        try:
            return generate(*args, **kwargs)
        finally:
            self._answering.end()

    def _run(self, forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_called = self._calls.is_running and self._is_usual(self._calls.now.given)
        if is_called or self._answering.is_running:
            return hidden_states
        return forward(hidden_states, *args, **kwargs)

    def _is_usual(self, given: dict[str, Any]) -> bool:
        """Whether a call reads the block that the configuration names."""
        return given.get("vision_feature_layer") in (None, self._config.vision_feature_layer)


class _Weakly:
    """Undoes a method of the whole model without holding it: an attachment lives as long as the model does."""

    def __init__(self, method: InstanceMethod) -> None:
        self._method = weakref.ref(method)

    def remove(self) -> None:
        """Takes the method off, if its model is there."""
        method = self._method()
        if method is not None:
            method.remove()
