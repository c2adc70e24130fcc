"""Gradient checkpointing: what a block computes again in the backward pass sees the state of its own call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.stage import Handle


class Recomputed:
    """Blocks whose inner hooks depend on a call that has ended once the backward pass runs them again.

    Args:
        blocks: The blocks.
        calls: The calls whose state the hooks read.
    """

    def __init__(self, blocks: Sequence[nn.Module], calls: Calls[Any]) -> None:
        self._blocks, self._calls = blocks, calls
        self._placed = False

    def place(self) -> Iterator[Handle]:
        """Takes the place of the blocks' `forward` where they are checkpointed."""
        self._placed = self._is_on
        for block in self._blocks if self._placed else ():
            yield InstanceMethod(block, "forward", partial(self._run, block))

    def check(self) -> None:
        """Refuses checkpointing that was enabled since; raises ValueError."""
        if self._is_on and not self._placed and self._blocks[0].training:
            raise ValueError(
                "gradient checkpointing of the vision tower was enabled after the processor was attached; attach it "
                "again (gen_turbo.reattach)"
            )

    @property
    def _is_on(self) -> bool:
        return bool(getattr(self._blocks[0], "gradient_checkpointing", False))

    def _run(self, block: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # transformers checkpoints around the forward of the class, which is inside of this one.
        inner = getattr(type(block).forward, "__wrapped__", None)
        if not (inner and self._is_on and block.training and self._calls.is_running):
            return forward(*args, **kwargs)
        return block._gradient_checkpointing_func(
            partial(self._within, self._calls.now, partial(inner, block, **kwargs)), *args
        )

    def _within(self, state: Any, run: Callable[..., Any], *args: Any) -> Any:
        self._calls.begin(state)
        try:
            return run(*args)
        finally:
            self._calls.end()
