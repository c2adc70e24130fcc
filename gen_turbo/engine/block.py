"""A reducer around whole transformer blocks: hooks shorten what goes in and lengthen what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.engine.call import Call, like
from gen_turbo.engine.clock import Stream
from gen_turbo.engine.compiled import outside
from gen_turbo.engine.reduction import Reduction
from gen_turbo.tokens.token_map import TokenMap


@dataclass
class _Running:
    """One call of a block between its two hooks; the plan is None where it runs in full."""

    call: Call
    stream: Stream
    plan: TokenMap | None
    short: Tensor | None


@dataclass
class BlockBinding:
    """One block and its reduction; the residual stream is restored by adding the merged change to every token.

    Attributes:
        names: Names of what the block takes by position.
        is_skipped: Whether the running call does without the block, so that there is nothing to shorten.
    """

    reduction: Reduction
    names: tuple[str, ...]
    is_skipped: Callable[[], bool] = lambda: False
    _running: dict[int, _Running] = field(default_factory=dict)

    @classmethod
    def of(cls, block: nn.Module, reduction: Reduction) -> BlockBinding:
        """Binds one block."""
        return cls(reduction, tuple(inspect.signature(type(block).forward).parameters)[1:])

    def install(self, block: nn.Module) -> list[RemovableHandle]:
        """Hooks the block; ours is the last to see the arguments and the first to see the output."""
        return [
            block.register_forward_pre_hook(outside(self._enter), with_kwargs=True),
            block.register_forward_hook(outside(self._leave), prepend=True),
        ]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._running.pop(get_ident(), None)
        layer, stream = self.reduction.layer, self.reduction.clock.current
        if stream is None or len(args) > len(self.names) or self.is_skipped():
            return None
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        call = Call.of(block.forward, arguments, layer.form, stream.observation, layer.downsample)
        if call is None:
            return None
        plan = self.reduction.plan(call, stream, _no_value)
        short = None if plan is None else call.merged(plan)
        self._running[get_ident()] = _Running(call, stream, plan, short)
        return None if plan is None or short is None else ((), call.shortened(plan, short))

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        running = self._running.pop(get_ident(), None)
        if running is None:
            return None
        call, plan = running.call, running.plan
        if plan is None or running.short is None:
            self.reduction.remember(call, running.stream, _no_value, output, call.on_slots)
            return None
        outputs = call.restored(output, plan, running.short)
        return like(self.reduction.corrected(outputs, running.stream))


def _no_value(tokens: Tensor, kind: str) -> Tensor | None:
    """Blocks read tokens before any norm; their attention is not asked for the value of tokens."""
    return None
